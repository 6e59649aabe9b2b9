"""The tables of the demo: which rows they have, and what is written when they are full.

A study is a list of rows; every (row, seed) is a cell with a file of its own, so a study can be stopped, continued, and
extended by a row without computing the others again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from samerge_ext.checkpoints import atomic_write
from samerge_ext.demo.cells import Row, Workbench, run_cell
from samerge_ext.demo.experts import BACKBONE, FULL, SMALL
from samerge_ext.demo.report import Cell, accuracy_table, markdown_table, plot_accuracies, plot_coefficients, write_card

# Chosen by `samerge demo --study tuning` on labelled training texts of the small variant, seed 0.
TUNED = {"samerging": 1e-2, "adamerging": 2e-3, "samerging, task-wise": 2e-3, "adamerging, task-wise": 2e-3}
LEARNING_RATES = (2e-3, 5e-3, 1e-2, 2e-2)
RADII = (0.0, 0.02, 0.07, 0.2, 0.5, 1.0)

OURS = "SAMerging"


def learned(label: str, kind: str, **settings) -> Row:
    """A learned row, at its method's tuned learning rate unless one is given."""
    method = f"{kind}, task-wise" if settings.get("granularity") == "task" else kind
    return Row(label, kind, {"learning_rate": TUNED[method], **settings})


def main_rows(full: bool) -> list[Row]:
    """Every method; on the full variant the main ones, since a learned row takes a quarter of an hour there."""
    task_wise = [
        learned("AdaMerging, task-wise", "adamerging", granularity="task"),
        learned("SAMerging, task-wise", "samerging", granularity="task"),
    ]
    return [
        Row("pretrained", "pretrained"),
        Row("average", "average"),
        Row("Task Arithmetic, λ = 0.3", "task_arithmetic", {"scale": 0.3}),
        Row("Task Arithmetic, best λ", "task_arithmetic"),
        *([] if full else task_wise),
        learned("AdaMerging", "adamerging"),
        learned(OURS, "samerging"),
        Row("experts", "experts"),
    ]


def claims_rows(full: bool) -> list[Row]:
    """Claims of the paper: few samples, a start from the pretrained model and, on the small variant, what SAM adds.

    On the full variant AdaMerging gets a second learning rate, since both were tuned on the small one.
    """
    rows = [
        learned(OURS, "samerging"),
        learned("SAMerging, 16 texts", "samerging", texts=16),
        learned("SAMerging, from λ = 0", "samerging", initial_coefficient=0.0),
    ]
    if full:
        return [*rows, learned("AdaMerging, learning rate 0.005", "adamerging", learning_rate=5e-3)]
    return [*rows, learned("SAMerging, no SAM", "samerging", sam="off")]


def tuning_rows(full: bool) -> list[Row]:
    methods = {
        "SAMerging": ("samerging", {}),
        "AdaMerging": ("adamerging", {}),
        "SAMerging, task-wise": ("samerging", {"granularity": "task"}),
        "AdaMerging, task-wise": ("adamerging", {"granularity": "task"}),
    }
    return [
        learned(f"{label}, learning rate {rate:g}", kind, learning_rate=rate, **settings)
        for label, (kind, settings) in methods.items()
        for rate in LEARNING_RATES
    ]


def ablation_rows(full: bool) -> list[Row]:
    """What SAM adds: its radius and kind, at two sizes of the calibration set."""
    rows = []
    for texts in (16, 64):
        for sam in ("off", "published"):
            rows.append(learned(f"{texts} texts, sam = {sam}", "samerging", texts=texts, sam=sam))
        for adaptive in (False, True):
            for rho in RADII:
                label = f"{texts} texts, {'adaptive' if adaptive else 'plain'}, ρ = {rho:g}"
                rows.append(learned(label, "samerging", texts=texts, sam="paper", rho=rho, adaptive=adaptive))
    return rows


# name -> (rows of the small or the full variant, the split that cells are judged on)
STUDIES: dict[str, tuple[Callable[[bool], list[Row]], str]] = {
    "main": (main_rows, "test"),
    "claims": (claims_rows, "test"),
    "tuning": (tuning_rows, "tuning"),
    "ablation": (ablation_rows, "test"),
}


def run_study(
    name: str, *, full: bool, seeds: int, out: Path, cache: Path, progress: bool, console: Console
) -> list[Cell]:
    """Fills a study's cells, prints its table and writes it, with plots and the merged model for "main", under ``out``.

    Raises ValueError for an unknown study; MissingData, before any work, where a data package is not installed.
    """
    if name not in STUDIES:
        raise ValueError(f"there is no study {name!r}; choose one of {', '.join(STUDIES)}")
    _quiet_transformers()
    make_rows, split = STUDIES[name]
    protocol = FULL if full else SMALL
    out.mkdir(parents=True, exist_ok=True)
    cells = []
    for seed in range(seeds):
        bench = Workbench(protocol, seed, cache, progress)
        for task in bench.tasks:
            console.print(f"seed {seed}: expert '{task}'", end=" … ")
            bench.expert(task)
            console.print("ready")
        for row in make_rows(full):
            keeps_model = name == "main" and row.label == OURS and seed == 0
            found = run_cell(bench, row, split, save_to=out / "merged" if keeps_model else None)
            cells.append(Cell(row.label, seed, found["accuracies"], found.get("seconds"), found.get("peak_bytes")))
            console.print(f"seed {seed}: {row.label}: {100 * cells[-1].mean:.1f} %")
        if name == "main" and seed == 0:
            first = bench
    title = f"{name}, {protocol.name} variant, {seeds} seed{'s' * (seeds > 1)}: accuracy on {split} texts, %"
    console.print(accuracy_table(cells, title), crop=False)
    with atomic_write(out / f"{name}-{protocol.name}.md", "w") as file:
        file.write(f"{title}\n\n{markdown_table(cells)}")
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
    plot_accuracies(cells, folder / "accuracies.png")
    write_card(
        folder / "README.md",
        base=BACKBONE,
        method=OURS,
        config={**summary["config"], "steps": summary["steps"], "experts": asdict(bench.protocol)},
        descriptions={name: task.descriptions for name, task in bench.tasks.items()},
        cells=cells,
        images=["accuracies.png", "coefficients.png"],
    )


def _quiet_transformers() -> None:
    """The demo's own lines tell what happens; a progress bar per loaded folder would bury them."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
