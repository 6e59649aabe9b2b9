"""TIES-Merging (arXiv 2306.01708): trim every task vector, elect a sign for every number, average those who agree."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from samerge_ext.elementwise.magnitudes import LargestMagnitudes, kept_count
from samerge_ext.elementwise.piecewise import Combination, Piece, WholeRule, merge_packed, per_task
from samerge_ext.merged.result import Result
from samerge_ext.packing.packed_weights import PackedWeights

Scope = Literal["tensor", "vector"]


class Ties(WholeRule):
    """TIES over one vector of ``numel`` numbers in all: a `piecewise.Rule`.

    densities, weights: one per task. combination: what follows trimming.
    """

    def __init__(self, numel: int, dtype: torch.dtype, densities: Sequence[float], combination: Combination):
        kept = [kept_count(density, numel) for density in densities]
        self.largest = [LargestMagnitudes(count, dtype) if 0 < count < numel else None for count in kept]
        self.unseen = [task for task, count in enumerate(kept) if count == 0]
        self.combination = combination
        self.rounds = max((largest.rounds for largest in self.largest if largest), default=0)

    def look(self, piece: Piece) -> None:
        for largest, row in zip(self.largest, piece.rows(), strict=True):
            if largest:
                largest.look(row)

    def next_round(self) -> None:
        for largest in self.largest:
            if largest:
                largest.next_round()

    def state(self) -> list[tuple[int, int | None] | None]:
        """What decides over the numbers to come, once the rounds are over: ready for JSON."""
        return [(largest.key, largest.ties) if largest else None for largest in self.largest]

    def restore(self, state: Sequence[tuple[int, int | None] | None]) -> None:
        for largest, found in zip(self.largest, state, strict=True):
            if largest and found:
                largest.key, largest.ties = found

    def trim_(self, piece: Piece) -> None:
        for task, (largest, row) in enumerate(zip(self.largest, piece.rows(), strict=True)):
            if largest:
                largest.trim_(row)
            elif task in self.unseen:
                row.zero_()

    def merge(self, piece: Piece) -> Tensor:  # [n]
        self.trim_(piece)
        return self.combination.merge(piece)

    @property
    def shares(self) -> list[float]:
        return self.combination.shares


def ties(
    packed: PackedWeights,
    density: float | Sequence[float] = 0.2,
    scale: float = 1.0,
    *,
    weights: float | Sequence[float] = 1.0,
    trim: Scope = "tensor",
    normalize: bool = True,
    module: nn.Module | None = None,
) -> Result:
    """θ₀ + λ · mean of the trimmed τ_t that have the elected sign, number by number.

    density: the share of a task vector that is kept, its largest magnitudes: exactly int(density · size), of equal ones the
        first. One for all or one per task.
    scale: λ.
    weights: of the tasks, in the election and in the mean; one for all or one per task.
    trim: "tensor" by tensor, as mergekit, or the whole "vector", as in the paper.
    normalize: average those who agree; without it they are summed.

    The result has no coefficients. Raises ValueError for a density outside of 0 … 1.
    """
    started = time.perf_counter()
    densities = per_task(density, packed.tasks, "density", 0.0, 1.0)
    combination = Combination(
        per_task(weights, packed.tasks, "weights", -torch.inf, torch.inf), scale, normalize=normalize, elect=True
    )
    _check_scope(trim)
    stored = packed.task_vectors
    dtype = stored.dtype if isinstance(stored, Tensor) else torch.float32  # quantised ones are read as fp32
    merged = merge_packed(
        packed, lambda name, numel: Ties(numel, dtype, densities, combination), whole=trim == "vector"
    )
    return Result.of_weights(packed, merged, "ties", module, time.perf_counter() - started)


def trimmed(packed: PackedWeights, density: float | Sequence[float] = 0.2, *, trim: Scope = "tensor") -> PackedWeights:
    """The same base with task vectors trimmed as in `ties`: AdaMerging++ is AdaMerging on these.

    Experts' logits are no longer those of one-hot coefficients: methods that distil take them from the untrimmed weights.
    Raises ValueError for quantised task vectors.
    """
    stored = packed.exact_task_vectors("trimming")
    densities = per_task(density, packed.tasks, "density", 0.0, 1.0)
    _check_scope(trim)
    task_vectors = torch.zeros_like(stored)
    rows = [packed.layout.views(row) for row in stored]
    kept = [packed.layout.views(row) for row in task_vectors]
    total = sum(shape.numel() for shape in packed.layout.shapes)
    for density, row, out in zip(densities, rows, kept, strict=True):
        for group in [list(row)] if trim == "vector" else [[name] for name in row]:
            count = kept_count(density, total if trim == "vector" else row[group[0]].numel())
            if not count:
                continue
            largest = LargestMagnitudes(count, stored.dtype)
            for _ in range(largest.rounds):
                for name in group:
                    largest.look(row[name].flatten())
                largest.next_round()
            for name in group:
                out[name].copy_(row[name])
                largest.trim_(out[name].view(-1))
    return replace(packed, task_vectors=task_vectors)


def _check_scope(trim: str) -> None:
    if trim not in ("tensor", "vector"):
        raise ValueError(f"trim={trim!r}; choose 'tensor' or 'vector'")
