"""Model Stock (arXiv 2403.19522): from the base towards the experts' mean, as far as the angle between their task vectors says.

    θ = θ₀ + r/T Σ_t τ_t,   r = T c / (1 + (T − 1) c),   c the mean cosine of two task vectors

Equation 3, of a tensor or of each of its rows. Where 1 + (T − 1) c is 0, task vectors that oppose each other, r is 0.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from samerge_ext.elementwise.inner_products import InnerProducts, norms
from samerge_ext.elementwise.piecewise import merge_packed
from samerge_ext.merged.result import Result
from samerge_ext.packing.packed_weights import PackedWeights

EPSILON = 1e-6  # the least product of norms, and the least |1 + (T − 1) c|, that is divided by


class ModelStock(InnerProducts):
    """Model Stock of ``count`` task vectors: a `piecewise.Rule`. filter_wise: an r for every row."""

    def __init__(self, shape: torch.Size, count: int, filter_wise: bool = False):
        super().__init__(shape, [1 / count] * count, coefficients, "rows" if filter_wise else "tensor")


def coefficients(grams: Tensor) -> Tensor:  # [..., T, T] -> [..., T]
    count, length = grams.shape[-1], norms(grams)
    first, second = torch.triu_indices(count, count, 1, device=grams.device)
    products = (length[..., first] * length[..., second]).clamp(min=EPSILON)
    cosine = (grams[..., first, second] / products).clamp(-1, 1).mean(-1, keepdim=True)
    below = 1 + (count - 1) * cosine
    ratio = torch.where(below.abs() < EPSILON, 0, count * cosine / below)
    return (ratio / count).expand(length.shape)


def model_stock(packed: PackedWeights, *, filter_wise: bool = False, module: nn.Module | None = None) -> Result:
    """θ₀ + r · mean of the task vectors, tensor by tensor, as above.

    filter_wise: row by row, along the last dimension of a tensor.

    The result has no coefficients. Raises ValueError for less than two experts.
    """
    started = time.perf_counter()
    if packed.num_tasks < 2:
        raise ValueError("model_stock needs the angle between two experts or more, and there is one; use task_arithmetic")
    merged = merge_packed(packed, lambda name, shape: ModelStock(shape, packed.num_tasks, filter_wise))
    return Result.of_weights(packed, merged, "model_stock", module, time.perf_counter() - started)
