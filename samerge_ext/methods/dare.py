"""DARE (arXiv 2311.03099): drop numbers of the task vectors at random, rescale the others, then merge as usual."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from samerge_ext import backend
from samerge_ext.elementwise.piecewise import Combination, Piece, Rule, combination_of, merge_packed, per_task
from samerge_ext.merged.result import Result
from samerge_ext.packing.packed_weights import PackedWeights
from samerge_ext.reference.drop import STRETCH, uniform


class Dare(Rule):
    """DARE over the tensor called ``name``: a `piecewise.Rule`.

    densities: 1 − p for every task. combination: what follows. rescale: by 1 / density.
    """

    def __init__(self, name: str, densities: Sequence[float], seed: int, combination: Combination, rescale: bool = True):
        self.name, self.densities, self.seed = name, densities, seed
        self.combination, self.rescale = combination, rescale
        self.unseen = [task for task, density in enumerate(densities) if density < 1]

    def drop(self, out: Tensor, numbers: Tensor, start: int) -> None:
        """Drops some of ``numbers`` [T, n], the tensor's from ``start`` on, and rescales the others; out may be the numbers."""
        stretches = range(start // STRETCH, -(-(start + numbers.shape[1]) // STRETCH))
        keys = [
            [random_key(self.seed, task, stretch, self.name) if 0 < density < 1 else 0 for stretch in stretches]
            for task, density in enumerate(self.densities)
        ]
        thresholds = [_threshold(density) for density in self.densities]
        factors = [1 / density if density and self.rescale else 1.0 for density in self.densities]
        wide = torch.float64 if numbers.dtype == torch.float64 else torch.float32
        values = ((keys, torch.int32), (thresholds, torch.int64), (factors, wide))
        on_device = [torch.tensor(v, dtype=t, device="cpu").to(numbers.device, non_blocking=True) for v, t in values]
        backend.kernel("drop", numbers)(out, numbers, *on_device)

    def merge(self, piece: Piece) -> Tensor:  # [n]
        return self.combination.merge(piece.changed(functools.partial(self.drop, start=piece.start)))

    @property
    def shares(self) -> list[float]:
        return self.combination.shares


def random_mask(seed: int, task: int, stretch: int, name: str, density: float) -> Tensor:
    """[65536] bool, true with probability ``density``: which numbers of a stretch of the tensor ``name`` are kept."""
    key = torch.tensor(random_key(seed, task, stretch, name), dtype=torch.int32)
    return uniform(key) < _threshold(density)


def random_key(seed: int, task: int, stretch: int, name: str) -> int:
    """32 bits, as a signed integer."""
    digest = hashlib.blake2b(f"{seed} {task} {stretch} {name}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little", signed=True)


def _threshold(density: float) -> int:
    return round(density * 2**31)


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
    combination = combination_of(packed, rule, weights, scale, normalize)
    densities = [1 - p for p in per_task(drop, packed.tasks, "drop", 0.0, 1.0)]
    merged = merge_packed(packed, lambda name, shape: Dare(name, densities, seed, combination))
    return Result.of_weights(packed, merged, f"dare_{rule}", module, time.perf_counter() - started)
