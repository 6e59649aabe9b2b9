"""Arcee Fusion, of mergekit: take an expert's numbers where they matter much more than most.

    θ = θ₀ + m ∘ τ,   m: |τ| KL(softmax θ₁ ‖ softmax θ₀) ≥ q₂ + 1.5 (q₃ − q₁)

where the soft-maxes, each + 1e-8, and KL are of a row, along a tensor's last dimension, and q are the quartiles of the left
side over the tensor: its numbers at 1/4, 1/2 and 3/4 in order. They are exact, where mergekit takes those of a random million. KL
is added up in fp64, since in a narrower type rounding is as large as the KL of small changes.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from samerge_ext.elementwise.magnitudes import LargestMagnitudes
from samerge_ext.elementwise.piecewise import CHUNK, Piece, Rule, merge_packed
from samerge_ext.merged.result import Result
from samerge_ext.packing.packed_weights import PackedWeights

EPSILON = 1e-8
QUARTILES = (0.25, 0.5, 0.75)


class ArceeFusion(Rule):
    """Arcee Fusion of one task vector: a `piecewise.Rule`."""

    def __init__(self, shape: torch.Size):
        numel = shape.numel()
        counts = [numel - int(quartile * (numel - 1)) for quartile in QUARTILES]  # from the largest down to the quartile
        self._quartiles = LargestMagnitudes(counts, numel + 1, torch.float32)
        self.rounds = self._quartiles.rounds
        self.unit = max(1, shape[-1] if shape else 1)
        self._threshold = torch.zeros(())

    def look(self, piece: Piece) -> None:
        self._quartiles.look(self._importance(piece).expand(len(QUARTILES), -1))

    def next_round(self) -> None:
        self._quartiles.next_round()
        first, second, third = self._quartiles.keys.int().view(torch.float32)
        self._threshold = second + 1.5 * (third - first)

    def merge(self, piece: Piece) -> Tensor:  # [n]
        merged = piece.base.clone()
        merged[: piece.size] += piece.rows()[0] * (self._importance(piece) >= self._threshold)
        return merged

    def _importance(self, piece: Piece) -> Tensor:  # [size] fp32
        base, change = piece.base[: piece.size].view(-1, self.unit), piece.rows()[0].view(-1, self.unit)
        at_once = max(1, CHUNK // self.unit) if base.device.type == "cpu" else len(base) or 1
        parts = zip(base.split(at_once), change.split(at_once), strict=True)
        return torch.cat([(tau.abs() * _divergence(theta, tau)).float() for theta, tau in parts]).flatten()

    @property
    def shares(self) -> list[float]:
        return [0.0]  # of running statistics, which no row's soft-max tells of


def _divergence(base: Tensor, change: Tensor) -> Tensor:  # [R, C] each -> [R, 1] fp64
    base = base.double()
    p, q = (torch.softmax(weights, -1) + EPSILON for weights in (base + change, base))
    return (p * torch.log(p / q)).sum(-1, keepdim=True).clamp(min=0)


def arcee_fusion(packed: PackedWeights, *, module: nn.Module | None = None) -> Result:
    """The base with the one expert's numbers where they matter, as above.

    The result has no coefficients. Raises ValueError where there is not one expert alone.
    """
    started = time.perf_counter()
    if packed.num_tasks != 1:
        raise ValueError(f"arcee_fusion merges the base with one expert, and there are {packed.num_tasks}")
    merged = merge_packed(packed, lambda name, shape: ArceeFusion(shape))
    return Result.of_weights(packed, merged, "arcee_fusion", module, time.perf_counter() - started)
