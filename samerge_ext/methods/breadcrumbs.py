"""Model Breadcrumbs (arXiv 2312.06795): keep the numbers of a task vector that are neither its largest nor its smallest.

    θ = θ₀ + λ Σ_t w_t m_t ∘ τ_t,   m_t: by magnitude, after the γ_t n largest of τ_t's n numbers the next d_t n

tensor by tensor. As mergekit has it, fewer of the largest are dropped where γ n + d n is more than n, and d = 1 keeps all. Of
equal magnitudes the first count as the larger ones.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from samerge_ext.elementwise.magnitudes import LargestMagnitudes
from samerge_ext.elementwise.piecewise import Combination, Piece, combination_of, merge_packed, per_task
from samerge_ext.elementwise.sparsified import Sparsified
from samerge_ext.merged.result import Result
from samerge_ext.packing.packed_weights import PackedWeights

GAMMA = 0.01


class Breadcrumbs(Sparsified):
    """Breadcrumbs of a tensor of ``numel`` numbers: a `piecewise.Rule`. densities: d, gammas: γ, one per task."""

    def __init__(
        self,
        numel: int,
        dtype: torch.dtype,
        densities: Sequence[float],
        gammas: Sequence[float],
        combination: Combination,
        rescale: bool = False,
    ):
        kept = [numel if density >= 1 else int(density * numel) for density in densities]
        outliers = [min(int(gamma * numel), numel - count) for gamma, count in zip(gammas, kept, strict=True)]
        self.upper = LargestMagnitudes([o + k for o, k in zip(outliers, kept, strict=True)], numel, dtype)
        self.outliers = LargestMagnitudes(outliers, numel, dtype)
        self.unseen = [task for task, count in enumerate(kept) if count < numel]
        super().__init__(combination, rescale, max(self.upper.rounds, self.outliers.rounds))

    def choose(self, piece: Piece) -> None:
        for largest in (self.upper, self.outliers):
            if largest.rounds:
                largest.look(piece.rows())

    def next_choice(self) -> None:
        for largest in (self.upper, self.outliers):
            if largest.rounds:
                largest.next_round()

    def drop(self, out: Tensor, numbers: Tensor, start: int) -> None:
        if start == 0:  # from here on ties are counted
            self.upper.begin()
            self.outliers.begin()
        outliers = torch.empty_like(numbers)
        self.outliers.trim(outliers, numbers)
        self.upper.trim(out, numbers)
        out.sub_(outliers)


def breadcrumbs(
    packed: PackedWeights,
    density: float | Sequence[float] = 0.9,
    scale: float = 1.0,
    *,
    gamma: float | Sequence[float] = GAMMA,
    rule: Literal["linear", "ties"] = "linear",
    weights: float | Sequence[float] = 1.0,
    normalize: bool = False,
    module: nn.Module | None = None,
) -> Result:
    """θ₀ + λ Σ_t w_t m_t ∘ τ_t, as above.

    density: d, the share of a task vector that is kept. scale: λ. gamma: γ, the share of its largest numbers that is dropped.
    weights: w. Each one for all or one per task.
    rule: "linear", or "ties": only those that have the elected sign are summed. normalize: divide by the weights that counted.

    The result has no coefficients. Raises ValueError for a share outside of 0 … 1.
    """
    started = time.perf_counter()
    combination = combination_of(packed, rule, weights, scale, normalize)
    densities = per_task(density, packed.tasks, "density", 0.0, 1.0)
    gammas = per_task(gamma, packed.tasks, "gamma", 0.0, 1.0)
    stored = packed.task_vectors
    dtype = stored.dtype if isinstance(stored, Tensor) else torch.float32  # quantised ones are read as fp32
    merged = merge_packed(packed, lambda name, shape: Breadcrumbs(shape.numel(), dtype, densities, gammas, combination))
    return Result.of_weights(packed, merged, f"breadcrumbs_{rule}", module, time.perf_counter() - started)
