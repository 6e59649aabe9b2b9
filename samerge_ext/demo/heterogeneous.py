"""Experts of another architecture: two tasks have a convolutional classifier, distilled into the encoder and then merged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import samerge_ext as sm
from samerge_ext.demo.cells import as_cell, run_cell
from samerge_ext.demo.convolution import Convolution, TextConvolution, accuracy, cached, hashed
from samerge_ext.demo.experts import encode, load_backbone, save_folder, text_batches
from samerge_ext.demo.report import Cell
from samerge_ext.demo.rows import main_rows
from samerge_ext.demo.workbench import Workbench

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedModel

FOREIGN = ("r8", "election")  # the tasks whose experts are convolutions
CONVOLUTION = Convolution()
DISTILLATION_STEPS = 3  # for each of the protocol's steps of fine-tuning


class Heterogeneous(Workbench):
    """The workbench whose experts of two tasks are distilled from convolutions, on the task's training texts without labels."""

    def __init__(self, bench: Workbench):
        self.own = bench
        self.foreign = tuple(task for task in FOREIGN if task in bench.protocol.tasks)
        recipe = [self.foreign, asdict(CONVOLUTION), asdict(self.distillation(bench)), bench.protocol.batch]
        self.digest = sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
        # Cells of other experts: kept apart from those of the ordinary ones.
        super().__init__(bench.protocol, bench.seed, bench.cache / f"heterogeneous-{self.digest}", bench.progress)

    @staticmethod
    def distillation(bench: Workbench) -> sm.DistillationConfig:
        steps = DISTILLATION_STEPS * bench.protocol.steps
        return sm.DistillationConfig(steps=steps, learning_rate=bench.protocol.learning_rate, seed=bench.seed, progress=False)

    @property
    def base(self) -> Path:
        return self.own.base

    def teacher(self, task: str) -> TextConvolution:
        folder = self.own.cache / "experts" / self.protocol.name
        return cached(self.tasks[task], CONVOLUTION, self.seed, folder)

    def expert(self, task: str) -> Path:
        """The ordinary expert, or the folder of the one that is distilled from a convolution, made now if it is not there."""
        if task not in self.foreign:
            return self.own.expert(task)
        folder = self.cache / "experts" / self.protocol.name / f"{task}-seed{self.seed}"
        if not folder.exists():
            save_folder(self.distilled(task), folder)
        return folder

    def distilled(self, task: str) -> PreTrainedModel:
        student = load_backbone(self.protocol)
        student.embeddings.requires_grad_(not self.protocol.freeze_embeddings)
        texts, size = self.tasks[task].train.texts, self.protocol.batch
        words = [hashed(texts[start : start + size], CONVOLUTION) for start in range(0, len(texts), size)]
        return sm.distill_expert(
            self.teacher(task),
            student,
            list(zip(words, text_batches(texts, self.protocol, size), strict=True)),
            teacher_logits=lambda module, batch: module(batch[0]),
            student_logits=lambda module, batch: self.heads(encode(module, batch[1]), task),
            config=replace(self.distillation(self.own), progress=self.progress),
        )


def heterogeneous_study(bench: Workbench, out: Path) -> Iterator[tuple[str, Cell]]:
    """The teachers of all tasks, the experts that two of them are distilled into, and every method on the outcome."""
    mixed = Heterogeneous(bench)
    title = f"experts of {' and '.join(mixed.foreign)} distilled from convolutions: accuracy on test texts, %"
    teachers = dict(run_cell(bench, next(row for row in main_rows(bench.full) if row.kind == "experts"))["accuracies"])
    for task in mixed.foreign:
        teachers[task] = accuracy(mixed.teacher(task), bench.tasks[task].test, CONVOLUTION)
    yield title, Cell("teachers", bench.seed, teachers)
    rows = sorted(main_rows(bench.full), key=lambda row: row.kind != "experts")  # the experts first
    for row in rows:
        cell = as_cell(mixed, row, run_cell(mixed, row))
        label = "experts, two of them distilled" if row.kind == "experts" else row.label
        yield title, Cell(label, cell.seed, cell.accuracies, cell.seconds, cell.peak_bytes)
