"""Peak memory of a piece of work."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch


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


def _status(key: str) -> int:
    """A memory figure of this process in bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
