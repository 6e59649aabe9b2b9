"""Reinforced Agent Merging (arXiv 2601.13572): average what several task vectors change, and keep whole what one alone does.

    θ = θ₀ + Σ_t∈A s_t τ_t,   A: the tasks with |τ_t| > ε,   s_t = 1 / |A| where |A| > 1, else λ_t

number by number. λ_t = 1; RAM+ makes up for what is lost by averaging: λ_t = 1 + r min(α, ρ_t), ρ_t how many numbers task t
shares with others over how many are its own, tensor by tensor.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from samerge_ext.elementwise.piecewise import Piece, Rule, by_chunks, chunks, merge_packed
from samerge_ext.merged.result import Result
from samerge_ext.packing.packed_weights import PackedWeights

EPSILON, R, ALPHA = 1e-5, 0.1, 0.2


class Ram(Rule):
    """RAM of ``count`` task vectors, with r > 0 RAM+: a `piecewise.Rule`."""

    def __init__(self, count: int, epsilon: float = EPSILON, r: float = 0.0, alpha: float = ALPHA):
        self._epsilon, self._r, self._alpha, self._shares = epsilon, r, alpha, [1 / count] * count
        self.rounds = int(r != 0)
        self._counts = torch.zeros(2, count, dtype=torch.int64)  # of every task's numbers that it shares, and that are its own
        self._own = torch.ones(count)

    def look(self, piece: Piece) -> None:
        self._counts = self._counts.to(piece.base.device)
        for place in chunks(piece):
            changed = piece.task_vectors[:, place].abs() > self._epsilon
            together = changed.sum(0)
            self._counts += torch.stack([(changed & (together > 1)).sum(1), (changed & (together == 1)).sum(1)])

    def next_round(self) -> None:
        shared, own = self._counts.double()
        self._own = 1 + self._r * (shared / own.clamp(min=self._epsilon)).clamp(0, self._alpha)

    def merge(self, piece: Piece) -> Tensor:  # [n]
        return by_chunks(piece, self._reinforced)

    def _reinforced(self, base: Tensor, rows: Tensor) -> Tensor:  # [m], [T, m] -> [m]
        changed = rows.abs() > self._epsilon
        together = changed.sum(0)
        share = torch.where(together > 1, 1 / together, self._own.to(rows)[:, None])
        return base + (rows * changed * share).sum(0)

    @property
    def shares(self) -> list[float]:
        return self._shares


def ram(
    packed: PackedWeights, r: float = 0.0, alpha: float = ALPHA, *, epsilon: float = EPSILON, module: nn.Module | None = None
) -> Result:
    """θ₀ plus the reinforced task vectors, as above: RAM, or with r (0.1 in mergekit) RAM+ of a tensor.

    alpha: α, the largest ρ that counts. epsilon: ε, a change that is none.

    The result has no coefficients. Raises ValueError for a number that is negative or not finite.
    """
    started = time.perf_counter()
    for name, value in (("r", r), ("alpha", alpha), ("epsilon", epsilon)):
        if not 0 <= value < torch.inf:
            raise ValueError(f"{name}={value}; it must be finite and not negative")
    merged = merge_packed(packed, lambda name, shape: Ram(packed.num_tasks, epsilon, r, alpha))
    return Result.of_weights(packed, merged, "ram_plus" if r else "ram", module, time.perf_counter() - started)
