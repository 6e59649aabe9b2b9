"""CUDA sources without a GPU: kernels compile for every architecture without spilling, wrappers pass the compiler's checks."""

import os
import re
import shutil
import subprocess
import sysconfig
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


@pytest.mark.parametrize("source", sorted(CUDA.glob("*.cu")), ids=lambda path: path.name)
def test_kernels_fit_into_registers(source, tmp_path):
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    targets += [f"-gencode=arch=compute_{ARCHITECTURES[-1]},code=compute_{ARCHITECTURES[-1]}"]  # PTX
    command = [NVCC, "-O3", "-std=c++17", "-t0", "-Xptxas", "-v", *targets, "-c", source, "-o", tmp_path / "kernels.o"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "warning" not in result.stderr, result.stderr[-4000:]
    report = r"entry function '(\w+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill"
    kernels = re.findall(report, result.stderr, re.DOTALL)
    assert {architecture for _, architecture, _, _ in kernels} == set(ARCHITECTURES)
    spilling = [kernel for kernel in kernels if kernel[2:] != ("0", "0")]
    assert not spilling, "kernel, architecture, bytes of stack and spilled: " + str(spilling)


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
