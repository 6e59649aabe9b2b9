"""Merging matrix by matrix: what the methods that look at singular values share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from samerge_ext.merged.result import Result
from samerge_ext.packing.in_pieces import InPieces
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
    for name, (base, target, *task_vectors) in matrix_views(packed.layout, rows, transposed=transposed, left_out=averaged):
        check_finite(name, task_vectors)
        target.copy_(base + scale * rule(task_vectors))
    return Result.of_weights(packed, merged, method, module, time.perf_counter() - started)


def recalibrate(
    packed: PackedWeights,
    merge: Callable[[PackedWeights], Result],
    rule: Callable[..., Tensor],
    method: str,
    task_vectors: Sequence[Tensor] = (),
    *,
    transposed: Patterns = (),
    left_out: Patterns = (),
    module: nn.Module | None = None,
) -> Result:
    """θ₀ + rule(M, *that of each of the task_vectors [N]) for matrices, θ₀ + M for all else. M: what ``merge`` makes of θ₀ = 0.

    So M is not rounded to the weights' type, of which a rule may make much.
    Raises ValueError for a merge that holds no weights, a pattern that fits nothing, NaN and Inf; TypeError where the base lies
    in a file.
    """
    started = time.perf_counter()
    if isinstance(packed.base, InPieces):
        raise packed.base.not_whole()
    wide = torch.promote_types(packed.base.dtype, torch.float32)
    moved = merge(replace(packed, base=torch.zeros_like(packed.base, dtype=wide)))
    if moved.merged is None:
        raise ValueError(f"{method} needs merged weights, which a streamed {moved.method} does not hold")
    merged = (packed.base + moved.merged).to(packed.base.dtype)
    rows = [packed.base, merged, moved.merged, *task_vectors]
    for name, (base, target, change, *taus) in matrix_views(packed.layout, rows, transposed=transposed, left_out=left_out):
        check_finite(name, [change, *taus], "the merge or a task vector")
        target.copy_(base + rule(change.double(), *taus))
    return Result.of_weights(packed, merged, f"{moved.method}+{method}", module, time.perf_counter() - started)
