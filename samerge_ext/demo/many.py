"""Merging by the number of tasks: four, eight, and all there are data for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from samerge_ext.demo.cells import as_cell, run_cell
from samerge_ext.demo.data import FULL_TASKS, MANY_TASKS, SMALL_TASKS
from samerge_ext.demo.report import Cell
from samerge_ext.demo.rows import many_rows
from samerge_ext.demo.workbench import Workbench

COUNTS = tuple(len(tasks) for tasks in (SMALL_TASKS, FULL_TASKS, MANY_TASKS))
ORDER = (*SMALL_TASKS, *(task for task in MANY_TASKS if task not in SMALL_TASKS))


def many_study(bench: Workbench, out: Path) -> Iterator[tuple[str, Cell]]:
    """A table for each number of tasks, of experts made as this variant's are, and one of the means."""
    cells = {}
    for count in COUNTS:
        tasks = ORDER[:count]
        merged = Workbench(replace(bench.protocol, tasks=tasks), bench.seed, bench.cache, bench.progress)
        for row in many_rows(bench.full):
            cells[row.label, count] = as_cell(merged, row, run_cell(merged, row))
            yield f"accuracy on {count} tasks, %", cells[row.label, count]
    for row in many_rows(bench.full):
        means = {f"{count} tasks": cells[row.label, count].mean for count in COUNTS}
        yield "mean accuracy by number of tasks, %", Cell(row.label, bench.seed, means)
