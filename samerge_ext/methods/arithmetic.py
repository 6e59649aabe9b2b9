"""Merges without data: weight averaging and Task Arithmetic (arXiv 2212.04089)."""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import Tensor, nn

from samerge_ext.merged.model import MergedModel
from samerge_ext.merged.result import Result
from samerge_ext.packing.packed_weights import PackedWeights


def average(packed: PackedWeights, *, module: nn.Module | None = None) -> Result:
    """θ₀ + (1/T) Σ_t τ_t, the mean of the experts' weights."""
    return _at(packed, 1 / packed.num_tasks, module, "average")


def task_arithmetic(
    packed: PackedWeights, scale: float | Sequence[float] | Tensor = 0.3, *, module: nn.Module | None = None
) -> Result:
    """θ₀ + Σ_t λ_t τ_t at one ``scale`` λ for all, one per task [T], or one per task and layer [T, L]."""
    return _at(packed, scale, module, "task_arithmetic")


def _at(packed: PackedWeights, scale: float | Sequence[float] | Tensor, module: nn.Module | None, method: str) -> Result:
    started = time.perf_counter()
    coefficients = packed.coefficients(scale)
    if module is not None:
        model = MergedModel(module, packed, coefficients)
        return Result.of_model(model, method, None, [], time.perf_counter() - started)
    merged = packed.merge(coefficients)
    return Result(packed, coefficients, merged, method, seconds=time.perf_counter() - started)
