"""Merged models on test texts with typing errors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import mean
from string import ascii_lowercase

from samerge_ext.demo.cells import elsewhere, run_cell
from samerge_ext.demo.data import Task
from samerge_ext.demo.experts import Evaluator
from samerge_ext.demo.report import Cell
from samerge_ext.demo.rows import transfer_rows
from samerge_ext.demo.workbench import Workbench

LEVELS = (0.05, 0.1, 0.2)  # share of characters with an error


def robustness_study(bench: Workbench, out: Path) -> Iterator[tuple[str, Cell]]:
    """The models of the main study and more, merged again: one table of means by level, and one per level by task."""
    noisy = {}
    for level in LEVELS:
        tasks = {name: with_errors(task, level) for name, task in bench.tasks.items()}
        noisy[f"errors-{level:g}"] = Evaluator(tasks, bench.heads, bench.protocol, "test", progress=bench.progress)
    for row in transfer_rows(bench.full):
        found = elsewhere(bench, row, noisy)
        accuracies = {0.0: run_cell(bench, row)["accuracies"], **dict(zip(LEVELS, found.values(), strict=True))}
        means = {f"{100 * level:g} %": mean(found.values()) for level, found in accuracies.items()}
        yield "mean accuracy over tasks by share of characters with an error, %", Cell(row.label, bench.seed, means)
        for level in LEVELS:
            title = f"accuracy with errors in {100 * level:g} % of the characters, %"
            yield title, Cell(row.label, bench.seed, accuracies[level])


def with_errors(task: Task, level: float) -> Task:
    """The task with errors in its test texts, which depend on nothing but the texts and the level."""
    return replace(task, test=replace(task.test, texts=tuple(typed(text, level) for text in task.test.texts)))


def typed(text: str, level: float) -> str:
    """A text in which every character, with probability ``level``, is left out, doubled, replaced by a letter, or comes
    after the next one."""
    random = Random(f"{level}/{text}")
    characters = list(text)
    position = 0
    written = []
    while position < len(characters):
        character = characters[position]
        position += 1
        if random.random() >= level:
            written.append(character)
            continue
        error = random.choice(("omit", "double", "replace", "swap"))
        if error == "double":
            written += [character, character]
        elif error == "replace":
            written.append(random.choice(ascii_lowercase))
        elif error == "swap":
            written += [*characters[position : position + 1], character]
            position += 1
    return "".join(written)
