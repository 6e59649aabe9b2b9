"""One cell of a table: one way of merging, with one seed, on one variant; computed once and kept in a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import copy, deepcopy
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

import samerge_ext as sm
from samerge_ext.checkpoints.saving import atomic_write
from samerge_ext.demo.data import Task, calibration_texts, load_tasks
from samerge_ext.demo.experts import (
    Batch,
    Evaluator,
    Heads,
    Protocol,
    base_folder,
    build_heads,
    encode,
    expert_folder,
    expert_path,
    load_folder,
    text_batches,
)
from samerge_ext.demo.report import Cell
from samerge_ext.learning.config import LearningConfig
from samerge_ext.memory import PeakMemory

# Of learned rows, unless a row says otherwise.
CALIBRATION_TEXTS = 64  # per task
BATCH = {"small": 4, "full": 2}  # texts per task and step: 16 either way
STEPS = 300
SCALES = tuple(round(0.1 * k, 1) for k in range(1, 11))  # what Task Arithmetic's λ is chosen from, on tuning texts


@dataclass(frozen=True)
class Row:
    """One way of merging.

    label: as the table shows it. kind: a key of `KINDS`.
    settings: of the method's configuration, `texts` (per task) and `batch` of its calibration set, and the
        `task_vector_dtype` that a learned row packs with.
    """

    label: str
    kind: str
    settings: dict[str, Any] = field(default_factory=dict)


class Workbench:
    """Everything that the cells of one variant and seed share, made when first needed: data, heads, experts, packing.

    The seed varies the experts (order of their batches) and the calibration texts and their order.
    """

    def __init__(self, protocol: Protocol, seed: int, cache: Path, progress: bool = True):
        self.protocol, self.seed, self.cache, self.progress = protocol, seed, Path(cache), progress
        self._quantised: dict[str, sm.PackedWeights] = {}

    def at_seed(self, seed: int) -> Workbench:
        """The same at another seed, which has its own experts and shares the texts, the heads and the base."""
        other = copy(self)
        other.seed, other._quantised = seed, {}
        for name in ("experts", "packed"):
            vars(other).pop(name, None)
        return other

    @property
    def full(self) -> bool:
        return self.protocol.name == "full"

    @cached_property
    def tasks(self) -> dict[str, Task]:
        return load_tasks(self.protocol.tasks)

    @cached_property
    def heads(self) -> Heads:
        return build_heads(self.tasks, self.protocol)

    @cached_property
    def base(self) -> Path:
        return base_folder(self.protocol, self.cache)

    def expert(self, task: str) -> Path:
        """The folder of a task's expert, fine-tuned now if the cache does not have it."""
        return expert_folder(self.tasks[task], self.heads, self.protocol, self.seed, self.cache, self.progress)

    def expert_path(self, task: str) -> Path:
        """Where that folder is, or will be."""
        return expert_path(self.tasks[task], self.protocol, self.seed, self.cache)

    @cached_property
    def experts(self) -> dict[str, Path]:
        return {task: self.expert(task) for task in self.tasks}

    @cached_property
    def packed(self) -> sm.PackedWeights:
        return sm.PackedWeights.from_folders(self.base, self.experts)

    def packed_for(self, settings: dict) -> sm.PackedWeights:
        """With the `task_vector_dtype` that a row's settings name; of those that quantise, the last is kept."""
        form = settings.get("task_vector_dtype")
        if form is None:
            return self.packed
        if form not in self._quantised:
            self._quantised = {form: sm.PackedWeights.from_folders(self.base, self.experts, task_vector_dtype=form)}
        return self._quantised[form]

    @cached_property
    def test(self) -> Evaluator:
        return Evaluator(self.tasks, self.heads, self.protocol, "test", progress=self.progress)

    @cached_property
    def tuning(self) -> Evaluator:
        """Labelled texts of the training part, for choices that need labels."""
        return Evaluator(self.tasks, self.heads, self.protocol, "tuning", progress=self.progress)

    @cached_property
    def _module(self) -> nn.Module:
        return load_folder(self.base)

    def module(self) -> nn.Module:
        """A module of the encoder's architecture: the caller's own, copied from one that is loaded once."""
        return deepcopy(self._module)

    def calibration(self, texts: int, batch: int) -> dict[str, list[Batch]]:
        """Unlabelled batches per task, of texts drawn from the training split."""
        return {
            name: text_batches(calibration_texts(task, texts, self.seed), self.protocol, batch)
            for name, task in self.tasks.items()
        }

    @property
    def logits(self) -> sm.models.SharedEncoder:
        return sm.models.SharedEncoder(encode, self.heads)


def average(bench: Workbench, settings: dict) -> sm.Result:
    return sm.average(bench.packed, module=bench.module())


def task_arithmetic(bench: Workbench, settings: dict) -> sm.Result:
    """At `scale`, or at the scale that is best on the tuning texts."""
    if "scale" in settings:
        return sm.task_arithmetic(bench.packed, settings["scale"], module=bench.module())
    results = (sm.task_arithmetic(bench.packed, scale, module=bench.module()) for scale in SCALES)
    return max(results, key=lambda result: mean(accuracies_of(result, bench.tuning)))


# kind → its method and its configuration
LEARNED: dict[str, tuple[Callable[..., sm.Result], type[LearningConfig]]] = {
    "samerging": (sm.samerging, sm.SAMergingConfig),
    "adamerging": (sm.adamerging, sm.AdaMergingConfig),
    "statsmerging": (sm.statsmerging, sm.StatsMergingConfig),
}


def learned(kind: str, bench: Workbench, settings: dict) -> sm.Result:
    config, texts, batch = learned_settings(kind, bench, settings)
    calibration = bench.calibration(texts, batch)
    return LEARNED[kind][0](bench.module(), bench.packed_for(settings), calibration, bench.logits, config=config)


def learned_settings(kind: str, bench: Workbench, settings: dict) -> tuple[LearningConfig, int, int]:
    """A learned row's configuration, calibration texts per task and texts per task and step."""
    settings = {"steps": STEPS, "shuffle": True, "seed": bench.seed, "progress": bench.progress, **settings}
    texts, batch = settings.pop("texts", CALIBRATION_TEXTS), settings.pop("batch", BATCH[bench.protocol.name])
    settings.pop("task_vector_dtype", None)
    return LEARNED[kind][1](**settings), texts, batch


# How each kind of row makes its merged model; a new method is one more entry.
KINDS: dict[str, Callable[[Workbench, dict], sm.Result]] = {
    "average": average,
    "task_arithmetic": task_arithmetic,
    **{kind: partial(learned, kind) for kind in LEARNED},
}


def run_cell(bench: Workbench, row: Row, split: str = "test", save_to: Path | None = None, again: bool = False) -> dict:
    """The cell's accuracies per task, seconds and peak memory: from its file, or computed now and written to it.

    split: "test", or "tuning" where hyper-parameters are chosen.
    save_to: also keep the merged model's folder there. again: compute it even if its file is there.
    """
    path = cell_path(bench, row, split)
    if path.exists() and not again and (save_to is None or save_to.exists()):
        return json.loads(path.read_text())
    evaluator = getattr(bench, split)
    cell = {"label": row.label, "kind": row.kind, "settings": row.settings, "variant": bench.protocol.name, "seed": bench.seed}
    if row.kind == "pretrained":
        accuracies = evaluator.accuracies(bench.module())
    elif row.kind == "experts":
        accuracies = {task: evaluator.accuracy(load_folder(folder), task) for task, folder in bench.experts.items()}
    else:
        bench.packed_for(row.settings)  # made here, outside of what is measured
        with PeakMemory() as peak:
            started = perf_counter()
            result = KINDS[row.kind](bench, row.settings)
            seconds = perf_counter() - started
        accuracies = accuracies_of(result, evaluator)
        cell |= {"seconds": seconds, "peak_bytes": peak.rise}
        if result.coefficients is not None:  # [T, L]: whoever has the experts can merge them again
            cell["coefficients"] = result.coefficients.tolist()
        if result.history:
            losses = [record["loss"] for record in result.history]
            cell |= {"steps": len(losses), "first_loss": losses[0], "last_loss": losses[-1]}
        if save_to is not None:
            result.save_pretrained(save_to, companions=bench.base, overwrite=True)
    cell |= {"accuracies": accuracies, "mean": mean(accuracies)}
    cell["versions"] = {"samerge_ext": sm.__version__, "torch": torch.__version__}
    with atomic_write(path, "w") as file:
        file.write(json.dumps(cell, indent=1))
    return cell


def elsewhere(bench: Workbench, row: Row, evaluator: Evaluator, where: str) -> dict[str, float]:
    """Accuracies of the cell's model on other texts than its own: merged again from its coefficients, not learned again.

    where: names the evaluator's texts; the result is kept in a file of that name beside the cell's.
    """
    path = cell_path(bench, row, "test").with_suffix(f".{where}.json")
    if path.exists():
        return json.loads(path.read_text())
    if row.kind == "pretrained":
        accuracies = evaluator.accuracies(bench.module())
    elif row.kind == "experts":
        accuracies = {task: evaluator.accuracy(load_folder(bench.experts[task]), task) for task in evaluator.batches}
    else:
        cell = run_cell(bench, row)
        if "coefficients" not in cell:
            cell = run_cell(bench, row, again=True)  # it was computed before cells kept them
        merged = sm.task_arithmetic(bench.packed, torch.tensor(cell["coefficients"]), module=bench.module())
        accuracies = accuracies_of(merged, evaluator)
    with atomic_write(path, "w") as file:
        file.write(json.dumps(accuracies, indent=1))
    return accuracies


def as_cell(bench: Workbench, row: Row, found: dict) -> Cell:
    """What `run_cell` found, as a row of a table."""
    return Cell(row.label, bench.seed, found["accuracies"], found.get("seconds"), found.get("peak_bytes"))


def accuracies_of(result: sm.Result, evaluator: Evaluator) -> dict[str, float]:
    if result.module is None:
        raise ValueError(f"{result.method} was given no module to merge into")
    return evaluator.accuracies(result.module)


def mean(accuracies: dict[str, float]) -> float:
    return sum(accuracies.values()) / len(accuracies)


def cell_path(bench: Workbench, row: Row, split: str) -> Path:
    """Named after the row, with a digest of all that its numbers depend on."""
    recipe = [asdict(bench.protocol), row.kind, row.settings, split, CALIBRATION_TEXTS, BATCH[bench.protocol.name], STEPS, SCALES]
    digest = sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:10]
    return bench.cache / "cells" / bench.protocol.name / f"seed{bench.seed}" / f"{row.kind}-{split}-{digest}.json"
