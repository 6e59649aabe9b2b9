"""DARE (arXiv 2311.03099): drop numbers of the task vectors at random, rescale the others, then merge as usual."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from samerge_ext.elementwise.magnitudes import BITS
from samerge_ext.elementwise.piecewise import ALIGNMENT, Combination, Piece, Rule, merge_packed, per_task
from samerge_ext.merged.result import Result
from samerge_ext.packing.packed_weights import PackedWeights

DRAWN = ALIGNMENT  # numbers that share a key


class Dare(Rule):
    """DARE over the tensor called ``name``: a `piecewise.Rule`.

    densities: 1 − p for every task. combination: what follows. rescale: by 1 / density.
    """

    def __init__(self, name: str, densities: Sequence[float], seed: int, combination: Combination, rescale: bool = True):
        self.name, self.densities, self.seed = name, densities, seed
        self.combination, self.rescale = combination, rescale
        self.unseen = [task for task, density in enumerate(densities) if density < 1]

    def drop_(self, piece: Piece) -> None:
        for task, (density, row) in enumerate(zip(self.densities, piece.rows(), strict=True)):
            if density == 0:
                row.zero_()
            if density in (0, 1):
                continue
            for start, part in zip(range(piece.start, piece.start + piece.size, DRAWN), row.split(DRAWN), strict=True):
                integers = BITS[part.dtype.itemsize]
                key = f"{self.seed} {task} {start // DRAWN} {self.name}"
                kept = random_mask(key, density, part.device)[: part.numel()]
                part.view(integers).bitwise_and_(kept.to(integers))
            if self.rescale:
                row.mul_(1 / density)

    def merge(self, piece: Piece) -> Tensor:  # [n]
        self.drop_(piece)
        return self.combination.merge(piece)

    @property
    def shares(self) -> list[float]:
        return self.combination.shares


def random_mask(key: str, density: float, device: torch.device) -> Tensor:
    """[65536] int32, all bits set with probability ``density``, else none: the same on every device and at any time.

    A number's place and the key are mixed by the finalizer of MurmurHash3, on integers that wrap around.
    """
    digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
    mixed = _spread(device) + int.from_bytes(digest, "little", signed=True)
    for shift, factor in ((16, -0x7A143595), (13, -0x3D4D51CB)):
        mixed.bitwise_xor_((mixed >> shift).bitwise_and_((1 << (32 - shift)) - 1)).mul_(factor)
    mixed.bitwise_xor_((mixed >> 16).bitwise_and_(0xFFFF))
    uniform = mixed.bitwise_right_shift_(1).bitwise_and_(0x7FFFFFFF)
    return uniform.sub_(round(density * 2**31)).bitwise_right_shift_(31)


@functools.cache
def _spread(device: torch.device) -> Tensor:
    """[65536] int32, the places times 2³² over the golden ratio."""
    return (torch.arange(DRAWN) * 0x9E3779B9).to(torch.int32).to(device)


def dare(
    packed: PackedWeights,
    drop: float | Sequence[float] = 0.5,
    scale: float = 0.3,
    *,
    rule: Literal["linear", "ties"] = "linear",
    weights: float | Sequence[float] = 1.0,
    normalize: bool = False,
    seed: int = 0,
    module: nn.Module | None = None,
) -> Result:
    """θ₀ + λ Σ_t w_t τ̃_t, where τ̃_t is τ_t with every number dropped with probability p and the others over 1 − p.

    drop: p, one for all or one per task. scale: λ. weights: w, one for all or one per task.
    rule: "linear", or "ties": only those that have the elected sign are summed.
    normalize: divide by the weights that counted.
    seed: what is dropped depends on it, on the tensor's name and on the number's place, on nothing else.

    The result has no coefficients. Raises ValueError for a probability outside of 0 … 1.
    """
    started = time.perf_counter()
    if rule not in ("linear", "ties"):
        raise ValueError(f"rule={rule!r}; choose 'linear' or 'ties'")
    densities = [1 - p for p in per_task(drop, packed.tasks, "drop", 0.0, 1.0)]
    weights = per_task(weights, packed.tasks, "weights", -torch.inf, torch.inf)
    combination = Combination(weights, scale, normalize=normalize, elect=rule == "ties")
    merged = merge_packed(packed, lambda name, numel: Dare(name, densities, seed, combination))
    return Result.of_weights(packed, merged, f"dare_{rule}", module, time.perf_counter() - started)
