"""DELLA (arXiv 2406.11617): drop numbers of the task vectors at random, the smaller ones more often; then merge as usual.

    p(keep) = d − ε + 2 ε (rank − 1) / (C − 1),   rank: by magnitude among the C numbers of a row, the smallest 1

A row lies along a tensor's second dimension; a vector is one. What is kept is multiplied by Σ|τ| / Σ|what is kept| over the
tensor, as mergekit has it (the paper by 1 / p). Nothing is ranked: another number of the row, drawn at random, is the smaller one
with probability (rank − 1) / (C − 1). So a number is kept with probability d − ε, and with one of 2 ε where it is the larger.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from samerge_ext.elementwise.piecewise import Combination, combination_of, merge_packed, per_task
from samerge_ext.elementwise.sparsified import Sparsified
from samerge_ext.merged.result import Result
from samerge_ext.methods.dare import random_key
from samerge_ext.packing.packed_weights import PackedWeights
from samerge_ext.reference.count_digits import magnitudes_of
from samerge_ext.reference.drop import STRETCH, uniform

EPSILON = 0.15


class Della(Sparsified):
    """DELLA over the tensor called ``name``: a `piecewise.Rule`. densities: d, epsilons: ε, one per task.

    Raises ValueError where d ± ε leaves 0 … 1.
    """

    def __init__(
        self,
        name: str,
        shape: torch.Size,
        densities: Sequence[float],
        epsilons: Sequence[float],
        seed: int,
        combination: Combination,
        rescale: bool = True,
    ):
        for density, epsilon in zip(densities, epsilons, strict=True):
            if 0 < density < 1 and not (epsilon >= 0 and density + epsilon < 1 and density - epsilon > 0):
                raise ValueError(f"'{name}': density ± epsilon, {density} ± {epsilon}, is to lie between 0 and 1; lower epsilon")
        self.name, self.densities, self.epsilons, self.seed = name, densities, epsilons, seed
        self._length, self._apart = _rows(shape)
        row = max(1, self._length * self._apart)
        self.unit = max(1, STRETCH // row) * row  # as many rows as share keys
        self.unseen = [task for task, density in enumerate(densities) if density < 1]
        super().__init__(combination, rescale)

    def drop(self, out: Tensor, numbers: Tensor, start: int) -> None:
        for first in range(0, numbers.shape[1], self.unit):
            place = slice(first, first + self.unit)
            for task, (density, epsilon) in enumerate(zip(self.densities, self.epsilons, strict=True)):
                if density >= 1:
                    out[task, place] = numbers[task, place]
                elif density <= 0:
                    out[task, place] = 0
                else:
                    kept = self._kept(numbers[task, place], task, (start + first) // self.unit, density, epsilon)
                    out[task, place] = numbers[task, place] * kept

    def _kept(self, numbers: Tensor, task: int, unit: int, density: float, epsilon: float) -> Tensor:  # [n] -> [n] bool
        of_one = -(-self.unit // STRETCH)
        keys = [random_key(self.seed, task, unit * of_one + i, self.name) for i in range(-(-numbers.numel() // STRETCH))]
        drawn = torch.cat([uniform(torch.tensor(key, dtype=torch.int32, device=numbers.device)) for key in keys])
        rows = numbers.view(-1, self._length, self._apart).mT  # [R, K, C]
        kept = larger_or_lucky(rows.flatten(0, 1), drawn[: numbers.numel()].view(-1, self._length), density, epsilon)
        return kept.view_as(rows).mT.flatten()


def larger_or_lucky(rows: Tensor, drawn: Tensor, density: float, epsilon: float) -> Tensor:  # [R, C] each -> bool
    """What is kept; drawn: integers of 0 … 2³¹ − 1. The other number of a row is chosen by how far they are beyond d − ε.

    Of equal magnitudes the first is the smaller; a number that is alone is kept with probability d.
    """
    others = rows.shape[1] - 1
    if others == 0 or epsilon == 0:
        return drawn < density * 2**31
    scale = others / (2 * epsilon * 2**31)
    beyond = (drawn * scale).sub_((density - epsilon) * 2**31 * scale)  # 0 … C − 1 where the other decides
    other = beyond.clamp(0, others - 1).long()
    is_after = other >= torch.arange(others + 1, device=rows.device)
    magnitudes = magnitudes_of(rows)
    larger = magnitudes.gather(1, other.add_(is_after)) + is_after <= magnitudes
    return (beyond < 0) | (larger & (beyond < others))


def _rows(shape: torch.Size) -> tuple[int, int]:
    """How long rows are, and how far apart the numbers of a row lie."""
    return (shape.numel(), 1) if len(shape) < 2 else (shape[1], shape[2:].numel())


def della(
    packed: PackedWeights,
    density: float | Sequence[float] = 0.5,
    scale: float = 1.0,
    *,
    epsilon: float | Sequence[float] = EPSILON,
    rule: Literal["linear", "ties"] = "ties",
    weights: float | Sequence[float] = 1.0,
    normalize: bool = True,
    rescale: bool = True,
    seed: int = 0,
    module: nn.Module | None = None,
) -> Result:
    """θ₀ + λ · mean of what is kept of the τ_t and has the elected sign, as above.

    density: d, the share that is kept. scale: λ. epsilon: ε. weights: w, in the election and in the mean. Each one for all or one
        per task.
    rule: "ties", or "linear": without an election. normalize: divide by the weights that counted; without it there is a sum.
    rescale: keep a tensor's sum of magnitudes.
    seed: what is dropped depends on it, on the tensor's name and numbers, on nothing else.

    The result has no coefficients. Raises ValueError for a density outside of 0 … 1 and where d ± ε leaves it.
    """
    started = time.perf_counter()
    combination = combination_of(packed, rule, weights, scale, normalize)
    densities = per_task(density, packed.tasks, "density", 0.0, 1.0)
    epsilons = per_task(epsilon, packed.tasks, "epsilon", 0.0, 1.0)
    merged = merge_packed(packed, lambda name, shape: Della(name, shape, densities, epsilons, seed, combination, rescale))
    return Result.of_weights(packed, merged, f"della_{rule}", module, time.perf_counter() - started)
