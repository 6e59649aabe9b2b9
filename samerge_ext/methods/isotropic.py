"""Isotropic merging (arXiv 2502.04959): a sum of task vectors whose directions all count the same.

Iso-C. The singular values of Σ_t τ_t = U Σ Vᵀ [m, n] are replaced by their mean over all r = min(m, n):

    M = σ̄ U Vᵀ

Iso-CTS. Of the r directions the least ones give way to T × s of the tasks' own, orthogonal to the common ones U_c: the s largest
of (I − U_c U_cᵀ) τ_t for each. U and V, common and own vectors side by side, are made orthonormal by their polar factors:

    M = σ̄ U⊥ V⊥ᵀ,   σ̄ the mean of all their singular values,   s = round((r − ⌊f r⌋) / T)

In both a direction of no length stays one: where all τ_t have a small rank, as LoRA's, M has the rank of their sum. A tensor
[m, …] counts as [m, rest]; tensors of one dimension are averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from samerge_ext.merged.result import Result
from samerge_ext.methods.matrixwise import merge_matrixwise
from samerge_ext.ops.singular import polar_factor, singular_vectors
from samerge_ext.packing.matrices import Patterns
from samerge_ext.packing.packed_weights import PackedWeights


def iso_c(packed: PackedWeights, scale: float = 1.0, *, averaged: Patterns = (), module: nn.Module | None = None) -> Result:
    """θ₀ + λ M, M of Iso-C.

    scale: λ. averaged: shell-style patterns of matrices that are averaged as well ("*embeddings*").

    A matrix [m, n] takes some 24 m n + 24 min(m, n)² bytes, in fp64. The errors are those of `matrixwise.merge_matrixwise`.
    """
    return merge_matrixwise(packed, _common, "iso_c", scale, averaged=averaged, module=module)


def iso_cts(
    packed: PackedWeights,
    scale: float = 1.0,
    common: float = 0.8,
    *,
    transposed: Patterns = (),
    averaged: Patterns = (),
    module: nn.Module | None = None,
) -> Result:
    """θ₀ + λ M, M of Iso-CTS.

    scale: λ. common: f, the share of directions that are common, 0 … 1.
    transposed: shell-style patterns of matrices that are stored [inputs, outputs]: what is common is so in their outputs.
    averaged: of matrices that are averaged as well.

    Memory and errors are those of `iso_c`; ValueError also for a share outside of 0 … 1.
    """
    if not 0 <= common <= 1:
        raise ValueError(f"common={common} is not a share from 0 to 1")
    rule = partial(_common_and_own, common=common)
    return merge_matrixwise(packed, rule, "iso_cts", scale, transposed=transposed, averaged=averaged, module=module)


def _common(task_vectors: Sequence[Tensor]) -> Tensor:
    factor, sigma = polar_factor(_sum(task_vectors))
    return sigma.mean() * factor


def _common_and_own(task_vectors: Sequence[Tensor], common: float) -> Tensor:
    tasks, rank = len(task_vectors), min(task_vectors[0].shape)
    # As many for every task; rounding up must not take more directions than there are.
    own = min(round((rank - int(common * rank)) / tasks), rank // tasks)
    shared = singular_vectors(_sum(task_vectors), rank - own * tasks)
    basis = shared[0]
    parts = [shared, *(singular_vectors(tau.double() - basis @ (basis.mT @ tau.double()), own) for tau in task_vectors)]
    left, sigma, right = (torch.cat(part, -1) for part in zip(*parts, strict=True))
    return sigma.mean() * polar_factor(left)[0] @ polar_factor(right)[0].mT


def _sum(task_vectors: Sequence[Tensor]) -> Tensor:
    total = task_vectors[0].double()
    for tau in task_vectors[1:]:
        total = total + tau
    return total
