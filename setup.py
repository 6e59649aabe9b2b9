"""Builds samerge_ext._C against the installed torch; everything declarative is in pyproject.toml.

Without a compiler the package installs without _C and runs on the PyTorch reference, which it says when it is used. A
compiler that fails fails the installation. CUDA kernels are built where torch is a CUDA build and its toolkit is found.
"""

import os
import shutil
import sys
import sysconfig
from glob import glob

from setuptools import find_packages, setup

CUDA_ARCHITECTURES = "8.0;9.0;10.0+PTX"


def import_cpp_extension():
    """torch's build tools, from the environment that is installed into even where pip hides it from the build."""
    for name in ("purelib", "platlib"):
        if (path := sysconfig.get_path(name)) not in sys.path:
            sys.path.append(path)
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        raise SystemExit(
            f"samerge_ext is compiled against the torch that it will run with, and torch cannot be imported here ({error}).\n"
            "Install torch first; if it is there, install with: pip install . --no-build-isolation"
        ) from error
    return cpp_extension


def compiler() -> str | None:
    """The C++ compiler that torch's BuildExtension will call; None where the machine has none."""
    named = os.environ.get("CXX")
    found = shutil.which(named.split()[0] if named else "c++")
    if named and found is None:
        raise SystemExit(f"the environment variable CXX names {named!r}, which is not a program; correct or unset it")
    return found


def extensions(cpp_extension) -> list:
    import torch

    if compiler() is None:
        print(
            "WARNING: no C++ compiler found (c++ is not on PATH): samerge_ext is installed without its C++ operators and runs "
            "on the PyTorch reference",
            file=sys.stderr,
        )
        return []
    # The wrappers NAME_cpu.cpp are compiled as one, wrappers.cpp.
    sources = ["csrc/bindings.cpp", *(path for path in sorted(glob("csrc/cpu/*.cpp")) if not path.endswith("_cpu.cpp"))]
    kernels = sorted(glob("csrc/cuda/*.cu"))
    with_cuda = bool(torch.version.cuda and cpp_extension.CUDA_HOME and kernels)
    # -g0: setuptools repeats Python's own -g, which costs a third of the time and which -s throws away again.
    flags = ["-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-Wno-psabi"]
    if with_cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
        sources += kernels + sorted(glob("csrc/cuda/*_cuda.cpp"))
        flags.append("-DSAMERGE_CUDA")
    extension = cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension
    return [
        extension(
            "samerge_ext._C",
            sources,
            depends=glob("csrc/**/*.h", recursive=True) + glob("csrc/cuda/*.cuh") + glob("csrc/cpu/*_cpu.cpp"),
            extra_compile_args={"cxx": flags, "nvcc": ["-O3", "--threads=4"]},
            extra_link_args=["-s"] if sys.platform == "linux" else [],
        )
    ]


if __name__ == "__main__":
    cpp_extension = import_cpp_extension()
    setup(
        packages=[*find_packages(include=["samerge_ext", "samerge_ext.*"]), "samerge_ext.kernels"],
        package_dir={"samerge_ext.kernels": "kernels"},
        ext_modules=extensions(cpp_extension),
        cmdclass={"build_ext": cpp_extension.BuildExtension},
    )
