"""Two merges side by side: where their configurations, coefficients and sizes differ."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from samerge_ext.checkpoints.places import SUFFIXES
from samerge_ext.checkpoints.reading import cut
from samerge_ext.reports.heat_map import heat_map
from samerge_ext.reports.page import learning_charts, rendered, run_rows, score_rows, slice_chart
from samerge_ext.reports.report import Report, read_report, understood
from samerge_ext.sizes import show_bytes

ABSENT = "–"
SAID = ("method", "config", "recipe", "versions", "heads", "merged")  # of a report, what is compared value by value


@dataclass(frozen=True)
class Comparison:
    """folders: A and B. differences: (key, A's value, B's), of all settings that are not equal. amounts: scores, sizes, time and
    memory.
    coefficients: (task, mean λ of A, of B, mean |B − A|, the largest and its layer), over the tasks and layers of both.
    change: task -> layer -> λ of B less that of A. reports: A's and B's."""

    folders: tuple[str, str]
    differences: list[tuple[str, str, str]]
    amounts: list[tuple[str, str, str]]
    coefficients: list[list[str]]
    change: dict[str, dict[str, float]]
    reports: tuple[Report, Report]


def compared(a: str | Path, b: str | Path) -> Comparison:
    """Of two folders of merged models. Raises CheckpointError where one holds no report."""
    sides = []
    for folder in (a, b):
        report = read_report(folder)
        with understood(folder):
            scores = {f"{task}: {score.split()[0]}": score.split(maxsplit=1)[1] for task, score, _ in score_rows(report)}
            amounts = {**scores, "weights": show_bytes(_weight_bytes(Path(folder))), **dict(run_rows(report))}
            said = dict(_flat({key: getattr(report, key) for key in SAID} | {"models": _models(report)}))
        sides.append((report, said, amounts))
    (of_a, said_a, amounts_a), (of_b, said_b, amounts_b) = sides
    change = {
        task: {layer: of_b.coefficients[task][layer] - row[layer] for layer in row if layer in of_b.coefficients[task]}
        for task, row in of_a.coefficients.items()
        if task in of_b.coefficients
    }
    change = {task: row for task, row in change.items() if row}
    rows = []
    for task, row in change.items():
        furthest = max(row, key=lambda layer: abs(row[layer]))
        means = [f"{fmean(of.coefficients[task][layer] for layer in row):.4g}" for of in (of_a, of_b)]
        rows.append([task, *means, f"{fmean(map(abs, row.values())):.3g}", f"{abs(row[furthest]):.3g}", furthest])
    differences = [row for row in _beside(said_a, said_b) if row[1] != row[2]]
    return Comparison((str(a), str(b)), differences, _beside(amounts_a, amounts_b), rows, change, (of_a, of_b))


COEFFICIENTS = ["task", "mean λ of A", "mean λ of B", "mean |B − A|", "largest", "in layer"]


def as_text(comparison: Comparison) -> str:
    """In columns, for a terminal."""
    a, b = comparison.folders
    sections = [f"A: {a}\nB: {b}"]
    if comparison.differences:
        differences = [[cut(text) for text in row] for row in comparison.differences]
        sections.append(_columns([["differs", "A", "B"], *differences]))
    else:
        sections.append("Settings, models and versions are equal.")
    sections.append(_columns([["", "A", "B"], *comparison.amounts]))
    if comparison.coefficients:
        sections.append(_columns([COEFFICIENTS, *comparison.coefficients]))
    return "\n\n".join(sections)


def as_values(comparison: Comparison) -> dict[str, Any]:
    """For JSON: of A and B what differs, their amounts, and of every task what its row of coefficients says."""
    a, b = comparison.folders
    return {
        "A": a,
        "B": b,
        "differences": {key: sides for key, *sides in comparison.differences},
        "amounts": {key: sides for key, *sides in comparison.amounts},
        "coefficients": [dict(zip(COEFFICIENTS, row, strict=True)) for row in comparison.coefficients],
    }


def as_page(comparison: Comparison) -> str:
    """As HTML, beside both merges' curves."""
    named = dict(zip(comparison.folders, comparison.reports, strict=True))
    sides = []
    for folder, report in zip(comparison.folders, comparison.reports, strict=True):
        with understood(folder):
            sides.append((folder, learning_charts(report)))
    return rendered(
        "comparison.html",
        title=f"{comparison.folders[0]} and {comparison.folders[1]}",
        comparison=comparison,
        header=COEFFICIENTS,
        change=heat_map("λ of B less that of A, by task and layer", comparison.change) if _is_map(comparison.change) else None,
        sides=[side for side in sides if side[1]],
        slice=slice_chart(named),
    )


def _is_map(change: dict[str, dict[str, float]]) -> bool:
    """Whether all tasks have the same layers."""
    return len({tuple(row) for row in change.values()}) == 1


def _models(report: Report) -> dict[str, dict[str, Any]]:
    """What is compared of the models: not what time brings with it."""
    files = {of["name"]: {file["file"]: file["fingerprint"] for file in of["files"]} for of in report.models}
    return {of["name"]: {"from": of["hub"] or of["path"], **files[of["name"]]} for of in report.models}


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """key.of.a.value -> its text, of all values in mappings and lists."""
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for inner, held in items:
            yield from _flat(held, f"{key}.{inner}" if key else str(inner))
    elif value not in ({}, []):
        yield key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _beside(a: dict[str, str], b: dict[str, str]) -> list[tuple[str, str, str]]:
    return [(key, a.get(key, ABSENT), b.get(key, ABSENT)) for key in dict.fromkeys((*a, *b))]


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.suffix in SUFFIXES)


def _columns(rows: list[Any]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows)
