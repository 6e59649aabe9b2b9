"""NuSLERP, of mergekit: from one expert to another along the arc between their task vectors, or between their weights.

    θ = θ₀ + sin((1 − s) φ) / sin φ · τ₁ + sin(s φ) / sin φ · τ₂,   s = w₂ / (w₁ + w₂), φ the angle between τ₁ and τ₂

over a tensor, or over each of its rows, or columns. s is 1/2 where the weights cancel; parallel ones are interpolated linearly.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from samerge_ext.elementwise.inner_products import InnerProducts, Over, norms
from samerge_ext.elementwise.piecewise import merge_packed, per_task
from samerge_ext.merged.result import Result
from samerge_ext.methods.slerp import arc
from samerge_ext.packing.packed_weights import PackedWeights

EPSILON = 1e-7  # the least norm that is divided by
PARALLEL = 1e-16  # the squared sine of an angle that is none


class NuSlerp(InnerProducts):
    """NuSLERP over a tensor of two rows: a `piecewise.Rule`."""

    def __init__(self, shape: torch.Size, weights: Sequence[float], over: Over = "tensor"):
        total = sum(weights)
        s = 0.5 if abs(total) < 1e-6 else weights[1] / total
        super().__init__(shape, [1 - s, s], partial(coefficients, s), over)


def coefficients(s: float, grams: Tensor) -> Tensor:  # [..., 2, 2] -> [..., 2]
    length = norms(grams).clamp(min=EPSILON)
    cosine = (grams[..., 0, 1] / length.prod(-1)).clamp(-1, 1)
    parallel = 1 - cosine.square() <= PARALLEL
    return torch.where(parallel[..., None], cosine.new_tensor([1 - s, s]), arc(s, torch.where(parallel, 0, cosine)))


def nuslerp(
    packed: PackedWeights, weights: Sequence[float] = (1.0, 1.0), *, over: Over = "tensor", module: nn.Module | None = None
) -> Result:
    """θ₀ plus the interpolated task vectors of two experts, as above.

    weights: w of the two. over: "tensor"; "rows", along the last dimension of a tensor; or "columns", along its first.

    The result has no coefficients. Raises ValueError where there are not two experts.
    """
    started = time.perf_counter()
    if packed.num_tasks != 2:
        raise ValueError(f"nuslerp merges two experts, and there are {packed.num_tasks}; multislerp and karcher take more")
    if over not in ("tensor", "rows", "columns"):
        raise ValueError(f"over={over!r}; choose 'tensor', 'rows' or 'columns'")
    weights = per_task(weights, packed.tasks, "weights", -torch.inf, torch.inf)
    merged = merge_packed(packed, lambda name, shape: NuSlerp(shape, weights, over))
    return Result.of_weights(packed, merged, "nuslerp", module, time.perf_counter() - started)
