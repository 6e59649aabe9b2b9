"""Merging matrix by matrix: what the methods that look at singular values share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from samerge_ext.merged.result import Result
from samerge_ext.packing.in_pieces import InPieces
from samerge_ext.packing.matrices import (
    MatrixChange,
    Patterns,
    check_finite,
    fitting,
    matrix_changes,
    matrix_views,
)
from samerge_ext.packing.packed_weights import PackedWeights


def merge_matrixwise(
    packed: PackedWeights,
    rule: Callable[[Sequence[MatrixChange]], Tensor],
    method: str,
    scale: float,
    *,
    transposed: Patterns = (),
    averaged: Patterns = (),
    module: nn.Module | None = None,
) -> Result:
    """θ₀ + λ M. rule: what T tasks change of a matrix [m, n] -> M [m, n], fp64. Of all else M is the mean of the task vectors.

    Raises ValueError for a scale that is not finite, a pattern that fits nothing, NaN and Inf, and where task vectors are
    quantised; TypeError where they lie in a file. LoRA factors are taken as they are.
    """
    started = time.perf_counter()
    left_out = fitting(packed.layout, averaged)
    changes = matrix_changes(packed, method, transposed=transposed)
    merged = packed.merge(packed.coefficients(scale / packed.num_tasks))
    bases, targets = packed.layout.views(packed.base), packed.layout.views(merged)
    for place, of_tasks in changes:
        if not place.is_vector and place.name not in left_out:
            place.of(targets).copy_(rule(of_tasks).mul_(scale).add_(place.of(bases)))
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
        target.copy_(rule(change.double(), *taus).add_(base))
    return Result.of_weights(packed, merged, f"{moved.method}+{method}", module, time.perf_counter() - started)
