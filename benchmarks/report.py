"""What a run leaves: a record per candidate and case, the JSON that holds them, tables of them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
from datetime import date
from pathlib import Path
from statistics import median, quantiles

import torch
from ceiling import Yardstick

Record = dict[str, str | float | None]


def record(
    operator: str,
    case: str,
    candidate: str,
    seconds: dict[str, list[float]],
    yardstick: Yardstick,
    work: float,
    operations: int | None,
    peak_bytes: int,
    error: float,
) -> Record:
    """One line of the results. seconds: turn by turn, of the candidate, the "yardstick" and, beside others, "ours"."""
    own = seconds[candidate]
    q20, *_, q80 = quantiles(own, n=5)
    share = [(work / mine) / (yardstick.work / best) for mine, best in zip(own, seconds["yardstick"], strict=True)]
    against = [mine / our for mine, our in zip(own, seconds.get("ours", own), strict=True)]
    moves_bytes = operations is not None
    return {
        "operator": operator,
        "case": case,
        "candidate": candidate,
        "median_s": median(own),
        "q20_s": q20,
        "q80_s": q80,
        "rounds": len(own),
        "bytes": work if moves_bytes else None,
        "operations": operations,
        "GB_per_s": work / median(own) / 1e9 if moves_bytes else None,
        "share": median(share),  # of the ceiling; of the bare passes, for a SAM step
        "yardstick": yardstick.name,
        "yardstick_GB_per_s": yardstick.work / median(seconds["yardstick"]) / 1e9 if moves_bytes else None,
        "times_ours": median(against),
        "peak_bytes": peak_bytes,  # beyond the inputs
        "error": error,
    }


class Results:
    """The records so far, and the file that always holds them all: a run that is cut short keeps what it measured."""

    def __init__(self, environment: dict, folder: Path | None):
        self.environment, self.records = environment, []
        name = re.sub(r"\W+", "-", environment["device"]).strip("-").lower()
        self.path = folder and folder / f"{name}-{date.today():%Y-%m-%d}.json"

    def add(self, row: Record) -> None:
        self.records.append(row)
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = ",\n".join(json.dumps([_rounded(value) for value in r.values()], separators=(",", ":")) for r in self.records)
        head = json.dumps({"environment": self.environment, "columns": list(row)}, indent=1)[:-2]
        partial = self.path.with_suffix(".partial")
        partial.write_text(f'{head},\n "rows": [\n{rows}\n]}}\n')
        partial.replace(self.path)


def read(path: Path) -> tuple[dict, list[Record]]:
    """The environment and the records of a results file."""
    held = json.loads(Path(path).read_text())
    return held["environment"], [dict(zip(held["columns"], row, strict=True)) for row in held["rows"]]


def is_ours(row: Record) -> bool:
    return row["candidate"].startswith("samerge")


def environment(device: str) -> dict[str, str | int]:
    """Machine, versions and commit, as every results file states them."""
    root = Path(__file__).parent.parent
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    about = {
        "device": torch.cuda.get_device_name().removeprefix("NVIDIA ") if device == "cuda" else f"CPU {_processor()}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit or os.environ.get("COMMIT", "unknown"),  # COMMIT: where the sources lie without their repository
        "date": f"{date.today():%Y-%m-%d}",
    }
    if device == "cpu":
        return about
    modules = {"triton": "triton", "liger-kernel": "liger_kernel"}
    versions = {p: importlib.metadata.version(p) if importlib.util.find_spec(m) else "not installed" for p, m in modules.items()}
    return {**about, "cuda": torch.version.cuda, **versions}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _rounded(value: str | float | None) -> str | float | None:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def summary(results: Results) -> str:
    """Everything that was measured, operator by operator, and last one line per case."""
    if not results.records:
        return ""
    about = results.environment
    lines = [
        "",
        f"{about['device']}, torch {about['torch']}, commit {about['commit']}",
        f"a large copy moves {about['copy_bytes_per_s'] / 1e9:.3g} GB/s, a product of fp32 matrices does "
        f"{about['matmul_fp32_per_s'] / 1e9:.3g} GFLOP/s",
    ]
    groups: dict[str, list[Record]] = {}
    for row in results.records:
        groups.setdefault(row["operator"], []).append(row)
    for operator, rows in groups.items():
        lines += ["", operator, table([_line(row) for row in rows])]
    glances = [_glance(operator, rows) for operator, rows in groups.items()]
    lines += ["", "ours, and how many times as long the others take", table([line for lines in glances for line in lines])]
    lines += [f"written to {results.path}"] if results.path else []
    return "\n".join(lines) + "\n"


def _line(row: Record) -> dict[str, str]:
    return {
        "case": row["case"],
        "candidate": row["candidate"],
        "ms": _number(row["median_s"], 1e3),
        "20 %": _number(row["q20_s"], 1e3),
        "80 %": _number(row["q80_s"], 1e3),
        "GB/s": _number(row["GB_per_s"]),
        "share": f"{row['share']:.2f}",
        "of": f"{row['yardstick']} {_number(row['yardstick_GB_per_s'])}".removesuffix(" –"),
        "× ours": f"{row['times_ours']:.2f}",
        "peak MB": _number(row["peak_bytes"], 1e-6),
        "turns": str(row["rounds"]),
    }


def _glance(operator: str, rows: list[Record]) -> list[dict[str, str]]:
    cases: dict[str, list[Record]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    return [
        {
            "operator": operator,
            "case": case,
            "ms": _number(first["median_s"], 1e3),
            "share": f"{first['share']:.2f}",
            "the others": "; ".join(f"{row['candidate']} {row['times_ours']:.2f}" for row in held if row is not first),
        }
        for case, held in cases.items()
        for first in held[:1]
        if is_ours(first)
    ]


def _number(value: float | None, scale: float = 1) -> str:
    """Three significant digits."""
    if value is None:
        return "–"
    value *= scale
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(rows: list[dict[str, str]]) -> str:
    """Rows of the same keys in columns, those of numbers to the right."""
    if not rows:
        return ""
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    of_numbers = [all(re.fullmatch(r"[-\d.e+]+|–|nan", line[i]) for line in cells[1:]) for i in range(len(widths))]
    align = [str.rjust if numbers else str.ljust for numbers in of_numbers]
    return "\n".join("  ".join(f(c, w) for f, c, w in zip(align, line, widths, strict=True)).rstrip() for line in cells)
