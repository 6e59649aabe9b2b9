"""Tasks whose experts were left out of the merge: what the merged model can do there all the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from samerge_ext.demo.cells import as_cell, elsewhere, run_cell
from samerge_ext.demo.experts import Evaluator
from samerge_ext.demo.report import Cell
from samerge_ext.demo.rows import transfer_rows
from samerge_ext.demo.workbench import Workbench

# Pairs of tasks to leave out. Each pair has one task of many classes and one of two, in both variants.
LEFT_OUT = (("r8", "tweets"), ("icd", "election"))


def unseen_study(bench: Workbench, out: Path) -> Iterator[tuple[str, Cell]]:
    """Every method on all tasks but two, twice: accuracy on the two, and on those that were merged.

    The experts of the two are the bound. What is chosen, learned or refitted is so on the merged tasks alone.
    """
    for pair in left_out(bench.protocol.tasks):
        others = tuple(task for task in bench.protocol.tasks if task not in pair)
        merged = Workbench(replace(bench.protocol, tasks=others), bench.seed, bench.cache, bench.progress)
        tasks = {task: bench.tasks[task] for task in pair}
        unseen = Evaluator(tasks, bench.heads, bench.protocol, "test", progress=bench.progress)
        names = " and ".join(pair)
        where = f"unseen-{'-'.join(pair)}"
        for row in transfer_rows(bench.full):
            found = run_cell(merged, row)
            accuracies = elsewhere(bench if row.kind == "experts" else merged, row, {where: unseen})[where]
            yield f"accuracy on {names}, whose experts were not merged, %", Cell(row.label, bench.seed, accuracies)
            yield f"accuracy on the tasks merged without {names}, %", as_cell(merged, row, found)


def left_out(tasks: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The pairs that leave at least one of the tasks to merge."""
    return [pair for pair in LEFT_OUT if set(pair) < set(tasks)]
