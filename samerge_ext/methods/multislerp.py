"""Multi-SLERP (Goddard, goddard.blog/posts/multislerp-wow-what-a-cool-idea): a mean of directions with a mean of lengths.

    θ = θ₀ + Σ_t w_t ‖τ_t‖ · m / ‖m‖,   m = Σ_t w_t τ_t / ‖τ_t‖

The source then goes from m on along the mean of the directions' tangents at m. With the weights that made m this is no step:
Σ_t w_t (u_t − ⟨u_t, m⟩ m) = 0 for u_t of length 1 and m = Σ_t w_t u_t / ‖Σ_t w_t u_t‖.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from samerge_ext.elementwise.inner_products import InnerProducts, norms
from samerge_ext.elementwise.piecewise import merge_packed, per_task
from samerge_ext.merged.result import Result
from samerge_ext.packing.packed_weights import PackedWeights

EPSILON = 1e-8


class MultiSlerp(InnerProducts):
    """Multi-SLERP over the tensor called ``name``: a `piecewise.Rule`. normalize: weights that sum to 1."""

    def __init__(self, name: str, shape: torch.Size, weights: Sequence[float], normalize: bool = True, epsilon: float = EPSILON):
        total = sum(weights)
        if normalize and total == 0:
            raise ValueError("multislerp divides by the sum of the weights, which is 0; set normalize_weights to false")
        self.name, self.weights, self.epsilon = name, [w / total if normalize else w for w in weights], epsilon
        super().__init__(shape, self.weights, self.coefficients)

    def coefficients(self, gram: Tensor) -> Tensor:  # [T, T] -> [T]
        weights, length = gram.new_tensor(self.weights), norms(gram)
        if len(weights) == 1:
            return torch.ones_like(weights)
        mean = weights / (length + self.epsilon)
        of_mean = (mean @ gram @ mean).clamp(min=0).sqrt()
        if of_mean >= self.epsilon:
            return (weights @ length) / of_mean * mean
        if len(weights) == 2 or not length.any():
            return weights
        raise ValueError(f"'{self.name}': the weighted directions of the models cancel and have no mean; change the weights")


def multislerp(
    packed: PackedWeights,
    weights: float | Sequence[float] = 1.0,
    *,
    normalize: bool = True,
    module: nn.Module | None = None,
) -> Result:
    """θ₀ plus the spherical mean of the task vectors, tensor by tensor, as above.

    weights: w, one for all or one per task. normalize: divide them by their sum.

    The result has no coefficients. Raises ValueError for weights that sum to 0 or whose directions cancel.
    """
    started = time.perf_counter()
    weights = per_task(weights, packed.tasks, "weights", -torch.inf, torch.inf)
    merged = merge_packed(packed, lambda name, shape: MultiSlerp(name, shape, weights, normalize))
    return Result.of_weights(packed, merged, "multislerp", module, time.perf_counter() - started)
