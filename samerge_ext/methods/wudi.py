"""WUDI-Merging (arXiv 2503.08099) in closed form: a matrix that does to every task's inputs what its expert's does.

The rows of τ_t lie in the space of the task's inputs (they are sums of its gradients), so a merged M disturbs task t as far as
(M − τ_t) τ_tᵀ is not zero. The paper lets Adam minimise the first term below; it is a least-squares problem, whose solution the
second term makes unique and keeps near the sum of the task vectors:

    min_M Σ_t ‖(M − τ_t) τ_tᵀ‖² / ‖τ_t‖² + μ ‖M − Σ_t τ_t‖²   ⇒   M = (B + μ Σ_t τ_t)(G + μ I)⁻¹
    G = Σ_t τ_tᵀτ_t / ‖τ_t‖²,   B = Σ_t τ_t τ_tᵀτ_t / ‖τ_t‖²,   μ = ridge · mean diag G

ACE-Merging (arXiv 2603.02945) solves a neighbouring problem; docs/methods.md says what differs.

M is a sum of one part for each task, τ'_t = (τ_t τ_tᵀτ_t / ‖τ_t‖² + μ τ_t)(G + μ I)⁻¹: preconditioned task vectors. Tensors of
one dimension are added up, which is what a matrix becomes for a large μ; a tensor [m, …] counts as [m, rest], and a stack of a
mixture's experts or of layers as what is stacked (`packing.matrices.stack_of`).

Of LoRA experts, τ_t = A_t R_t, only what the factors span is solved for. With all R_t in one matrix R and D of the blocks
A_tᵀA_t / ‖τ_t‖² is G = Rᵀ D R, and since R (Rᵀ D R + μ I)⁻¹ = (R Rᵀ D + μ I)⁻¹ R, τ'_t = A_t R'_t keeps its rank:

    R'_t = (R_t R_tᵀ A_tᵀA_t / ‖τ_t‖² + μ I) [(R Rᵀ D + μ I)⁻¹ R]_t          [·]_t: rows of task t
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from samerge_ext.elementwise.piecewise import Piece, Rule
from samerge_ext.merged.result import Result
from samerge_ext.packing.factors import FactoredTaskVectors
from samerge_ext.packing.kept_experts import experts_of
from samerge_ext.packing.matrices import (
    MatrixChange,
    Patterns,
    fitting,
    matrix_changes,
    matrix_views,
    stack_of,
    turned_round,
    whole,
)
from samerge_ext.packing.packed_weights import PackedWeights

RIDGE = 0.3
AT_ONCE = 512  # rows that are solved for together where a matrix comes from a file


def preconditioned(
    packed: PackedWeights, ridge: float = RIDGE, *, transposed: Patterns = (), summed: Patterns = ()
) -> PackedWeights:
    """The same base with every τ'_t in the place of τ_t: their sum is WUDI's M, and λ = 1 where they are merged.

    ridge: μ over the mean of G's diagonal.
    transposed: shell-style patterns of the matrices that are stored [inputs, outputs], GPT-2's Conv1D say ("*.c_attn.weight").
    summed: of those that are added up as vectors are. Embeddings ("*embeddings*") may be: the rows of their task vectors are no
        inputs.

    Teachers are the experts as they were packed, which are held for them. One matrix is solved after the other, in some
    16 n (n + 2 m) bytes for [m, n] and those of T Grams where n ≤ m: in the task vectors' type, fp32 at least, the equations in
    fp64. LoRA factors stay factors of their rank, and are solved for among all tasks' R ranks, in some 16 R (n + R) bytes.

    Raises ValueError for a ridge that is not positive, a pattern that fits nothing, NaN and Inf, and where task vectors are
    quantised; TypeError where they lie in a file.
    """
    _check(ridge)
    stored, task_vectors = packed.task_vectors, packed.task_vectors
    if isinstance(stored, FactoredTaskVectors):
        task_vectors = _preconditioned_factors(packed, stored, ridge, transposed, summed)
    else:
        task_vectors = packed.exact_task_vectors("preconditioning").clone()
        for name, matrices in matrix_views(packed.layout, task_vectors, transposed=transposed, left_out=summed):
            for matrix, solved in zip(matrices, _solved(matrices, ridge, name), strict=True):
                matrix.copy_(solved)
    return replace(packed, task_vectors=task_vectors, experts=experts_of(packed))


def wudi(
    packed: PackedWeights,
    ridge: float = RIDGE,
    scale: float = 1.0,
    *,
    transposed: Patterns = (),
    summed: Patterns = (),
    module: nn.Module | None = None,
) -> Result:
    """θ₀ + λ M, M as above.

    ridge, transposed, summed: see `preconditioned`, whose errors are raised. scale: λ.
    """
    started = time.perf_counter()
    _check(ridge)
    if isinstance(packed.task_vectors, FactoredTaskVectors):
        merged = preconditioned(packed, ridge, transposed=transposed, summed=summed).merge(packed.coefficients(scale))
        return Result.of_weights(packed, merged, "wudi", module, time.perf_counter() - started)
    stored = packed.exact_task_vectors("WUDI")
    merged = packed.merge(packed.coefficients(scale))
    rows = [packed.base, merged, *stored]
    for name, (base, target, *matrices) in matrix_views(packed.layout, rows, transposed=transposed, left_out=summed):
        factor, sides = _equations(matrices, ridge, name)
        total = next(sides)
        for side in sides:
            total += side
        target.copy_(base + scale * _solve(total, factor))
    return Result.of_weights(packed, merged, "wudi", module, time.perf_counter() - started)


class Wudi(Rule):
    """WUDI over a matrix of ``shape``, or a stack of them, for T = count task vectors: a `piecewise.Rule`.

    What it holds from its round to the last piece are T Grams [n, n] in the task vectors' type, fp32 at least, and a factor in
    fp64. A piece has whole rows, some of which are solved for at once; of a matrix that is stored [inputs, outputs] it has all.
    """

    rounds, alone = 1, True

    def __init__(
        self, name: str, shape: torch.Size, count: int, ridge: float = RIDGE, scale: float = 1.0, transposed: bool = False
    ):
        self.name, self.count, self.ridge, self.scale, self.turned = name, count, ridge, scale, transposed
        self.parts, shape = stack_of(name, shape)
        self.inputs = shape[0] if transposed else shape[1:].numel()
        self.unit = max(1, shape.numel() if transposed else self.inputs)
        self._size = shape.numel()  # of a part
        self._mu = 0.0
        self._grams: Tensor | None = None  # [T, n, n]
        self._factor: Tensor | None = None  # [n, n]

    def look(self, piece: Piece) -> None:
        rows = self._matrices(piece.rows())
        if self._grams is None:
            wide = torch.promote_types(rows.dtype, torch.float32)
            self._grams = torch.zeros(self.count, self.inputs, self.inputs, dtype=wide, device=rows.device)
        for gram, matrix in zip(self._grams, rows, strict=True):
            matrix = matrix.to(gram.dtype)
            gram.addmm_(matrix.mT, matrix)

    def next_round(self) -> None:
        if self._grams is None:
            return
        squares = self._grams.diagonal(dim1=1, dim2=2).double().sum(1)
        self._mu = _mu(self.ridge, squares.tolist(), self.inputs, self.name)
        self._grams /= torch.where(squares > 0, squares, 1).to(self._grams)[:, None, None]
        self._factor = _factor(self._grams, self._mu, self.name)

    def merge(self, piece: Piece) -> Tensor:  # [n]
        out = piece.base.clone()
        if self._factor is None:
            return out
        target = self._matrices(out[None, : piece.size])[0]  # [m, n]
        for some, rows in zip(target.split(AT_ONCE), self._matrices(piece.rows()).split(AT_ONCE, 1), strict=True):
            some += self.scale * self._solved(rows)
        if (piece.start + piece.size) % self._size == 0:
            self._grams = self._factor = None  # the rules of all tensors are held
        return out

    def _matrices(self, rows: Tensor) -> Tensor:  # [T, numbers] -> [T, m, n]
        return rows.view(len(rows), self.inputs, -1).mT if self.turned else rows.view(len(rows), -1, self.inputs)

    def _solved(self, rows: Tensor) -> Tensor:  # [T, m, n] -> [m, n] of M, fp64
        assert self._grams is not None and self._factor is not None
        wide = rows.to(self._grams.dtype)
        side = self._mu * wide.sum(0, dtype=torch.float64)
        for matrix, gram in zip(wide, self._grams, strict=True):
            side += matrix @ gram
        return _solve(side, self._factor)

    @property
    def shares(self) -> list[float]:
        return [self.scale] * self.count


def _check(ridge: float) -> None:
    if not 0 < ridge < torch.inf:
        raise ValueError(f"ridge={ridge}; it must be positive and finite")


def _solved(matrices: Sequence[Tensor], ridge: float, name: str) -> Iterator[Tensor]:
    """τ'_t [m, n] for every τ_t [m, n], fp64."""
    factor, sides = _equations(matrices, ridge, name)
    return (_solve(side, factor) for side in sides)


def _mu(ridge: float, squares: Sequence[float], n: int, name: str) -> float:
    """μ, from all ‖τ_t‖²; raises ValueError where one is not finite."""
    if not all(square < torch.inf for square in squares):
        raise ValueError(f"'{name}' of a task vector holds NaN or Inf")
    # The diagonal of each term of G sums to 1. Where nothing changed, M is nothing for any μ.
    return ridge * sum(square > 0 for square in squares) / n or 1.0


def _factor(terms: Iterable[Tensor], mu: float, name: str) -> Tensor:
    """The Cholesky factor of G + μ I, fp64, from the terms of G [n, n]; in the place of G, which may be the largest there is.

    Raises ValueError where a small ridge leaves it singular.
    """
    left: Tensor | None = None
    for term in terms:
        if left is None:
            left = torch.zeros_like(term, dtype=torch.float64)
        for rows, added in zip(left.split(AT_ONCE), term.split(AT_ONCE), strict=True):
            rows += added  # all at once they would be copied into fp64
    assert left is not None
    left.diagonal().add_(mu)
    factor, info = left.mT, torch.empty((), dtype=torch.int32, device=left.device)  # its own mirror image, columns side by side
    torch.linalg.cholesky_ex(factor, out=(factor, info))
    if info:
        raise ValueError(f"'{name}': the equations are singular, of task vectors with as few directions; raise ridge")
    return factor


def _solve(side: Tensor, factor: Tensor) -> Tensor:
    """side [m, n] (G + μ I)⁻¹."""
    half = torch.linalg.solve_triangular(factor, side.mT, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True).mT


def _equations(matrices: Sequence[Tensor], ridge: float, name: str) -> tuple[Tensor, Iterator[Tensor]]:
    """The Cholesky factor of G + μ I [n, n], and of every τ_t [m, n] the right side τ_t τ_tᵀτ_t / ‖τ_t‖² + μ τ_t; fp64."""
    wide = torch.promote_types(matrices[0].dtype, torch.float32)
    squares = [float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2 for matrix in matrices]
    m, n = matrices[0].shape
    mu = _mu(ridge, squares, n, name)
    terms: list[Tensor] = []  # of G, where both sides of the equations are made of them

    def term(matrix: Tensor, square: float) -> Tensor:
        exact = matrix.to(wide)
        found = exact.mT @ exact / (square or 1.0)
        if m >= n:
            terms.append(found)
        return found

    def side(task: int, matrix: Tensor, square: float) -> Tensor:
        exact = matrix.to(wide)
        own = exact @ terms[task] if m >= n else (exact @ exact.mT) @ exact / (square or 1.0)
        return own.double().add_(exact, alpha=mu)

    return _factor(map(term, matrices, squares), mu, name), map(side, range(len(matrices)), matrices, squares)


def _preconditioned_factors(
    packed: PackedWeights, stored: FactoredTaskVectors, ridge: float, transposed: Patterns, summed: Patterns
) -> FactoredTaskVectors:
    layout, changes = stored.layout, dict(stored.changes)
    left_out = fitting(layout, summed)
    for place, found in matrix_changes(packed, "preconditioning", transposed=transposed):
        name, layer = place.name, layout.names.index(place.name)
        if place.is_vector or name in left_out:
            continue
        factors = [change for change in found if not isinstance(change, Tensor)]
        if len(factors) == len(found):
            solved: Sequence[MatrixChange] = _solved_factors(factors, ridge, name)
        else:  # an adapter's own tensor, beside factors
            solved = [part.to(stored.dtype) for part in _solved([whole(change) for change in found], ridge, name)]
        changes[layer] = tuple(turned_round(change) if place.turned else change for change in solved)
    return FactoredTaskVectors(layout, changes, stored.num_tasks, stored.dtype)


def _solved_factors(factors: Sequence[tuple[Tensor, Tensor]], ridge: float, name: str) -> list[MatrixChange]:
    """The factors of τ'_t for those of every τ_t, which may have none."""
    rows = torch.cat([right for _, right in factors])  # [R, n]
    ranks = [len(right) for _, right in factors]
    products = rows.double() @ rows.double().mT
    columns = [left.double().mT @ left.double() for left, _ in factors]  # A_tᵀA_t
    own = [block.split(ranks, 1)[t] for t, block in enumerate(products.split(ranks))]  # R_t R_tᵀ
    squares = [float((c * p).sum()) for c, p in zip(columns, own, strict=True)]
    mu = _mu(ridge, squares, rows.shape[1], name)
    scaled = [c / (square or 1.0) for c, square in zip(columns, squares, strict=True)]
    unit = torch.eye(len(rows), dtype=torch.float64, device=rows.device)
    system = products @ torch.block_diag(*scaled) + mu * unit
    sides = torch.block_diag(*(p @ c for p, c in zip(own, scaled, strict=True))) + mu * unit
    solved = (torch.linalg.solve(system, sides, left=False) @ rows.double()).to(rows).split(ranks)
    return [(left, right) for (left, _), right in zip(factors, solved, strict=True)]
