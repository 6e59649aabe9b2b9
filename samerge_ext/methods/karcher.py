"""Karcher mean (arXiv 2603.04972): the direction with the least squared angles to all models, with their mean length.

    θ = (1/T) Σ_t ‖θ_t‖ · m,   m = argmin_‖m‖=1 Σ_t ∠(m, θ_t)²

by steps m ← cos ‖v‖ m + sin ‖v‖ v / ‖v‖ along the mean tangent v = (1/T) Σ_t φ_t / sin φ_t (u_t − cos φ_t m) at m, where
u_t = θ_t / ‖θ_t‖ and φ_t = ∠(m, θ_t). m stays a sum of the θ_t, whose inner products are all that the steps need.
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

MAX_ITER, TOLERANCE = 10, 1e-5


class Karcher(InnerProducts):
    """The Karcher mean of ``count`` rows: a `piecewise.Rule`. tol: the least norm, angle and step that count."""

    def __init__(self, shape: torch.Size, count: int, max_iter: int = MAX_ITER, tol: float = TOLERANCE):
        super().__init__(shape, [1 / count] * count, partial(coefficients, max_iter, tol))


def coefficients(max_iter: int, tol: float, gram: Tensor) -> Tensor:  # [T, T] -> [T]
    length, count = norms(gram), gram.shape[0]
    if count == 1:
        return torch.ones_like(length)
    (there,) = (length > tol).nonzero(as_tuple=True)
    if not len(there):
        return torch.zeros_like(length)
    units = torch.zeros(len(there), count, dtype=gram.dtype, device=gram.device)  # each as a sum of the rows
    units[range(len(there)), there] = 1 / length[there]

    def norm(sum_of_rows: Tensor) -> Tensor:
        return (sum_of_rows @ gram @ sum_of_rows).clamp(min=0).sqrt()

    mean = units.mean(0)
    mean = units[0] if norm(mean) < tol else mean / norm(mean)
    for _ in range(max_iter):
        cosines = (units @ gram @ mean).clamp(-1, 1)
        angles = torch.acos(cosines)
        turned = angles >= tol
        pull = torch.where(turned, angles / torch.sin(angles), 0) / len(there)
        tangent = pull @ units - (pull @ cosines) * mean
        step = norm(tangent)
        if step < tol:
            break
        mean = torch.cos(step) * mean + torch.sin(step) / step * tangent
        mean = mean / norm(mean) if norm(mean) > tol else mean
    return length.mean() * mean


def karcher(
    packed: PackedWeights, *, max_iter: int = MAX_ITER, tol: float = TOLERANCE, module: nn.Module | None = None
) -> Result:
    """The Karcher mean of the experts' weights, tensor by tensor, as above; the base is none of them.

    max_iter: steps at most. tol: a shorter step, and a smaller angle or norm, is none.

    The result has no coefficients. Raises ValueError for less than one step and a tol that is not positive.
    """
    started = time.perf_counter()
    if max_iter < 1:
        raise ValueError(f"max_iter={max_iter}; at least one step is expected")
    if not 0 < tol < torch.inf:
        raise ValueError(f"tol={tol}; it must be positive and finite")
    merged = merge_packed(packed, lambda name, shape: Karcher(shape, packed.num_tasks, max_iter, tol), of="experts")
    return Result.of_weights(packed, merged, "karcher", module, time.perf_counter() - started)
