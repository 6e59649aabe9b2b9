"""Language models merged by every method: perplexity by kind of text, of the base, each expert and each merge.

    samerge demo --study language

What a row chooses (λ) or learns comes from the calibration texts alone; no held-out text is seen before the end.
SLERP is left out, since it merges two models. Every (row, seed) is a cell with a file of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any

from rich.console import Console

import samerge_ext as sm
from samerge_ext.checkpoints.saving import atomic_write
from samerge_ext.demo.cells import Row
from samerge_ext.demo.language import SMALL, LanguageBench, mean_perplexity, perplexities
from samerge_ext.demo.report import markdown, rich_table, spread

STEPS, BATCH, LEARNING_RATE = 20, 2, 5e-2  # of learned rows: few and long, as in the small variant's other tables
SCALES = (0.2, 0.3, 0.5, 0.7, 1.0)  # λ of Task Arithmetic
OTHER_SCALES = (0.5, 1.0, 2.0)  # λ of methods that make a task vector of their own
OWN = "experts, each on its own kind"

# Methods that take the adapters' factors as they are.
FACTORED = (sm.wudi, sm.tsv_m, sm.iso_c)
DENSE = (sm.task_arithmetic, sm.ties, sm.dare)
METHODS: dict[str, Callable[..., sm.Result]] = {method.__name__: method for method in (*DENSE, *FACTORED)}


@dataclass(frozen=True)
class PerplexityCell:
    """One method at one seed. seconds: what the method took, without the evaluation; None where nothing was merged."""

    method: str
    seed: int
    perplexities: dict[str, float]
    seconds: float | None = None

    @property
    def mean(self) -> float:
        return mean_perplexity(self.perplexities)


def rows_of(kinds: tuple[str, ...]) -> list[Row]:
    learned = {"steps": STEPS, "batch": BATCH, "learning_rate": LEARNING_RATE}
    return [
        Row("pretrained", "pretrained"),
        *(Row(f"expert '{kind}'", "expert", {"kind": kind}) for kind in kinds),
        Row("average", "average"),
        Row("Task Arithmetic, λ = 0.3", "task_arithmetic", {"scale": 0.3}),
        Row("Task Arithmetic, best λ", "task_arithmetic", {"scales": SCALES}),
        Row("TIES, best λ", "ties", {"scales": OTHER_SCALES}),
        Row("DARE, λ = 0.3", "dare", {"scale": 0.3}),
        Row("WUDI", "wudi"),
        Row("TSV-M, best λ", "tsv_m", {"scales": OTHER_SCALES}),
        Row("Iso-C, best λ", "iso_c", {"scales": OTHER_SCALES}),
        Row("SAMerging, no SAM", "samerging", {**learned, "sam": "off"}),
        Row("SAMerging, no SAM, teachers' 8 most likely tokens", "samerging", {**learned, "sam": "off", "teacher_top_k": 8}),
        Row("SAMerging, no SAM, teachers' 64 most likely tokens", "samerging", {**learned, "sam": "off", "teacher_top_k": 64}),
        Row("SAMerging, no SAM, reverse KL", "samerging", {**learned, "sam": "off", "beta": 1.0}),
        Row("SAMerging", "samerging", {**learned, "sam": "paper"}),
    ]


def run_language(*, seeds: int, out: Path, cache: Path, progress: bool, console: Console) -> list[PerplexityCell]:
    """Fills the cells, prints the table and writes it to ``out``.

    Raises MissingData or ModuleNotFoundError, before any work, where a package is not installed.
    """
    console.print("language: reading texts and model")
    cells = []
    for seed in range(seeds):
        bench = LanguageBench(SMALL, seed, cache, progress)
        for kind in bench.tasks:
            bench.expert(kind)
            console.print(f"seed {seed}: expert '{kind}': ready")
        for cell in of_seed(bench):
            console.print(f"seed {seed}: {cell.method}: {cell.mean:.2f}")
            cells.append(cell)
    title = f"language, {SMALL.name} variant, {seeds} seed{'s' * (seeds > 1)}: perplexity on held-out texts"
    header, rows = table_rows(cells)
    console.print(rich_table(header, rows, title), crop=False)
    with atomic_write(out / f"language-{SMALL.name}.md", "w") as file:
        file.write(f"{title}\n\n{markdown(header, rows)}")
    return cells


def of_seed(bench: LanguageBench) -> Iterator[PerplexityCell]:
    """The cells of all rows, and after the experts' what each of these has on its own kind."""
    own: dict[str, float] = {}
    for row in rows_of(bench.protocol.kinds):
        cell = run_cell(bench, row)
        yield cell
        if row.kind == "expert":
            own[row.settings["kind"]] = cell.perplexities[row.settings["kind"]]
            if len(own) == len(bench.protocol.kinds):
                yield PerplexityCell(OWN, bench.seed, own)


def run_cell(bench: LanguageBench, row: Row) -> PerplexityCell:
    """A cell from its file, or computed now and written to it."""
    path = cell_path(bench, row)
    if path.exists():
        found = json.loads(path.read_text())
        return PerplexityCell(row.label, bench.seed, found["perplexities"], found.get("seconds"))
    started = perf_counter()
    module, told = merged(bench, row)
    if row.kind not in ("pretrained", "expert"):
        told["seconds"] = perf_counter() - started
    found = {"label": row.label, "settings": row.settings, **told, "perplexities": perplexities(module, bench.test)}
    with atomic_write(path, "w") as file:
        file.write(json.dumps(found, indent=1))
    return PerplexityCell(row.label, bench.seed, found["perplexities"], found.get("seconds"))


def merged(bench: LanguageBench, row: Row) -> tuple[Any, dict[str, Any]]:
    """A row's model, and what is to be known of how it came about."""
    if row.kind == "pretrained":
        return bench.module(), {}
    if row.kind == "expert":
        packed = sm.PackedWeights.from_folders(bench.base, {row.settings["kind"]: bench.expert(row.settings["kind"])})
        return sm.task_arithmetic(packed, 1.0, module=bench.module()).module, {}
    if row.kind == "average":
        return sm.average(bench.packed(), module=bench.module()).module, {}
    if row.kind == "samerging":
        return learned(bench, row)
    method = METHODS[row.kind]
    packed = bench.packed("lora" if method in FACTORED else None)
    if "scales" not in row.settings:
        return method(packed, **row.settings, module=bench.module()).module, {}
    tried = {}
    for scale in row.settings["scales"]:
        module: Any = method(packed, scale=scale, module=bench.module()).module
        tried[scale] = mean_perplexity(perplexities(module, bench.chosen_by))
    best = min(tried, key=lambda scale: tried[scale])
    return method(packed, scale=best, module=bench.module()).module, {"tried": tried, "scale": best}


def learned(bench: LanguageBench, row: Row) -> tuple[Any, dict[str, Any]]:
    settings = {key: value for key, value in row.settings.items() if key != "batch"}
    config = sm.SAMergingConfig(shuffle=True, seed=bench.seed, progress=bench.progress, **settings)
    calibration = bench.calibration(row.settings["batch"])
    packed = bench.packed()
    result = sm.samerging(bench.module(), packed, calibration, sm.models.causal_lm, config=config)
    assert result.coefficients is not None
    lambdas = {task: mean(values) for task, values in zip(packed.tasks, result.coefficients.tolist(), strict=True)}
    return result.module, {"mean_coefficients": lambdas, "losses": [record["loss"] for record in result.history]}


def cell_path(bench: LanguageBench, row: Row) -> Path:
    """Named after the row, with a digest of all that its numbers depend on."""
    recipe = [asdict(bench.protocol), row.kind, row.settings]
    digest = sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:10]
    return bench.cache / "cells" / f"seed{bench.seed}" / f"{row.kind}-{digest}.json"


def table_rows(cells: list[PerplexityCell]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of text: method, perplexity by kind, their geometric mean, seconds."""
    kinds = list(cells[0].perplexities)
    by_method: dict[str, list[PerplexityCell]] = {}
    for cell in cells:
        by_method.setdefault(cell.method, []).append(cell)
    rows = [
        [
            method,
            *(spread([cell.perplexities[kind] for cell in held]) for kind in kinds),
            spread([cell.mean for cell in held], decimals=2),
            spread([cell.seconds for cell in held]),
        ]
        for method, held in by_method.items()
    ]
    return ["method", *kinds, "mean", "seconds"], rows
