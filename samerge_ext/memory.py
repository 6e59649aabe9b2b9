"""Memory of the machine and of this process."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from samerge_ext.backend import _C


class PeakMemory:
    """How far memory rose inside a ``with`` block, in bytes.

        with PeakMemory("cpu") as peak:
            …
        peak.rise    # bytes at the highest point, beyond those in use at the start

    On the CPU this is the process's resident memory (on Linux exactly; elsewhere only a new maximum of the whole
    process is seen); on CUDA what torch's allocator held.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.rise = 0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
        else:
            _reset_peak()
            self._start = _status("VmRSS")
        return self

    def __exit__(self, *exception: object) -> None:
        high = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _status("VmHWM")
        self.rise = max(0, high - self._start)


def _reset_peak() -> None:
    """Lets the kernel's record of the highest resident memory start anew (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def resident_bytes() -> int:
    """The process's resident memory now."""
    return _status("VmRSS")


def peak_resident_bytes() -> int:
    """The process's highest resident memory since it started, or since a `PeakMemory` did."""
    return _status("VmHWM")


def free_gpu_bytes(device: torch.device) -> int:
    """What a GPU has left for new tensors: what nobody holds, and what torch holds for tensors that are gone."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def machine_bytes() -> int:
    """The memory of this machine, or of the container where that is less."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        limit = "max"
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(installed, int(limit)) if limit != "max" else installed


@contextmanager
def large_tensors_mapped() -> Iterator[None]:
    """Inside, a CPU tensor of 1 MiB and more gets memory of its own, which is the system's again when the tensor is freed.

    malloc takes such blocks from a heap that grows with the gaps between them, and keeps that which a model's own weights leave.
    Without the C++ extension nothing changes.
    """
    before = _C.map_large_tensors(True) if _C else None
    try:
        yield
    finally:
        if _C:
            _C.map_large_tensors(before)


def trim_heap() -> None:
    """Has glibc return the memory that is free now."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None and hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _status(key: str) -> int:
    """A memory figure of this process in bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
