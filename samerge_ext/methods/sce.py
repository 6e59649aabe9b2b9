"""SCE (arXiv 2408.07990): select the numbers in which task vectors vary most, calculate weights from them, erase minorities.

    θ = θ₀ + Σ_t∈A w_t τ_t / Σ_t∈A w_t,   w_t = ‖m ∘ τ_t‖² / Σ_s ‖m ∘ τ_s‖²,   A: the tasks whose m τ_t has the sign of Σ_s m τ_s

tensor by tensor. m keeps the k numbers of largest variance over the tasks, k a share of those that vary at all, of equal ones the
first; a share of 1 keeps all. As mergekit has it, weights are equal where the mean squares sum to less than 1e-6.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import Tensor, nn

from samerge_ext.elementwise.magnitudes import LargestMagnitudes
from samerge_ext.elementwise.piecewise import Piece, Rule, by_chunks, chunks, merge_packed
from samerge_ext.merged.result import Result
from samerge_ext.packing.packed_weights import PackedWeights

LEAST = 1e-6  # sums of mean squares, and of weights, that are divided by


class Sce(Rule):
    """SCE of ``count`` task vectors of ``numel`` numbers: a `piecewise.Rule`. select: the share that is kept."""

    def __init__(self, numel: int, dtype: torch.dtype, count: int, select: float = 1.0):
        self._numel, self._select, self._shares = numel, select, [1 / count] * count
        self._wide = torch.float64 if dtype == torch.float64 else torch.float32
        self._selecting = 1 + self._wide.itemsize // 2 if 0 < select < 1 else 0  # rounds: to count what varies, and digits
        self.rounds = self._selecting + 1
        self._varying, self._squares = 0, torch.zeros(count, dtype=torch.float64)
        self._largest: LargestMagnitudes | None = None
        self._weights = torch.ones(count, dtype=self._wide)

    def look(self, piece: Piece) -> None:
        if not self._selecting:
            self._squares = self._squares.to(piece.base.device) + squares(self._selected(piece).rows())
        elif self._largest is None:
            self._varying += int(self._variance(piece).count_nonzero())
        elif self._largest.rounds:
            self._largest.look(self._variance(piece)[None])

    def next_round(self) -> None:
        if not self._selecting:
            means = self._squares / max(1, self._numel)
            total = means.sum()
            weights = means / total if total >= LEAST else torch.full_like(means, 1 / len(means))
            self._weights = weights.to(self._wide)
            return
        self._selecting -= 1
        if self._largest is None:
            kept = int(self._varying * self._select)
            self._largest = LargestMagnitudes([kept], self._numel, self._wide)
        elif self._largest.rounds:
            self._largest.next_round()

    def merge(self, piece: Piece) -> Tensor:  # [n]
        return by_chunks(self._selected(piece), self._erased)

    def _erased(self, base: Tensor, rows: Tensor) -> Tensor:  # [m], [T, m] -> [m]
        agrees = torch.where(rows.sum(0) >= 0, rows > 0, rows < 0)
        weights = agrees * self._weights[:, None]
        return base + (weights * rows).sum(0) / weights.sum(0).clamp(min=LEAST)

    def _variance(self, piece: Piece) -> Tensor:  # [size]
        out = torch.empty(piece.size, dtype=self._wide, device=piece.base.device)
        for place in chunks(piece):
            rows = piece.task_vectors[:, place].to(self._wide)
            out[place] = (rows - rows.mean(0)).square_().mean(0)
        return out

    def _selected(self, piece: Piece) -> Piece:
        """With zeros for what is not kept, in new memory: the piece may be seen again."""
        if self._largest is None:
            return piece if self._select > 0 else replace(piece, task_vectors=torch.zeros_like(piece.task_vectors))
        if piece.start == 0:
            self._largest.begin()
        variance = self._variance(piece)[None]
        self._largest.trim(variance, variance)
        rows = torch.zeros_like(piece.task_vectors)
        rows[:, : piece.size] = piece.rows() * (variance > 0)
        return replace(piece, task_vectors=rows)

    @property
    def shares(self) -> list[float]:
        return self._shares


def squares(rows: Tensor) -> Tensor:  # [T, n] -> [T] fp64
    return torch.stack([torch.linalg.vector_norm(row, dtype=torch.float64).square() for row in rows])


def sce(packed: PackedWeights, select: float = 1.0, *, module: nn.Module | None = None) -> Result:
    """θ₀ plus the weighted mean of the selected numbers that have the elected sign, as above.

    select: the share that is kept of the numbers in which task vectors differ.

    The result has no coefficients. Raises ValueError for a share outside of 0 … 1.
    """
    started = time.perf_counter()
    if not 0 <= select <= 1:
        raise ValueError(f"select={select} is not a share from 0 to 1")
    dtype = packed.base.dtype
    merged = merge_packed(packed, lambda name, shape: Sce(shape.numel(), dtype, packed.num_tasks, select))
    return Result.of_weights(packed, merged, "sce", module, time.perf_counter() - started)
