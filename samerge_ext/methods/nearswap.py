"""NearSwap (alchemonaut, QuartetAnemoi-70B): swap in the expert's numbers that are near the base's, and go t towards the others.

    θ = θ₀ + min(1, t / |τ|) τ,   number by number

A |τ| below 1e-6 counts as that, and a negative t as 0, as mergekit has it.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from samerge_ext.elementwise.piecewise import Piece, Rule, by_chunks, merge_packed
from samerge_ext.merged.result import Result
from samerge_ext.packing.packed_weights import PackedWeights

LEAST = 1e-6


class NearSwap(Rule):
    """NearSwap of one task vector: a `piecewise.Rule`."""

    def __init__(self, t: float):
        self.t = t

    def merge(self, piece: Piece) -> Tensor:  # [n]
        return by_chunks(piece, lambda base, rows: base + rows[0] * (self.t / rows[0].abs().clamp(min=LEAST)).clamp(0, 1))

    @property
    def shares(self) -> list[float]:
        return [0.0]  # what counts of running statistics, whose changes are of another size


def nearswap(packed: PackedWeights, t: float = 1e-4, *, module: nn.Module | None = None) -> Result:
    """The base with the numbers of the one expert as far as t lets them, as above.

    The result has no coefficients. Raises ValueError where there is not one expert alone, and for a t that is not finite.
    """
    started = time.perf_counter()
    if packed.num_tasks != 1:
        raise ValueError(f"nearswap merges the base with one expert, and there are {packed.num_tasks}")
    if not abs(t) < torch.inf:
        raise ValueError(f"t={t} is not a finite number")
    merged = merge_packed(packed, lambda name, shape: NearSwap(t))
    return Result.of_weights(packed, merged, "nearswap", module, time.perf_counter() - started)
