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
from samerge_ext.packing.matrices import MatrixChange, Patterns, shape_of, whole
from samerge_ext.packing.packed_weights import PackedWeights


def iso_c(packed: PackedWeights, scale: float = 1.0, *, averaged: Patterns = (), module: nn.Module | None = None) -> Result:
    """θ₀ + λ M, M of Iso-C.

    scale: λ. averaged: shell-style patterns of matrices that are averaged as well ("*embeddings*").

    A matrix [m, n] takes some 40 (m n + min(m, n)²) bytes, in fp64; of T experts' LoRA factors (task_vector_dtype="lora") of
    rank r, one of T r rows is decomposed. The errors are those of `matrixwise.merge_matrixwise`.
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


def _common(changes: Sequence[MatrixChange]) -> Tensor:
    total = _sum(changes)
    if isinstance(total, Tensor):
        factor, sigma = polar_factor(total)
        return factor.mul_(sigma.mean())
    left, sigma, right = singular_vectors(total)
    return left.mul_(sigma.sum() / min(shape_of(total))) @ right.mT


def _common_and_own(changes: Sequence[MatrixChange], common: float) -> Tensor:
    tasks, rank = len(changes), min(shape_of(changes[0]))
    # As many for every task; rounding up must not take more directions than there are.
    own = min(round((rank - int(common * rank)) / tasks), rank // tasks)
    shared = singular_vectors(_sum(changes), rank - own * tasks)
    basis, longest = shared[0], shared[1][:1].sum()  # 0 where nothing is common
    parts = [shared, *(singular_vectors(_apart(change, basis), own, beside=longest) for change in changes)]
    left, sigma, right = (torch.cat(part, -1) for part in zip(*parts, strict=True))
    return polar_factor(left)[0].mul_(sigma.sum() / rank) @ polar_factor(right)[0].mT


def _sum(changes: Sequence[MatrixChange]) -> MatrixChange:
    """Σ_t τ_t; of factors, all of them side by side."""
    factors = [change for change in changes if isinstance(change, tuple)]
    if len(factors) == len(changes):
        return torch.cat([left for left, _ in factors], 1), torch.cat([right for _, right in factors], 0)
    total = whole(changes[0]).clone()
    for change in changes[1:]:
        total += change if isinstance(change, Tensor) else whole(change)
    return total


def _apart(change: MatrixChange, basis: Tensor) -> MatrixChange:
    """(I − U_c U_cᵀ) τ_t for U_c = basis [m, c]."""
    left = change.double() if isinstance(change, Tensor) else change[0].double()
    rest = left - basis @ (basis.mT @ left)
    return rest if isinstance(change, Tensor) else (rest, change[1])
