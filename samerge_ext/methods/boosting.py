"""Subspace boosting (arXiv 2506.16506): the small singular values of a merge are raised, so that it keeps its rank.

The more experts are merged, the more of θ = θ₀ + M, M = U Σ Vᵀ, lies in the few directions that they share. With k the first
place at which the largest singular values make up a share β of the sum of all,

    M' = U diag(max(σ_i, σ_k)) Vᵀ,   σ_1 + … + σ_k ≥ β Σ_i σ_i

It follows any merge. β = 0 makes all directions equal to the largest, β = 1 changes nothing. A direction of no length is not
raised. A tensor [m, …] counts as [m, rest]; tensors of one dimension stay.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from samerge_ext.merged.result import Result
from samerge_ext.methods.arithmetic import task_arithmetic
from samerge_ext.methods.matrixwise import recalibrate
from samerge_ext.ops.singular import singular_vectors
from samerge_ext.packing.matrices import Patterns
from samerge_ext.packing.packed_weights import PackedWeights


def subspace_boosting(
    packed: PackedWeights,
    beta: float = 0.01,
    *,
    merge: Callable[[PackedWeights], Result] = task_arithmetic,
    left_out: Patterns = (),
    module: nn.Module | None = None,
) -> Result:
    """θ₀ + M', M' as above.

    beta: β, 0 … 1.
    merge: what is boosted: any method whose M does not depend on θ₀, by default `task_arithmetic` at λ = 0.3
        (``partial(sm.ties, density=0.2)``, ``lambda packed: sm.task_arithmetic(packed, result.coefficients)``).
    left_out: shell-style patterns of matrices that stay ("*embeddings*").

    A matrix [m, n] takes some 40 (m n + min(m, n)²) bytes, in fp64. Raises ValueError for a share outside of 0 … 1; the other
    errors are those of `matrixwise.recalibrate`.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta={beta} is not a share from 0 to 1")
    return recalibrate(packed, merge, partial(_boosted, beta=beta), "subspace_boosting", left_out=left_out, module=module)


def _boosted(merged: Tensor, beta: float) -> Tensor:
    left, sigma, right = singular_vectors(merged)
    sums = sigma.cumsum(0)
    enough = sums >= beta * sums[-1]
    raised = sigma.maximum(sigma[enough].max())
    return left * raised @ right.mT
