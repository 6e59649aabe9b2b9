"""Peak memory of a piece of work."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

import torch

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


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

    def __exit__(self, *exception) -> None:
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


def give_back_freed_memory() -> None:
    """Has glibc return freed memory to the system: what it holds now, and from now on every block of 1 MiB and more at once.

    By itself it keeps what a program frees and allocates again, blocks of up to 32 MiB, in a heap that grows with the gaps
    between them: 0.4 GB beyond the 9.3 GB of tensors in a merge of nine models of 290 M parameters.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim"):
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 20)
        libc.malloc_trim(0)


def _status(key: str) -> int:
    """A memory figure of this process in bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
