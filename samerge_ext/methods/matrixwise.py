"""Merging matrix by matrix: what the methods that look at singular values share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from samerge_ext.merged.result import Result
from samerge_ext.packing.matrices import Patterns, check_finite, matrix_views
from samerge_ext.packing.packed_weights import PackedWeights


def merge_matrixwise(
    packed: PackedWeights,
    rule: Callable[[Sequence[Tensor]], Tensor],
    method: str,
    scale: float,
    *,
    transposed: Patterns = (),
    averaged: Patterns = (),
    module: nn.Module | None = None,
) -> Result:
    """θ₀ + λ M. rule: T task vectors [m, n] of a matrix -> its M [m, n]. Of all else M is the mean of the task vectors.

    Raises ValueError for a scale that is not finite, a pattern that fits nothing, NaN and Inf, and where task vectors are
    quantised; TypeError where they lie in a file or are factors.
    """
    started = time.perf_counter()
    stored = packed.exact_task_vectors(method)
    merged = packed.merge(packed.coefficients(scale / packed.num_tasks))
    rows = [packed.base, merged, *stored]
    for name, (base, target, *task_vectors) in matrix_views(packed.layout, rows, transposed=transposed, averaged=averaged):
        check_finite(name, task_vectors)
        target.copy_(base + scale * rule(task_vectors))
    return Result.of_weights(packed, merged, method, module, time.perf_counter() - started)
