"""Consensus merging (arXiv 2405.07813): keep the numbers of the sum that several tasks want, and drop what one or none does.

    m_t = |τ_t| > λ |Σ_s τ_s − τ_t|  (TALL mask),   θ = θ₀ + α [Σ_t m_t ≥ k] ∘ Σ_t τ_t

number by number. What one task alone wants is called selfish, what none does catastrophic; k = 2 drops both.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from samerge_ext.elementwise.piecewise import Piece, Rule, by_chunks, merge_packed
from samerge_ext.merged.result import Result
from samerge_ext.packing.packed_weights import PackedWeights

MASK_LAMBDA, AGREEING = 0.4, 2


class Consensus(Rule):
    """Consensus merging of T = count task vectors: a `piecewise.Rule`. scale: α, mask_lambda: λ, agreeing: k.

    Raises ValueError for a k outside of 0 … T.
    """

    def __init__(self, count: int, scale: float, mask_lambda: float = MASK_LAMBDA, agreeing: int = AGREEING):
        if not 0 <= agreeing <= count:
            raise ValueError(f"agreeing={agreeing} of {count} tasks; give a number from 0 to {count}")
        self.count, self.scale, self.mask_lambda, self.agreeing = count, scale, mask_lambda, agreeing

    def merge(self, piece: Piece) -> Tensor:  # [n]
        return by_chunks(piece, self._merged)

    def _merged(self, base: Tensor, rows: Tensor) -> Tensor:  # [m], [T, m] -> [m]
        total = rows.sum(0)
        wanted = (rows.abs() > self.mask_lambda * (total - rows).abs()).sum(0)
        return torch.where(wanted >= self.agreeing, base + self.scale * total, base)

    @property
    def shares(self) -> list[float]:
        return [self.scale] * self.count


def consensus(
    packed: PackedWeights,
    scale: float = 0.3,
    *,
    mask_lambda: float = MASK_LAMBDA,
    agreeing: int = AGREEING,
    module: nn.Module | None = None,
) -> Result:
    """θ₀ + α of what enough tasks want of the sum, as above.

    scale: α. mask_lambda: λ; the larger, the less a task wants. agreeing: k, how many tasks must want a number.

    The result has no coefficients. Raises ValueError for a λ below 0, a k outside of 0 … T, and what is not finite.
    """
    started = time.perf_counter()
    if not abs(scale) < torch.inf:
        raise ValueError(f"scale={scale} is not a finite number")
    if not 0 <= mask_lambda < torch.inf:
        raise ValueError(f"mask_lambda={mask_lambda} is not a finite number ≥ 0")
    rule = Consensus(packed.num_tasks, scale, mask_lambda, agreeing)
    merged = merge_packed(packed, lambda name, shape: rule)
    return Result.of_weights(packed, merged, "consensus", module, time.perf_counter() - started)
