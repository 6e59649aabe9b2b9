"""What the benchmarks share: timing by turns, the environment a number belongs to, tables."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch


def interleaved(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds per call of every candidate: median and 20/80 % quantiles over `rounds`, after one call to warm up.

    Each round calls every candidate once, so that whatever else runs on the machine meets all of them alike.
    """
    for call in candidates.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            started = perf_counter()
            call()
            seconds[name].append(perf_counter() - started)
    return {name: _quantiles(values) for name, values in seconds.items()}


def _quantiles(values: list[float]) -> dict[str, float]:
    low, median, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    return {"median_s": median.item(), "q20_s": low.item(), "q80_s": high.item()}


def environment() -> dict[str, str | int]:
    """Machine, versions and commit, as every results file states them."""
    root = Path(__file__).parent.parent
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit or "unknown",
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def print_table(title: str, rows: list[dict]) -> None:
    """Rows of the same keys, numbers with three significant digits."""
    cells = [[key.replace("_", " ") for key in rows[0]]]
    cells += [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    print(f"\n{title}")
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
