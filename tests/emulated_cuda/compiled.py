"""The CUDA sources as a library for the CPU, with torch's device: to be preloaded.

What g++ does not parse of CUDA C++ is rewritten, every CUDA header is language.h, and kernels are compiled with calls before
each access. Objects are kept by what they are made of."""

import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import torch
from filelock import FileLock
from torch.utils.cpp_extension import include_paths

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CACHE = ROOT / "build" / "emulated_cuda"
CXX = "g++"
TORCH = Path(torch.__file__).parent / "lib"
# Accesses stay what they are in the source: a vector is not taken apart, and no two become one.
KERNEL = "-x c++ -std=c++17 -O2 -g1 -fPIC -w -fno-strict-aliasing -fno-tree-sra -fno-store-merging -fno-tree-vectorize".split()
KERNEL += "-fsanitize=thread --param tsan-instrument-func-entry-exit=0 -D__CUDACC__ -D__CUDA_ARCH__=900".split()
RUNTIME = "-std=c++17 -O2 -g1 -fPIC -Wall -Wextra".split()
OF_TORCH = "-std=c++20 -O0 -fPIC -w -DSAMERGE_CUDA -DTORCH_EXTENSION_NAME=emulated_kernels".split()
INCLUDES = [f"-I{path}" for path in (*include_paths(), sysconfig.get_path("include"))]


def rewritten(source: str) -> str:
    source = re.sub(r"#include <(cuda\w*|cooperative_groups|c10/cuda/\w+)\.h>", '#include "language.h"', source)
    source = re.sub(r"(\w+(?:<[\w\s,]*>)?)\s*<<<(.+?)>>>\(", r"emulated::launch(\1, \2)(", source)
    source = re.sub(r"\b((?:thread|block)Idx|(?:block|grid)Dim)\.([xyz])\b", r"emulated::\1().\2", source)
    source = re.sub(r"(extern )?__shared__ (?:__align__\(\d+\) )?(\w+) ([^;]+);", shared, source)
    return re.sub(r'asm(?: volatile)?\("(\S+) [^"]*" : "=\w"\((\w+)\) : (.*?)\);', ptx, source)


def shared(match: re.Match) -> str:
    """__shared__ T name[a][b], …; as references into what the runtime keeps for each block."""
    dynamic, kind, declared = match.groups()
    if dynamic:
        return f"auto* {declared.removesuffix('[]')} = static_cast<{kind}*>(emulated::shared(nullptr, 0));"
    declare = "using {0}_t = {1}{2}; static char {0}_key; "
    declare += "auto& {0} = *static_cast<{0}_t*>(emulated::shared(&{0}_key, sizeof({0}_t)));"
    names = re.findall(r"(\w+)((?:\[[^\]]*\])*)(?:, |$)", declared)
    return " ".join(declare.format(name, kind, extents) for name, extents in names)


def ptx(match: re.Match) -> str:
    instruction, target, operands = match.groups()
    operands = re.sub(r'"\w"', "", operands)
    return f"{target} = ptx::{instruction.replace('.', '_')}({operands});"


def compiled(source: Path, flags: list[str], folder: Path) -> Path:
    """The object of a source; names of files are relative to the folder, so that copies elsewhere have the same object."""
    flags = [*flags, "-I.", f"-I{HERE}"]
    preprocess = [CXX, *(flag for flag in flags if flag != "-g1"), "-E", source]
    text = subprocess.run(preprocess, cwd=folder, capture_output=True, check=True).stdout
    made = CACHE / f"{source.stem}-{hashlib.sha256(text + repr(flags).encode()).hexdigest()[:16]}.o"
    if not made.exists():
        unfinished = made.with_suffix(f".{os.getpid()}")
        command = [CXX, *flags, "-fpreprocessed", "-c", "-", "-o", unfinished]
        command[1:1] = [] if "-x" in flags else ["-x", "c++"]
        subprocess.run(command, cwd=folder, input=text, check=True)
        unfinished.rename(made)
    return made


def library(csrc: Path = ROOT / "csrc", name: str = "whole") -> Path:
    """The library of these sources; several at once have a name each."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "lock"):
        tree = CACHE / f"{name}-sources"
        shutil.rmtree(tree, ignore_errors=True)
        for path in csrc.rglob("*"):
            if path.suffix in (".h", ".cu", ".cuh", ".cpp"):
                copy = tree / path.relative_to(csrc)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_text(rewritten(path.read_text()))
        (tree / "cuda" / "planted.cu").write_text(rewritten((HERE / "planted.cu").read_text()))
        in_tree = lambda pattern: [path.relative_to(tree) for path in sorted(tree.glob(pattern))]
        parts = ["device.cpp", *in_tree("cuda/*_cuda.cpp"), "bindings.cpp"]
        (tree / "torch.cpp").write_text("".join(f'#include "{part}"\n' for part in parts))
        objects = [compiled(path, KERNEL, tree) for path in in_tree("cuda/*.cu")]
        objects += [compiled(Path(half), RUNTIME, HERE) for half in ("threads.cpp", "memory.cpp")]
        of_torch = compiled(Path("torch.cpp"), [*OF_TORCH, *INCLUDES], tree)
        made = CACHE / f"{name}.so"
        # Of what bindings.cpp names, the CPU's operators are not here, and not called.
        subprocess.run(["objcopy", "--wildcard", "--weaken-symbol=*samerge*", of_torch, tree / "torch.o"], check=True)
        unfinished = made.with_suffix(".unfinished")  # others may be running what was made before
        link = [CXX, "-shared", "-Wl,-Bsymbolic", *objects, tree / "torch.o", "-o", unfinished, f"-L{TORCH}"]
        subprocess.run([*link, "-lc10", "-ltorch_cpu", "-ltorch_python", f"-Wl,-rpath,{TORCH}"], check=True)
        unfinished.rename(made)
    return made
