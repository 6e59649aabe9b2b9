"""The studies of the demo: what their tables hold, and what is written when they are full.

Every (row, seed) is a cell with a file of its own, so a study can be stopped, continued, and extended by a row without
computing the others again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from samerge_ext.checkpoints.saving import atomic_write
from samerge_ext.demo.cells import STEPS, Row, as_cell, run_cell
from samerge_ext.demo.estimate import announcement
from samerge_ext.demo.experts import BACKBONE, FULL, SMALL
from samerge_ext.demo.guest import guest_study
from samerge_ext.demo.heterogeneous import heterogeneous_study
from samerge_ext.demo.language_study import PerplexityCell, run_language
from samerge_ext.demo.many import many_study
from samerge_ext.demo.report import Cell, accuracy_table, markdown_table, plot_accuracies, write_card
from samerge_ext.demo.robustness import robustness_study
from samerge_ext.demo.rows import (
    OURS,
    ablation_rows,
    claims_rows,
    features_rows,
    learner_rows,
    main_rows,
    methods_rows,
    quantised_rows,
    tuning_rows,
)
from samerge_ext.demo.unseen import unseen_study
from samerge_ext.demo.vision import SMALL as SMALL_VISION
from samerge_ext.demo.vision import VisionBench
from samerge_ext.demo.vision_study import vision_statistics_study, vision_study, vision_tuning_study
from samerge_ext.demo.workbench import Workbench
from samerge_ext.ops.layer_stats import layer_stats
from samerge_ext.reports.plots import plot_coefficients, plot_singular_values

SPECTRUM = 8  # singular values per layer in the plot of the task vectors' spectra

# A study yields, for one seed, the rows of its tables: (the table's title, a row's result).
Study = Callable[[Any, Path], Iterator[tuple[str, Cell]]]


# Studies whose rows are known beforehand, and the split on which they are judged where it is not the test texts.
ROWS: dict[str, Callable[[bool], list[Row]]] = {
    "main": main_rows,
    "methods": methods_rows,
    "claims": claims_rows,
    "tuning": tuning_rows,
    "ablation": ablation_rows,
    "features": features_rows,
    "learner": learner_rows,
    "quantised": quantised_rows,
}
SPLITS = {"tuning": "tuning"}


def of_rows(name: str) -> Study:
    """One table, of rows that are merged and judged on one split."""
    split = SPLITS.get(name, "test")

    def study(bench: Workbench, out: Path) -> Iterator[tuple[str, Cell]]:
        for row in ROWS[name](bench.full):
            yield f"accuracy on {split} texts, %", as_cell(bench, row, run_cell(bench, row, split))

    return study


def main_study(bench: Workbench, out: Path) -> Iterator[tuple[str, Cell]]:
    """Every method; the first seed's model of our method is kept in ``out/merged``."""
    for row in main_rows(bench.full):
        save_to = out / "merged" if row.label == OURS and bench.seed == 0 else None
        yield "accuracy on test texts, %", as_cell(bench, row, run_cell(bench, row, save_to=save_to))


def quantised_study(bench: Workbench, out: Path) -> Iterator[tuple[str, Cell]]:
    """SAMerging with task vectors in fewer bits; a row's name says what they take, and its seconds are those of all steps."""
    for row in quantised_rows(bench.full):
        cell = as_cell(bench, row, run_cell(bench, row))
        label = f"{row.label}, {bench.packed_for(row.settings).task_vectors.nbytes / 2**20:.1f} MiB"
        yield f"accuracy on test texts, %, and seconds of {STEPS} steps", replace(cell, method=label)


STUDIES: dict[str, Study] = {
    "main": main_study,
    **{name: of_rows(name) for name in ("methods", "claims", "tuning", "ablation", "features", "learner")},
    "quantised": quantised_study,
    "many": many_study,
    "guest": guest_study,
    "unseen": unseen_study,
    "robustness": robustness_study,
    "heterogeneous": heterogeneous_study,
    "vision": vision_study,
    "vision-tuning": vision_tuning_study,
    "vision-statistics": vision_statistics_study,
}
OF_PICTURES = ("vision", "vision-tuning", "vision-statistics")


def run_study(
    name: str, *, full: bool, seeds: int, out: Path, cache: Path, progress: bool, console: Console
) -> list[Cell] | list[PerplexityCell]:
    """Fills a study's cells, prints its tables and writes them, with plots and the merged model for "main", under ``out``.

    Raises ValueError for an unknown study; MissingData, before any work, where a data package is not installed.
    """
    if name == "language":
        if full:
            raise ValueError("the language study has one variant; leave out --full")
        _quiet_transformers()
        return run_language(seeds=seeds, out=out, cache=cache, progress=progress, console=console)
    if name not in STUDIES:
        raise ValueError(f"there is no study {name!r}; choose one of {', '.join((*STUDIES, 'language'))}")
    first: Any  # what its study takes
    if name in OF_PICTURES:
        if full:
            raise ValueError("the vision study has one variant; leave out --full")
        first = VisionBench(SMALL_VISION, 0, cache, progress)
    else:
        _quiet_transformers()
        first = Workbench(FULL if full else SMALL, 0, cache, progress)
    protocol, samples = first.protocol, "pictures" if name in OF_PICTURES else "texts"
    console.print(f"{name}, {protocol.name} variant: {len(protocol.tasks)} tasks; reading {samples} and encoder")
    out.mkdir(parents=True, exist_ok=True)
    tables: dict[str, list[Cell]] = {}
    if name in ROWS:
        console.print(announcement(first, seeds, ROWS[name](full), SPLITS.get(name, "test")))
    for seed in range(seeds):
        bench = first.at_seed(seed) if seed else first
        for task in bench.tasks:
            bench.expert(task)
            console.print(f"seed {seed}: expert '{task}': ready")
        for title, cell in STUDIES[name](bench, out):
            tables.setdefault(title, []).append(cell)
            console.print(f"seed {seed}: {cell.method}: {100 * cell.mean:.1f} %")
    texts = []
    for table, cells in tables.items():
        title = f"{name}, {protocol.name} variant, {seeds} seed{'s' * (seeds > 1)}: {table}"
        console.print(accuracy_table(cells, title), crop=False)
        texts.append(f"{title}\n\n{markdown_table(cells)}")
    with atomic_write(out / f"{name}-{protocol.name}.md", "w") as file:
        file.write("\n".join(texts))
    cells = [cell for table in tables.values() for cell in table]
    if name == "main":
        _complete_model_folder(out, first, cells)
        console.print(f"merged model, heads, λ, card and plots: {out / 'merged'}")
    return cells


def _complete_model_folder(out: Path, bench: Workbench, cells: list[Cell]) -> None:
    """Adds heads, plots and the model card to the folder of the merged model, and reads it back."""
    from safetensors.torch import save_file

    folder = out / "merged"
    summary = json.loads((folder / "coefficients.json").read_text())
    tasks = list(summary["coefficients"])
    layers = list(summary["coefficients"][tasks[0]])
    coefficients = torch.tensor([[summary["coefficients"][task][layer] for layer in layers] for task in tasks])
    (folder / "heads").mkdir(exist_ok=True)
    for task, prototypes in bench.heads.prototypes.items():
        save_file({"prototypes": prototypes.contiguous()}, folder / "heads" / f"{task}.safetensors")
    plot_coefficients(coefficients, tasks, layers, folder / "coefficients.png")
    statistics = layer_stats(bench.packed, top_k=SPECTRUM, of="task_vectors")
    plot_singular_values(statistics, tasks, layers, folder / "singular_values.png")
    plot_accuracies(cells, folder / "accuracies.png")
    write_card(
        folder / "README.md",
        base=BACKBONE,
        method=OURS,
        config={**summary["config"], "steps": summary["steps"], "experts": asdict(bench.protocol)},
        descriptions={name: task.descriptions for name, task in bench.tasks.items()},
        cells=cells,
        images=["accuracies.png", "coefficients.png", "singular_values.png"],
    )


def _quiet_transformers() -> None:
    """The demo's own lines tell what happens; a progress bar per loaded folder would bury them."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
