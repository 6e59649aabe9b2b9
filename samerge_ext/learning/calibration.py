"""The calibration set: a few unlabelled batches per task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from samerge_ext.learning.turns import part_of_batch
from samerge_ext.packing.ranks import ALONE, Ranks


class Calibration:
    """Batches per task, materialised once, so that cached teacher logits stay aligned with them.

    batches: task -> its batches, each whatever ``logits(module, batch, task)`` takes.
    tasks: the tasks that must be there, in the packed order.
    shuffle: visit each task's batches in a new order every epoch, drawn from ``seed``; else in the order given.
    held_back: the share of every task's batches that nothing is learned from, at least one of each where it is not 0; they lie at
        equal distances among the others.
    ranks: those that the merge is spread over. Where there are more of them than tasks, ``batches`` has this rank's parts.

    whole: the batches as they were given. counts: task -> whether each of ``batches`` counts on this rank.
    learned_from, held_back: task -> the indices of its batches of the one and the other kind.
    """

    def __init__(
        self,
        batches: Mapping[str, Iterable[Any]],
        tasks: tuple[str, ...],
        *,
        shuffle: bool = False,
        seed: int = 0,
        held_back: float = 0.0,
        ranks: Ranks = ALONE,
    ):
        unknown, missing = set(batches) - set(tasks), set(tasks) - set(batches)
        if unknown or missing:
            raise ValueError(
                f"calibration has {sorted(batches)}, the packed tasks are {sorted(tasks)}: "
                + (f"add batches for {sorted(missing)}" if missing else f"remove {sorted(unknown)}")
            )
        self.whole = {task: list(batches[task]) for task in tasks}
        for task, held in self.whole.items():
            if not held:
                raise ValueError(f"the calibration set of task '{task}' is empty; give it at least one unlabelled batch")
        parts = {
            task: [part_of_batch(batch, row, len(tasks), ranks) for batch in held]
            for row, (task, held) in enumerate(self.whole.items())
        }
        self.batches = {task: [batch for batch, _ in of_task] for task, of_task in parts.items()}
        self.counts = {task: [counts for _, counts in of_task] for task, of_task in parts.items()}
        self.shuffle, self.seed = shuffle, seed
        self.held_back = {task: _spread(len(held), held_back) for task, held in self.batches.items()}
        self.learned_from = {
            task: [index for index in range(len(held)) if index not in self.held_back[task]]
            for task, held in self.batches.items()
        }
        for task, indices in self.learned_from.items():
            if not indices:
                raise ValueError(
                    f"held_back={held_back} leaves no batch of task '{task}' to learn from, it has {len(self.batches[task])}; "
                    "give it more or smaller batches, or hold back none with held_back=0"
                )

    @property
    def steps_per_epoch(self) -> int:
        """As many as the longest task has batches to learn from; the others' cycle."""
        return max(map(len, self.learned_from.values()))

    def at(self, step: int) -> dict[str, int]:
        """The index of every task's batch at ``step``, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return {
            task: indices[self._order(row, len(indices), epoch)[place % len(indices)]]
            for row, (task, indices) in enumerate(self.learned_from.items())
        }

    def _order(self, row: int, count: int, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(count))
        generator = torch.Generator().manual_seed(hash((self.seed, row, epoch)) % 2**63)
        return torch.randperm(count, generator=generator).tolist()


def _spread(count: int, share: float) -> list[int]:
    """So many indices of ``count`` as a share asks for, at equal distances."""
    chosen = max(1, round(share * count)) if share else 0
    return [(2 * place + 1) * count // (2 * chosen) for place in range(chosen)]
