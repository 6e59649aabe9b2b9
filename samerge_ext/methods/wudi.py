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
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from samerge_ext.checkpoints.sources import Source, matches
from samerge_ext.merged.result import Result
from samerge_ext.packing.packed_weights import PackedWeights

RIDGE = 0.3


def preconditioned(packed: PackedWeights, ridge: float = RIDGE, *, transposed: str | Sequence[str] = ()) -> PackedWeights:
    """The same base with every τ_t in the place of which stands τ'_t: their sum is WUDI's M, and λ = 1 where they are merged.

    ridge: μ over the mean of G's diagonal; from 0.1 to 1 it makes little difference.
    transposed: shell-style patterns of the matrices that are stored [inputs, outputs], GPT-2's Conv1D say ("*.c_attn.weight").

    Teachers are the experts as they were packed, which are held for them. One matrix is solved after the other, in some
    8 n (2 n + (T + 2) m) bytes for [m, n]: Grams in the task vectors' type, fp32 at least, the equations in fp64. In fp32 M is
    right to 2e-4 of its norm or better (that is for singular values that fall as 1/i² and n = 3,072; 1e-7 where they are equal).

    Raises ValueError for a ridge that is not positive, for NaN and Inf, and where task vectors are quantised; TypeError where
    they lie in a file or are factors.
    """
    _check(ridge)
    stored = packed.exact_task_vectors("preconditioning")
    patterns = (transposed,) if isinstance(transposed, str) else tuple(transposed)
    task_vectors = stored.clone()
    rows = [packed.layout.views(row) for row in task_vectors]
    for name, first in rows[0].items():
        if first.dim() < 2:
            continue
        matrices = [views[name].flatten(1) for views in rows]
        if matches(name, patterns):
            matrices = [matrix.mT for matrix in matrices]
        for matrix, result in zip(matrices, _solved(matrices, ridge, name), strict=True):
            matrix.copy_(result)
    experts = {task: _Packed(packed, row, f"expert '{task}'") for task, row in zip(packed.tasks, stored, strict=True)}
    return replace(packed, task_vectors=task_vectors, experts={**experts, **packed.experts})


class _Packed(Source):
    """An expert as it was packed: base and task vector, added up tensor by tensor."""

    def __init__(self, packed: PackedWeights, task_vector: Tensor, label: str):  # [N]
        self.label, self.names, self.aliases = label, packed.layout.names, packed.aliases
        self._stored = frozenset(self.names)
        self._layout, self._unchanged = packed.layout, packed.unchanged
        self._base, self._task_vector = packed.layout.views(packed.base), packed.layout.views(task_vector)

    def _shape(self, name: str) -> torch.Size:
        return self._layout.shapes[self.names.index(name)]

    def _dtype(self, name: str) -> torch.dtype:
        return self._read(name).dtype

    def _read(self, name: str) -> Tensor:
        return self._unchanged[name] if name in self._unchanged else self._base[name] + self._task_vector[name]


def wudi(
    packed: PackedWeights,
    ridge: float = RIDGE,
    scale: float = 1.0,
    *,
    transposed: str | Sequence[str] = (),
    module: nn.Module | None = None,
) -> Result:
    """θ₀ + λ M, M as above.

    ridge, transposed: see `preconditioned`, whose errors are raised. scale: λ.
    """
    started = time.perf_counter()
    found = preconditioned(packed, ridge, transposed=transposed)
    merged = found.merge(found.coefficients(scale))
    return Result.of_weights(packed, merged, "wudi", module, time.perf_counter() - started)


def _check(ridge: float) -> None:
    if not 0 < ridge < torch.inf:
        raise ValueError(f"ridge={ridge}; it must be positive and finite, 0.1 to 1 are usual")


def _solved(matrices: Sequence[Tensor], ridge: float, name: str) -> list[Tensor]:
    """τ'_t [m, n] fp64 of every τ_t [m, n]."""
    wide = torch.promote_types(matrices[0].dtype, torch.float32)
    exact = [matrix.to(wide) for matrix in matrices]
    squares = [float(matrix.double().square().sum()) for matrix in exact]
    if not all(square < torch.inf for square in squares):
        raise ValueError(f"'{name}' of a task vector holds NaN or Inf")
    changed = sum(square > 0 for square in squares)
    m, n = exact[0].shape
    if not changed:
        return list(exact)
    gram = torch.zeros(n, n, dtype=torch.float64, device=exact[0].device)
    for matrix, square in zip(exact, squares, strict=True):
        if square:
            gram += (matrix.mT @ matrix).double() / square
    mu = ridge * changed / n  # the diagonal of every term of G sums to 1
    gram.diagonal().add_(mu)
    factor = torch.linalg.cholesky(gram)
    found = []
    for matrix, square in zip(exact, squares, strict=True):
        own = (matrix @ matrix.mT) @ matrix if m < n else matrix @ (matrix.mT @ matrix)
        right = own.double() / (square or 1.0) + mu * matrix.double()
        found.append(torch.cholesky_solve(right.mT, factor).mT)
    return found
