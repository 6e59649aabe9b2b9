"""What of the GPU's code is not kernels, without a GPU: where tensors lie, what is copied and read, and plans.

A device is emulated on the CPU (emulated_cuda.cpp): its tensors mix with the CPU's as little as a GPU's do.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import streaming
import torch
from torch.utils.cpp_extension import include_paths

import samerge_ext as sm
from samerge_ext.budget.plan import plan

pytestmark = [
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA; only one without it can be given another"),
    pytest.mark.skipif(sys.platform != "linux", reason="the emulated device is preloaded, as Linux does it"),
]

SUPPORT = Path(streaming.__file__).parent
TORCH = Path(torch.__file__).parent
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
# Of test_gpu.py; the others are about kernels, captured graphs, or a GPU's memory.
EMULATED = (
    "test_samerging_follows_the_literal_loop",
    "test_weights_from_everywhere_follow_the_literal_loop",
    "test_quantised_task_vectors_stream_from_pinned_memory",
    "test_a_device_without_an_index_is_the_current_one",
    "test_adamerging_follows_the_literal_loop",
    "test_a_run_continues_from_its_checkpoint",
    "test_cpu_batches_are_fetched",
    "test_a_late_read_names_the_step_that_went_wrong",
    "test_bf16_autocast_learns",
)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """A function that runs Python with the device in place, and returns what it prints."""
    library = tmp_path_factory.mktemp("emulated") / "emulated_cuda.so"
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-O0", "-shared", "-fPIC", *(f"-I{path}" for path in include_paths())]
    command += [SUPPORT / "emulated_cuda.cpp", "-o", library, f"-L{TORCH / 'lib'}", "-lc10", "-ltorch_cpu"]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    environment = os.environ | {"LD_PRELOAD": str(library), "LD_LIBRARY_PATH": str(TORCH / "lib")}
    environment |= {"PYTHONPATH": os.pathsep.join([str(SUPPORT), *sys.path])}

    def run(*arguments):
        done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_methods_run_on_the_device(emulated):
    chosen = ["-m", "gpu", "-k", f"not triton and ({' or '.join(EMULATED)})", Path(__file__).with_name("test_gpu.py")]
    printed = emulated("-m", "pytest", "-v", "-p", "emulated_cuda", *chosen)
    for name in EMULATED:
        assert any(f"::{name}" in line and "PASSED" in line for line in printed.splitlines()), name
    assert "SKIPPED" not in printed, printed


@pytest.fixture(scope="module")
def planned(emulated, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    streaming.packed_twice(folder, streaming.make(dtype=torch.float32, width=64))
    return json.loads(emulated("-c", PLAN, folder / "packed").splitlines()[-1])


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
