"""The calibration set: a few unlabelled batches per task, and the teachers' logits on them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from samerge_ext.learning.nested import to_device
from samerge_ext.learning.passes import Logits, call_logits
from samerge_ext.merged.model import MergedModel


class Calibration:
    """Batches per task, materialised once, so that cached teacher logits stay aligned with them.

    batches: task -> its batches, each whatever ``logits(module, batch, task)`` takes.
    tasks: the tasks that must be there, in the packed order.
    shuffle: visit each task's batches in a new order every epoch, drawn from ``seed``; else in the order given.
    """

    def __init__(
        self, batches: Mapping[str, Iterable[Any]], tasks: tuple[str, ...], *, shuffle: bool = False, seed: int = 0
    ):
        unknown, missing = set(batches) - set(tasks), set(tasks) - set(batches)
        if unknown or missing:
            raise ValueError(
                f"calibration has {sorted(batches)}, the packed tasks are {sorted(tasks)}: "
                + (f"add batches for {sorted(missing)}" if missing else f"remove {sorted(unknown)}")
            )
        self.batches = {task: list(batches[task]) for task in tasks}
        for task, held in self.batches.items():
            if not held:
                raise ValueError(f"the calibration set of task '{task}' is empty; give it at least one unlabelled batch")
        self.shuffle, self.seed = shuffle, seed

    @property
    def steps_per_epoch(self) -> int:
        """As many as the longest task has batches; the others' cycle."""
        return max(len(held) for held in self.batches.values())

    def at(self, step: int) -> dict[str, int]:
        """The index of every task's batch at ``step``, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return {task: self._order(row, epoch)[place % len(held)] for row, (task, held) in enumerate(self.batches.items())}

    def _order(self, row: int, epoch: int) -> list[int]:
        count = len(list(self.batches.values())[row])
        if not self.shuffle:
            return list(range(count))
        generator = torch.Generator().manual_seed(hash((self.seed, row, epoch)) % 2**63)
        return torch.randperm(count, generator=generator).tolist()


def teacher_logits(model: MergedModel, calibration: Calibration, logits: Logits, precision: str) -> dict[str, list[Tensor]]:
    """Every expert's logits [B, V] on its own task's batches, from the merged model at one-hot coefficients."""
    cached = {}
    for task, batches in calibration.batches.items():
        with model.teacher(task) as module:
            cached[task] = [
                call_logits(logits, module, to_device(batch, model.device), task, precision).detach() for batch in batches
            ]
        if cached[task][0].shape[1] == 1:
            warnings.warn(
                f"expert '{task}' has one class, whose soft-max is 1 whatever the weights; nothing is learned from its batches",
                stacklevel=3,
            )
        for index, values in enumerate(cached[task]):
            if torch.isnan(values).any():
                raise FloatingPointError(f"expert '{task}' gives NaN logits on its calibration batch {index}")
    return cached
