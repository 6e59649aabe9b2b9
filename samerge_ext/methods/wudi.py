"""WUDI-Merging (arXiv 2503.08099) in closed form: a matrix that does to every task's inputs what its expert's does.

The rows of τ_t lie in the space of the task's inputs (they are sums of its gradients), so a merged M disturbs task t as far as
(M − τ_t) τ_tᵀ is not zero. The paper lets Adam minimise the first term below; it is a least-squares problem, whose solution the
second term makes unique and keeps near the sum of the task vectors:

    min_M Σ_t ‖(M − τ_t) τ_tᵀ‖² / ‖τ_t‖² + μ ‖M − Σ_t τ_t‖²   ⇒   M = (B + μ Σ_t τ_t)(G + μ I)⁻¹
    G = Σ_t τ_tᵀτ_t / ‖τ_t‖²,   B = Σ_t τ_t τ_tᵀτ_t / ‖τ_t‖²,   μ = ridge · mean diag G

M is a sum of one part for each task, τ'_t = (τ_t τ_tᵀτ_t / ‖τ_t‖² + μ τ_t)(G + μ I)⁻¹: preconditioned task vectors. Tensors of
one dimension are added up, which is what a matrix becomes for a large μ; a tensor [m, …] counts as [m, rest].
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from samerge_ext.checkpoints.sources import Source
from samerge_ext.merged.result import Result
from samerge_ext.packing.matrices import Patterns, matrix_views
from samerge_ext.packing.packed_weights import PackedWeights

RIDGE = 0.3


def preconditioned(packed: PackedWeights, ridge: float = RIDGE, *, transposed: Patterns = ()) -> PackedWeights:
    """The same base with every τ'_t in the place of τ_t: their sum is WUDI's M, and λ = 1 where they are merged.

    ridge: μ over the mean of G's diagonal.
    transposed: shell-style patterns of the matrices that are stored [inputs, outputs], GPT-2's Conv1D say ("*.c_attn.weight").

    Teachers are the experts as they were packed, which are held for them. One matrix is solved after the other, in some
    16 n (n + 2 m) bytes for [m, n]: Grams in the task vectors' type, fp32 at least, the equations in fp64.

    Raises ValueError for a ridge that is not positive, a pattern that fits nothing, NaN and Inf, and where task vectors are
    quantised; TypeError where they lie in a file or are factors.
    """
    stored = packed.exact_task_vectors("preconditioning")
    _check(ridge)
    task_vectors = stored.clone()
    for name, matrices in matrix_views(packed.layout, task_vectors, transposed=transposed):
        factor, sides = _equations(matrices, ridge, name)
        for matrix, side in zip(matrices, sides, strict=True):
            matrix.copy_(torch.cholesky_solve(side.mT, factor).mT)
    experts = {task: _Expert(packed, row, f"expert '{task}'") for task, row in zip(packed.tasks, stored, strict=True)}
    return replace(packed, task_vectors=task_vectors, experts={**experts, **packed.experts})


def wudi(
    packed: PackedWeights,
    ridge: float = RIDGE,
    scale: float = 1.0,
    *,
    transposed: Patterns = (),
    module: nn.Module | None = None,
) -> Result:
    """θ₀ + λ M, M as above.

    ridge, transposed: see `preconditioned`, whose errors are raised. scale: λ.
    """
    started = time.perf_counter()
    stored = packed.exact_task_vectors("WUDI")
    _check(ridge)
    merged = packed.merge(packed.coefficients(scale))
    for name, (base, target, *matrices) in matrix_views(packed.layout, [packed.base, merged, *stored], transposed=transposed):
        factor, sides = _equations(matrices, ridge, name)
        target.copy_(base + scale * torch.cholesky_solve(torch.stack(list(sides)).sum(0).mT, factor).mT)
    return Result.of_weights(packed, merged, "wudi", module, time.perf_counter() - started)


class _Expert(Source):
    """An expert as it was packed: base and task vector, added up tensor by tensor."""

    _stored: dict[str, Tensor]

    def __init__(self, packed: PackedWeights, task_vector: Tensor, label: str):  # [N]
        self.label, self.names, self.aliases = label, packed.layout.names, packed.aliases
        self._stored = {**packed.unchanged, **packed.layout.views(packed.base)}
        self._changes = packed.layout.views(task_vector)

    def _shape(self, name: str) -> torch.Size:
        return self._stored[name].shape

    def _dtype(self, name: str) -> torch.dtype:
        return self._stored[name].dtype

    def _read(self, name: str) -> Tensor:
        return self._stored[name] + self._changes[name] if name in self._changes else self._stored[name]


def _check(ridge: float) -> None:
    if not 0 < ridge < torch.inf:
        raise ValueError(f"ridge={ridge}; it must be positive and finite")


def _equations(matrices: Sequence[Tensor], ridge: float, name: str) -> tuple[Tensor, Iterator[Tensor]]:
    """The Cholesky factor of G + μ I [n, n], and of every τ_t [m, n] the right side τ_t τ_tᵀτ_t / ‖τ_t‖² + μ τ_t; fp64."""
    wide = torch.promote_types(matrices[0].dtype, torch.float32)
    squares = [float(matrix.double().square().sum()) for matrix in matrices]
    if not all(square < torch.inf for square in squares):
        raise ValueError(f"'{name}' of a task vector holds NaN or Inf")
    m, n = matrices[0].shape
    # The diagonal of each term of G sums to 1. Where nothing changed, M is nothing for any μ.
    mu = ridge * sum(square > 0 for square in squares) / n or 1.0
    left = mu * torch.eye(n, dtype=torch.float64, device=matrices[0].device)
    for matrix, square in zip(matrices, squares, strict=True):
        exact = matrix.to(wide)
        left += (exact.mT @ exact).double() / (square or 1.0)

    def side(matrix: Tensor, square: float) -> Tensor:
        exact = matrix.to(wide)
        own = (exact @ exact.mT) @ exact if m < n else exact @ (exact.mT @ exact)
        return own.double() / (square or 1.0) + mu * exact.double()

    return torch.linalg.cholesky(left), map(side, matrices, squares)
