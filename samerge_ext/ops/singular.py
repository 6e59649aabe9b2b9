"""Singular vectors and polar factors by products and one symmetric eigenproblem, in fp64.

The Gram of a matrix's short side has the eigenvalues σ² and the singular vectors of that side; one more product gives those of
the long side, and a polar factor is the matrix times the inverse root of its Gram. Newton–Schulz, which is products alone, takes
tens of them for a matrix of some condition, and of one of low rank it makes directions of rounding in the end; the eigenproblem
costs as much as five products on a CPU.

What it costs is accuracy at small σ: a vector is off by about ε (σ₁ / σ)² for the ε of fp64, at most 1e-4 at σ = 1e-6 σ₁.
What lies below counts as nothing: its σ and both its vectors are zero. LAPACK's vectors there are arbitrary, and a polar factor
would give them the weight of all others. A matrix of rank r has a polar factor of rank r.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-6  # of σ₁
_BLOCKS = 4  # of columns of a Gram, of which those above the diagonal are not computed twice
_LARGE, _SPARE = 1024, 32  # the side of a Gram from which on its few largest eigenvalues are found apart; vectors beyond these


def singular_vectors(
    matrix: Tensor | tuple[Tensor, Tensor], k: int | None = None, *, beside: Tensor | float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest singular values, all by default, and their vectors: U [m, k], σ [k] descending, V [n, k]; fp64.

    matrix: [m, n] of any float type, finite; or two factors [m, r] and [r, n], of whose product no more than r rows and columns
    are decomposed. Beyond min(m, n), or r, there are none.
    Of few of many directions `svd_topk(vectors=True)` is faster, and as near as is asked for.
    beside: a length, where a matrix is what is left of a longer one: below 1e-6 of it a σ is nothing, too.
    """
    if isinstance(matrix, tuple):
        (outer, rows), (inner, columns) = (torch.linalg.qr(side.double()) for side in (matrix[0], matrix[1].mT))
        left, sigma, right = singular_vectors(rows @ columns.mT, k, beside=beside)
        return outer @ left, sigma, inner @ right
    m, n = matrix.shape
    tall = (matrix if m >= n else matrix.mT).double()
    sigma, short = _right(tall, k, beside)
    long = tall @ (short / sigma.where(sigma > 0, 1))
    return (long, sigma, short) if m >= n else (short, sigma, long)


def inverse_root(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(XᵀX)^(−1/2) [n, n] of X = matrix [m, n], which makes X's polar factor of it, and σ [n] descending; fp64."""
    sigma, right = _right(matrix.double(), None, 0.0)
    return right / sigma.where(sigma > 0, 1) @ right.mT, sigma


def polar_factor(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """U Vᵀ [m, n] of matrix [m, n] = U Σ Vᵀ, the nearest matrix with orthonormal rows or columns, and σ [min(m, n)]; fp64."""
    if matrix.shape[0] < matrix.shape[1]:
        turned, sigma = polar_factor(matrix.mT)
        return turned.mT, sigma
    root, sigma = inverse_root(matrix)
    return matrix.double() @ root, sigma


def _right(matrix: Tensor, k: int | None, beside: Tensor | float) -> tuple[Tensor, Tensor]:
    """σ [k] descending and V [n, k] of a matrix [m, n], zero below the floor."""
    n = matrix.shape[1]
    gram = matrix.new_zeros(n, n)
    width = max(1, -(-n // _BLOCKS))
    for start in range(0, n, width):
        end = min(n, start + width)
        gram[start:end, :end] = matrix[:, start:end].mT @ matrix[:, :end]
        gram[:start, start:end] = gram[start:end, :start].mT
    if k is not None and 4 * (k + _SPARE) <= n >= _LARGE:
        squares, vectors = _largest(gram, k)
    else:
        squares, vectors = torch.linalg.eigh(gram)
    sigma = squares.flip(0)[:k].clamp(min=0).sqrt()
    known = sigma > FLOOR * sigma[:1].clamp(min=beside)
    return sigma * known, vectors.flip(1)[:, :k] * known


def _largest(gram: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest eigenvalues, ascending, and eigenvectors of a Gram [n, n], for little more than fp32's decomposition costs.

    What that is off by, some 1e-6 of the largest eigenvalue, fp64 takes away: among the last k + 32 vectors wholly (Rayleigh and
    Ritz), along the others to first order (Davidson, J. Comput. Phys. 17, 1975). Where a thousandth of the largest is more than
    the kth, or more than 1e-7 of the kth is left of residuals, fp64 decomposes the whole.
    """
    scale = gram.diagonal().amax().clamp(min=torch.finfo(gram.dtype).tiny)
    gram = gram / scale
    rough, vectors = torch.linalg.eigh(gram.float())
    if rough[-k] > 1e-3 * rough[-1]:
        others, some = vectors.split([len(gram) - k - _SPARE, k + _SPARE], 1)
        squares, some, residual = _ritz(gram, some.double())
        slope = (others.mT @ residual.float()) / (squares.float() - rough[: others.shape[1], None])
        # Where a gap is no larger than the residual there is no first order; 0 / 0 is where neither is anything.
        squares, some, residual = _ritz(gram, some + (others @ slope.nan_to_num(0.0).clamp(-1, 1)).double())
        if residual[:, -k:].norm(dim=0).amax() <= 1e-7 * squares[-k]:
            return squares[-k:] * scale, some[:, -k:]
    squares, vectors = torch.linalg.eigh(gram)
    return squares[-k:] * scale, vectors[:, -k:]


def _ritz(gram: Tensor, space: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues [w], ascending, and eigenvectors [n, w] of a Gram within a space [n, w] that is nearly orthonormal, and their
    residuals [n, w]."""
    space = torch.linalg.solve_triangular(torch.linalg.cholesky(space.mT @ space), space.mT, upper=False).mT
    image = gram @ space
    squares, turn = torch.linalg.eigh(space.mT @ image)
    vectors = space @ turn
    return squares, vectors, image @ turn - vectors * squares
