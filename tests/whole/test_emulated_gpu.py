"""The GPU's code without a GPU: CUDA kernels, where tensors lie, what is copied and read, and plans.

A device is emulated on the CPU (tests/emulated_cuda): its tensors mix with the CPU's as little as a GPU's do, and it runs every
thread of the CUDA kernels and watches what they do.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import compiled
import pytest
import streaming
import torch
from helpers import ROOT

import samerge_ext as sm
from samerge_ext.budget.plan import plan

MISSING = [program for program in (compiled.CXX, "objcopy", "addr2line") if shutil.which(program) is None]
pytestmark = [
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA; only one without it can be given another"),
    pytest.mark.skipif(sys.platform != "linux", reason="the emulated device is preloaded, as Linux does it"),
    pytest.mark.skipif(not (ROOT / "Makefile").exists(), reason="needs the source tree"),
    pytest.mark.skipif(bool(MISSING), reason=f"the CUDA kernels are compiled for the CPU: {', '.join(MISSING)} is not installed"),
]

PLAN = """
import json, os, sys
import streaming, torch
import samerge_ext as sm
from dataclasses import asdict
from pathlib import Path
from samerge_ext.budget.plan import plan

base = streaming.make(dtype=torch.float32, width=64)
weights = {
    "fp32": streaming.make_packed(base),
    "int4": streaming.make_packed(base, task_vector_dtype="int4"),
    "file": sm.PackedWeights.open(Path(sys.argv[1])),
}
shared = sm.models.SharedEncoder(lambda module, batch: module(batch), lambda rows, task: rows)
cases = {
    "fp32": ("fp32", streaming.logits, {}), "int4": ("int4", streaming.logits, {}), "file": ("file", streaming.logits, {}),
    "shared": ("fp32", shared, {"tasks_per_batch": 1}), "bf16": ("fp32", streaming.logits, {"precision": "bf16"}),
}
found = {"numbers": weights["fp32"].layout.numel}
for name, (packed, logits, settings) in cases.items():
    config = sm.SAMergingConfig(device="cuda", **settings)
    module = streaming.make(1, dtype=base.position.dtype, width=64)
    found[name] = [asdict(way) for way in plan(module, weights[packed], streaming.make_batches(), logits, config).ways]
print(json.dumps(found), flush=True)
os._exit(0)  # as emulated_cuda.py's pytest_unconfigure
"""
GPU_TESTS = [f"tests/whole/test_gpu{part}.py" for part in ("", "_merges", "_operators", "_files")]
# Of the tests marked gpu, what is left to a GPU, by the words of their names.
LEFT_TO_A_GPU = (
    *("triton",),  # interpreted, by test_triton.py
    *("opcheck", "compile", "captured", "do_not_wait", "are_distilled"),  # torch's own, for a device that it knows
    *("large_output", "more_than_2_to_the_31", "many_blocks", "262144", "stays_within_its_plan"),  # minutes and gigabytes
    *("threads", "20000", "100003"),  # minutes, which test_emulated_kernels.py spends better
    *("sanitized",),  # the emulated device looks for the same
)


@pytest.fixture(scope="module")
def library():
    return compiled.library()


@pytest.fixture(scope="module")
def emulated(library):
    """A function that runs Python with the device in place, and returns how that ended."""

    def run(*arguments, library=library):
        environment = os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
        environment |= {"PYTHONPATH": os.pathsep.join([str(compiled.HERE), *sys.path])}
        return subprocess.run([sys.executable, *map(str, arguments)], env=environment, cwd=ROOT, capture_output=True, text=True)

    return run


def test_kernels_and_methods_run_on_the_device(emulated, record_property):
    """What `make test-gpu` runs, and test_emulated_kernels.py; the summary of the run tells of both."""
    operators = re.search(r"test_%\.py,([\w ]+)\)", (ROOT / "Makefile").read_text())[1].split()
    tests = [*(f"tests/ops/test_{op}.py" for op in operators), *GPU_TESTS, "tests/whole/test_emulated_kernels.py"]
    marked = ["-m", "gpu or emulated", "-k", f"not ({' or '.join(LEFT_TO_A_GPU)})"]
    done = emulated("-m", "pytest", "-q", "-p", "emulated_cuda", *marked, *tests)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "SKIPPED" not in done.stdout, done.stdout
    lines = done.stdout.splitlines()
    for line in lines:
        if " MB, moved " in line:
            record_property("measured", line)
    record_property("measured", f"on the emulated device: {lines[-1]}; left to a GPU: {', '.join(LEFT_TO_A_GPU)}")


def without_the_first_barrier(text):
    return re.sub(r"(__syncthreads|cluster\.sync)\(\);", "", text, count=1)


def test_a_missing_barrier_is_seen_in_every_kernel_that_has_one(emulated, tmp_path):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    broken = []
    for path in sorted((tmp_path / "csrc" / "cuda").glob("*.cu*")):
        text = path.read_text()
        path.write_text(without_the_first_barrier(text))
        broken += [path.name] * (path.read_text() != text)
    library = compiled.library(tmp_path / "csrc", "without_barriers")
    chosen = ["-m", "emulated", "-k", "test_results_depend", "tests/whole/test_emulated_kernels.py"]
    done = emulated("-m", "pytest", "-q", "-p", "emulated_cuda", *chosen, library=library)
    failed = re.findall(r"^FAILED .*test_results_depend\w+\[(\w+)", done.stdout, re.MULTILINE)
    assert len(broken) >= 4 and all(any(name.startswith(op) for op in failed) for name in broken), (broken, done.stdout[-3000:])
    assert len(re.findall(r"RuntimeError: CUDA error 719: race at", done.stdout)) >= len(failed)


@pytest.fixture(scope="module")
def planned(emulated, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    streaming.packed_twice(folder, streaming.make(dtype=torch.float32, width=64))
    done = emulated("-c", PLAN, folder / "packed")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", ["fp32", "int4", "file", "shared", "bf16"])
def test_every_place_for_the_weights_is_planned(planned, case):
    ways = planned[case]
    whole = [way for way in ways if way["store"] == "device"]
    host, file = ([way for way in ways if way["store"] == store] for store in ("host", "file"))
    assert [way["streamed"] for way in whole] == [False, True] and len(host) == len(file) > 0
    assert whole[0]["device_bytes"] > whole[1]["device_bytes"] > host[0]["device_bytes"]
    assert [way["device_bytes"] for way in host] == [way["device_bytes"] for way in file]
    assert [way["moved"] for way in host] == [way["moved"] for way in file] and host[0]["moved"] > 0
    assert whole[0]["moved"] == whole[1]["moved"] == 0


def test_the_host_holds_what_the_file_would(planned):
    """Beside the pinned buffers between a file and the GPU."""
    for case, per_number in {"fp32": 4 + 2 * 4, "int4": 4 + 2 * (0.5 + 2 / 128)}.items():
        host, file = (next(way for way in planned[case] if way["store"] == store) for store in ("host", "file"))
        held = host["host_bytes"] - file["host_bytes"] + 2 * file["piece"] * per_number
        assert held / per_number == pytest.approx(planned["numbers"], rel=0.01)


def test_a_plan_says_where_torch_has_no_gpu():
    with pytest.raises(ValueError, match="device='cuda': torch is built without GPUs here"):
        config = sm.SAMergingConfig(device="cuda")
        plan(streaming.make(1), streaming.make_packed(streaming.make()), streaming.make_batches(), streaming.logits, config)
