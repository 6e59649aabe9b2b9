"""Singular value calibration (arXiv 2602.05536): what several tasks put into one direction of a merge counts once.

A merge of T tasks is θ₀ + M, M = U Σ Vᵀ. Along u_r, task t has u_rᵀ τ_t and the merge σ_r v_rᵀ, which goes
s_{r,t} times as far in the task's own direction; where tasks agree, s is above 1. Directions are scaled by the mean of these:

    s_{r,t} = σ_r v_rᵀ τ_tᵀ u_r / ‖τ_tᵀ u_r‖²,   γ_r = T / Σ_t max(α, s_{r,t}),   M' = Σ_r γ_r σ_r u_r v_rᵀ

It follows any merge. Where a task has nothing along u_r its s is 0. A tensor [m, …] counts as [m, rest]; tensors of one
dimension stay.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from samerge_ext.merged.result import Result
from samerge_ext.methods.arithmetic import task_arithmetic
from samerge_ext.methods.matrixwise import recalibrate
from samerge_ext.ops.singular import singular_vectors
from samerge_ext.packing.matrices import Patterns
from samerge_ext.packing.packed_weights import PackedWeights


def svc(
    packed: PackedWeights,
    alpha: float = 1.0,
    *,
    merge: Callable[[PackedWeights], Result] = task_arithmetic,
    transposed: Patterns = (),
    left_out: Patterns = (),
    module: nn.Module | None = None,
) -> Result:
    """θ₀ + M', M' as above.

    alpha: α, positive; at 1 and above no direction becomes longer.
    merge: what is calibrated: any method whose M does not depend on θ₀, by default `task_arithmetic` at λ = 0.3
        (``partial(sm.ties, density=0.2)``, ``lambda packed: sm.task_arithmetic(packed, result.coefficients)``).
    transposed: shell-style patterns of matrices that are stored [inputs, outputs]; u_r are directions of outputs.
    left_out: of matrices that stay as they are.

    A matrix [m, n] takes some 48 (m n + min(m, n)²) bytes, in fp64. Raises ValueError for an α that is not positive and where
    task vectors are quantised, TypeError where they lie in a file or are factors; the other errors are those of
    `matrixwise.recalibrate`.
    """
    if not 0 < alpha < torch.inf:
        raise ValueError(f"alpha={alpha}; it must be positive and finite")
    stored = packed.exact_task_vectors("svc").unbind()
    rule = partial(_calibrated, alpha=alpha)
    return recalibrate(packed, merge, rule, "svc", stored, transposed=transposed, left_out=left_out, module=module)


def _calibrated(merged: Tensor, *task_vectors: Tensor, alpha: float) -> Tensor:
    left, sigma, right = singular_vectors(merged)
    counted = torch.zeros_like(sigma)
    for tau in task_vectors:
        own = left.mT @ tau.double()  # [r, n]
        along = sigma * (own * right.mT).sum(1) / own.square().sum(1)
        counted += along.nan_to_num(0.0).clamp(min=alpha)
    return left * (len(task_vectors) / counted * sigma) @ right.mT
