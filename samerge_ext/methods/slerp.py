"""SLERP: from the base's weights to an expert's along the arc between them (Shoemake, SIGGRAPH 1985).

    θ = sin((1 − t) φ) / sin φ · θ₀ + sin(t φ) / sin φ · θ₁,   φ the angle between θ₀ and θ₁, tensor by tensor

Where |cos φ| > 0.9995 it is (1 − t) θ₀ + t θ₁, as mergekit has it; a tensor of a norm up to 1e-8 counts as it is.
"""

from __future__ import annotations

import time
from functools import partial

import torch
from torch import Tensor, nn

from samerge_ext.elementwise.inner_products import InnerProducts, norms
from samerge_ext.elementwise.piecewise import merge_packed
from samerge_ext.merged.result import Result
from samerge_ext.packing.packed_weights import PackedWeights

PARALLEL = 0.9995
EPSILON = 1e-8


class Slerp(InnerProducts):
    """SLERP over a tensor of two rows: a `piecewise.Rule`."""

    def __init__(self, shape: torch.Size, t: float):
        super().__init__(shape, [1 - t, t], partial(coefficients, t))


def coefficients(t: float, gram: Tensor) -> Tensor:  # [2, 2] -> [2]
    length = norms(gram)
    length = torch.where(length > EPSILON, length, 1)
    cosine = (gram[0, 1] / length.prod()).clamp(-1, 1)
    if cosine.abs() > PARALLEL:
        return cosine.new_tensor([1 - t, t])
    return arc(t, cosine)


def arc(t: float, cosine: Tensor) -> Tensor:  # [...] -> [..., 2]
    """What the two ends of an arc count at t of its way."""
    angle = torch.acos(cosine)
    return torch.stack([torch.sin((1 - t) * angle), torch.sin(t * angle)], -1) / torch.sin(angle)[..., None]


def slerp(packed: PackedWeights, t: float = 0.5, *, module: nn.Module | None = None) -> Result:
    """From the base, t = 0, to the one expert, t = 1, as above.

    The result has no coefficients. Raises ValueError where there is not one expert alone, and for a t that is not finite.
    """
    started = time.perf_counter()
    if packed.num_tasks != 1:
        raise ValueError(f"slerp merges the base with one expert, and there are {packed.num_tasks}; nuslerp takes two")
    if not abs(t) < torch.inf:
        raise ValueError(f"t={t} is not a finite number")
    merged = merge_packed(packed, lambda name, shape: Slerp(shape, t), of="models")
    return Result.of_weights(packed, merged, "slerp", module, time.perf_counter() - started)
