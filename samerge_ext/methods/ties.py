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
from samerge_ext.elementwise.sparsified import Sparsified
from samerge_ext.merged.result import Result
from samerge_ext.packing.packed_weights import PackedWeights

Scope = Literal["tensor", "vector"]


class Ties(Sparsified, WholeRule):
    """TIES over one vector of ``numel`` numbers in all: a `piecewise.Rule`.

    densities: one per task. combination: what follows trimming. rescale: of one tensor's numbers alone.
    """

    def __init__(
        self, numel: int, dtype: torch.dtype, densities: Sequence[float], combination: Combination, rescale: bool = False
    ):
        self.largest = LargestMagnitudes([kept_count(density, numel) for density in densities], numel, dtype)
        self.unseen = [task for task, density in enumerate(densities) if not kept_count(density, numel)]
        super().__init__(combination, rescale, self.largest.rounds)

    def choose(self, piece: Piece) -> None:
        self.largest.look(piece.rows())

    def next_choice(self) -> None:
        self.largest.next_round()

    def drop(self, out: Tensor, numbers: Tensor, start: int) -> None:
        if self.rescale and start == 0:  # as a vector of many tensors, each of which starts at 0, nothing is seen again
            self.largest.begin()
        self.largest.trim(out, numbers)

    def skip(self, piece: Piece) -> None:
        self.largest.trim(piece.room[:, : piece.size], piece.rows())

    def state(self) -> list[list[int]]:
        """What decides over the numbers to come, once the rounds are over: every task's key and ties, ready for JSON."""
        return torch.stack([self.largest.keys, self.largest.ties], 1).tolist()

    def restore(self, state: Sequence[Sequence[int]]) -> None:
        for target, values in zip((self.largest.keys, self.largest.ties), torch.tensor(state).unbind(1), strict=True):
            target.copy_(values)


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
    merged = merge_packed(packed, lambda name, shape: Ties(shape.numel(), dtype, densities, combination), whole=trim == "vector")
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
    layers = [
        slice(offset, offset + shape.numel())
        for offset, shape in zip(packed.layout.offsets, packed.layout.shapes, strict=True)
        if offset is not None
    ]
    total = sum(shape.numel() for shape in packed.layout.shapes)
    for group in [layers] if trim == "vector" else [[layer] for layer in layers]:
        numel = total if trim == "vector" else group[0].stop - group[0].start
        counts = [kept_count(density, numel) for density in densities]
        largest = LargestMagnitudes(counts, numel, stored.dtype)
        for _ in range(largest.rounds):
            for layer in group:
                largest.look(stored[:, layer])
            largest.next_round()
        for layer in group:
            largest.trim(task_vectors[:, layer], stored[:, layer])
    return replace(packed, task_vectors=task_vectors)


def _check_scope(trim: str) -> None:
    if trim not in ("tensor", "vector"):
        raise ValueError(f"trim={trim!r}; choose 'tensor' or 'vector'")
