"""TSV-Merge (arXiv 2412.00081): every task keeps its largest singular vectors, made orthogonal to those of all others.

Of each of T tasks' τ_t [m, n] = U_t Σ_t V_tᵀ the min(m, n) / T largest singular values are kept, at least one. Side by side,
U = [U_1 … U_T] and V = [V_1 … V_T] are no longer orthonormal, where tasks interfere; the nearest matrices that are, U⊥ and V⊥,
are their polar factors:

    M = U⊥ diag(Σ_1 … Σ_T) V⊥ᵀ

What a task lacks in rank adds nothing, and of what two tasks share there is one direction. A merge takes M as it is for
matrices, a tensor [m, …] counting as [m, rest], and the mean of the task vectors for tensors of one dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from samerge_ext.merged.result import Result
from samerge_ext.methods.matrixwise import merge_matrixwise
from samerge_ext.ops.singular import inverse_root, singular_vectors
from samerge_ext.packing.matrices import MatrixChange, Patterns, shape_of
from samerge_ext.packing.packed_weights import PackedWeights


def tsv_m(packed: PackedWeights, scale: float = 1.0, *, averaged: Patterns = (), module: nn.Module | None = None) -> Result:
    """θ₀ + λ M, M as above.

    scale: λ. averaged: shell-style patterns of matrices that are averaged as well ("*embeddings*").

    One matrix [m, n] of one task is decomposed after the other, in some 40 (m n + min(m, n)²) bytes, in fp64; LoRA factors
    (task_vector_dtype="lora") of rank r as matrices of r rows. The errors are those of `matrixwise.merge_matrixwise`.
    """
    return merge_matrixwise(packed, _merged, "tsv_m", scale, averaged=averaged, module=module)


def _merged(changes: Sequence[MatrixChange]) -> Tensor:
    kept = max(1, min(shape_of(changes[0])) // len(changes))
    parts = (singular_vectors(change, kept) for change in changes)
    left, sigma, right = (torch.cat(part, -1) for part in zip(*parts, strict=True))
    core = inverse_root(left)[0] * sigma @ inverse_root(right)[0]  # M = U core Vᵀ
    return left @ core @ right.mT
