"""CUDA sources without a GPU: kernels compile for every architecture without spilling, wrappers pass the compiler's checks."""

import functools
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import pytest
import torch
from helpers import ROOT

CUDA = ROOT / "csrc" / "cuda"
TOOLKIT = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=TOOLKIT / "bin")
ARCHITECTURES = ("80", "90", "100")

pytestmark = [
    pytest.mark.skipif(not CUDA.exists(), reason="needs the source tree"),
    pytest.mark.skipif(NVCC is None, reason="nvcc is not installed"),
]


@functools.cache
def compiled(source):
    """What the compiler reports, and the source as PTX for every architecture."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    targets += [f"-gencode=arch=compute_{ARCHITECTURES[-1]},code=compute_{ARCHITECTURES[-1]}"]  # PTX
    with tempfile.TemporaryDirectory() as folder:
        kept = ["--keep", "--keep-dir", folder, "-o", Path(folder, "kernels.o")]
        command = [NVCC, "-O3", "-std=c++17", "-t0", "-Xptxas", "-v", *targets, *kept, "-c", source]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-4000:]
        return result.stderr, [path.read_text() for path in sorted(Path(folder).glob("*.ptx"))]


@pytest.mark.parametrize("source", sorted(CUDA.glob("*.cu")), ids=lambda path: path.name)
def test_kernels_fit_into_registers(source):
    printed, _ = compiled(source)
    assert "warning" not in printed, printed[-4000:]
    report = r"entry function '(\w+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill"
    kernels = re.findall(report, printed, re.DOTALL)
    assert {architecture for _, architecture, _, _ in kernels} == set(ARCHITECTURES)
    spilling = [kernel for kernel in kernels if kernel[2:] != ("0", "0")]
    assert not spilling, "kernel, architecture, bytes of stack and spilled: " + str(spilling)


@pytest.mark.parametrize("name", ["weighted_sum", "elected_sum"])  # which store nothing but vectors
def test_a_vector_is_stored_by_one_instruction(name):
    """The compiler takes vectors apart where it likes; of every sector a quarter is written at a time then."""
    _, texts = compiled(CUDA / f"{name}.cu")
    assert len(texts) == len(ARCHITECTURES)
    for ptx in texts:
        stores = set(re.findall(r"\bst\.global\.\S+", ptx))
        assert stores and all(".v" in store for store in stores), stores


@pytest.mark.parametrize("source", sorted(CUDA.glob("*_cuda.cpp")), ids=lambda path: path.name)
def test_wrappers_pass_the_compiler(source):
    from torch.utils.cpp_extension import include_paths

    compiler = shutil.which(os.environ.get("CXX", "c++"))
    toolkits = (TOOLKIT, Path(NVCC).resolve().parents[1])
    headers = next((path / "include" for path in toolkits if (path / "include" / "cuda_runtime_api.h").exists()), None)
    if compiler is None or headers is None:
        pytest.skip("needs a C++ compiler and the CUDA headers")
    includes = [f"-I{path}" for path in (*include_paths(), sysconfig.get_path("include"), headers)]
    # A CPU build of torch has CUDA's wrapper headers, but not the file that says how CUDA was configured.
    config = [] if torch.version.cuda else ["-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"]
    command = [compiler, "-std=c++20", "-fsyntax-only", "-Wall", "-Werror", "-Wno-psabi", *config, *includes, source]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
