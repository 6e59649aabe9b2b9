"""Which implementation of an operator runs: the only file that knows which backends exist.

An operator named `op` is found by name in every backend, always with the same signature:

    reference   samerge_ext.reference.<op>       plain PyTorch, any device
    cpu         samerge_ext._C.<op>_cpu          C++, built with the package
    cuda        samerge_ext._C.<op>_cuda         CUDA, built with the package where a CUDA toolkit is found
    triton      samerge_ext.kernels.<op>         Triton, on CUDA tensors; on CPU tensors under TRITON_INTERPRET=1

"auto" takes the best one for the tensor's device and says once when that is only the reference. A backend asked for
by name runs or raises. The choice is process-wide on purpose: backward passes run on autograd's own threads.
"""

import contextlib
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType

import torch

BACKENDS = ("reference", "cpu", "cuda", "triton")
_BEST_FIRST = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}  # device type -> backends that "auto" tries
_REBUILD = "reinstall from source with `pip install . --no-build-isolation`"

_kernels: dict[tuple[str, str, str], Callable] = {}  # (operator, requested backend, device type) -> implementation
_warned: set[str] = set()

try:
    _C: ModuleType | None = importlib.import_module("samerge_ext._C")
    _extension_error: str | None = None
except ImportError as error:
    _C = None
    _extension_error = f"the C++ extension samerge_ext._C cannot be imported ({error}); {_REBUILD}"


def _check_name(name: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose one of: auto, {', '.join(BACKENDS)}")
    return name


_active = _check_name(os.environ.get("SAMERGE_BACKEND", "auto"))


def active() -> str:
    """The backend in force: the argument of the innermost `use_backend`, else SAMERGE_BACKEND, else "auto"."""
    return _active


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every operator inside the `with` block on one backend.

    Args:
        name: "reference", "cpu", "cuda", "triton", or "auto" (the best one for each tensor's device).

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend cannot run here; the message says what to do about it.
    """
    global _active
    _check_name(name)
    if name != "auto" and (reason := _unavailable(name)):
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    previous, _active = _active, name
    try:
        yield
    finally:
        _active = previous


def available() -> dict[str, str | None]:
    """Every backend's name with None where it can run, else the reason why not."""
    return {name: _unavailable(name) for name in BACKENDS}


def cpu_level() -> str | None:
    """The instruction level that the C++ loops run at (SAMERGE_CPU_LEVEL forces one), None without the extension."""
    return _C.cpu_level() if _C else None


def kernel(op: str, tensor: torch.Tensor) -> Callable:
    """The implementation of `op` that the backend in force has for `tensor`'s device.

    Raises:
        RuntimeError: the backend was asked for by name and lacks the operator, or does not run on that device.
    """
    key = (op, _active, tensor.device.type)
    if key not in _kernels:
        _kernels[key] = _best(op, key[2]) if _active == "auto" else _named(op, *key[1:])
    return _kernels[key]


def fused(op: str, tensor: torch.Tensor) -> Callable | None:
    """As `kernel`, but None where the backend in force has no `op` of its own, and the caller composes it of others."""
    names = _BEST_FIRST.get(tensor.device.type, ()) if _active == "auto" else (_active,)
    return next((_lookup(op, name) for name in names if not _unavailable(name)), None)


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _unavailable(name: str) -> str | None:
    if name == "reference":
        return None
    if name == "cpu":
        return _extension_error
    if name == "cuda":
        if _extension_error:
            return _extension_error
        if not hasattr(_C, "weighted_sum_cuda"):
            return f"this build has no CUDA kernels; with a CUDA build of torch and its toolkit, {_REBUILD}"
        return None if torch.cuda.is_available() else "torch sees no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; `pip install triton`"
    if not torch.cuda.is_available() and not _interpreting():
        return "torch sees no CUDA device; set TRITON_INTERPRET=1 to interpret the kernels on the CPU"
    return None


def _lookup(op: str, name: str) -> Callable | None:
    if name in ("cpu", "cuda"):
        return getattr(_C, f"{op}_{name}", None)
    package = "reference" if name == "reference" else "kernels"
    module = f"{__package__}.{package}.{op}"
    if importlib.util.find_spec(module) is None:
        return None
    return getattr(importlib.import_module(module), op)


def _named(op: str, name: str, device: str) -> Callable:
    if reason := _unavailable(name):
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    runs_on = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cuda", "cpu") if _interpreting() else ("cuda",)}
    if device not in runs_on.get(name, (device,)):
        raise RuntimeError(f"backend {name!r} cannot run {op} on a {device} tensor; move it, or use_backend('auto')")
    function = _lookup(op, name)
    if function is None:
        raise RuntimeError(f"backend {name!r} has no {op}; use_backend('auto') falls back to the reference")
    return function


def _best(op: str, device: str) -> Callable:
    reasons = []
    for name in _BEST_FIRST.get(device, ()):
        reason = _unavailable(name)
        function = None if reason else _lookup(op, name)
        if function is not None:
            return function
        reasons.append(f"{name}: {reason or f'has no {op}'}")
    why = "; ".join(reasons) or f"there are no kernels for {device} tensors"
    if why not in _warned:
        _warned.add(why)
        warnings.warn(f"samerge_ext runs on the PyTorch reference ({why})", RuntimeWarning, stacklevel=2)
    return _named(op, "reference", device)
