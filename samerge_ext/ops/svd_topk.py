"""The k largest singular values of many matrices, and their vectors, without a full decomposition and without copies."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, overload

import torch

from . import krylov
from ._common import check_dtypes
from .gram_product import moments

Matrices = TypeVar("Matrices", Sequence[torch.Tensor], torch.Tensor)


@overload
def svd_topk(
    matrices: Sequence[torch.Tensor] | torch.Tensor,
    k: int,
    rtol: float = 1e-3,
    return_bound: Literal[False] = False,
    seed: int = 0,
    *,
    vectors: Literal[False] = False,
) -> torch.Tensor: ...
@overload
def svd_topk(
    matrices: Sequence[torch.Tensor] | torch.Tensor,
    k: int,
    rtol: float = 1e-3,
    *,
    return_bound: Literal[True],
    seed: int = 0,
    vectors: Literal[False] = False,
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def svd_topk(
    matrices: Matrices,
    k: int,
    rtol: float = 1e-3,
    return_bound: Literal[False] = False,
    seed: int = 0,
    *,
    vectors: Literal[True],
) -> tuple[Matrices, torch.Tensor, Matrices]: ...
@overload
def svd_topk(
    matrices: Matrices, k: int, rtol: float = 1e-3, *, return_bound: Literal[True], seed: int = 0, vectors: Literal[True]
) -> tuple[Matrices, torch.Tensor, Matrices, torch.Tensor]: ...
def svd_topk(
    matrices: Sequence[torch.Tensor] | torch.Tensor,
    k: int,
    rtol: float = 1e-3,
    return_bound: bool = False,
    seed: int = 0,
    *,
    vectors: bool = False,
) -> torch.Tensor | tuple:
    """The k largest singular values of every matrix, and their vectors where asked for, by block Lanczos over all matrices of
    one shape at once (`samerge_ext.ops.krylov` has the method, its bounds and sources).

    Every value has a relative error of at most `rtol`, except that one below 1e-6 of its matrix's largest is only known to lie
    there. A matrix that does not settle is decomposed as a whole in fp64, with a warning that names it. The scale of a matrix
    does not matter. Tensors of other than two dimensions: [d, …] counts as [d, rest], a vector or a number as one row, whose norm
    is the one singular value. Matrices are read where they lie; one is copied first only where neither its rows nor its columns
    are dense. Beyond that and the result, memory is at most 64 MiB (measured in fp32 up to 8,192 × 8,192, with vectors
    up to 4,096 × 4,096), but for a matrix that is decomposed as a whole. Not differentiable.

    Vectors u and v are orthonormal, W v = σ u, and ‖Wᵀu − σ v‖ ≤ rtol σ: they are those of a matrix that is as near to W. The
    angles to W's own are at most rtol σ / gap, the gap being that to the other values; of equal values any vectors will do. What
    belongs to a value below 1e-6 of the largest, or beyond min(m, n), is zero.

    Args:
        matrices: tensors of any shapes, or one tensor [B, m, n]; fp32, bf16, fp16 (computed in fp32, or fp64 where that does not
            settle a value) or fp64.
        k: at least 1; values beyond min(m, n) are 0.
        rtol: relative error, at least 1e-12.
        return_bound: whether to return the bounds as well; how they are found, and what they are worth, stands in `krylov`.
        seed: of the random start; the same seed gives the same result.
        vectors: whether to return singular vectors as well, for which the search takes longer.

    Returns:
        Values [B, k] in the order of `matrices`, descending; fp32 (fp64 where a matrix is fp64). With `return_bound` also a bound
        on every relative error, |σ̂ − σ| ≤ bound · σ̂; it exceeds `rtol` only for values below 1e-6 of the largest.

        With `vectors` left, values, right: left [B, m, k] and right [B, n, k] of one tensor, and of a list lists of [m, k] and
        [n, k]. With `return_bound` then, as the last, bounds of the residuals as well: ‖W v − σ u‖ and ‖Wᵀu − σ v‖, which are
        measured, are at most bound · σ̂. Where vectors in fp32 cannot say more, at 1e-7 σ₁ / σ, it exceeds `rtol`, too.

    Raises:
        ValueError: a matrix holds NaN or infinity (named by its index), or an argument is out of range.
        TypeError: a dtype is not one of the above.
    """
    if k < 1 or not 1e-12 <= rtol < 1:
        raise ValueError(f"k is {k} and rtol {rtol}; k must be at least 1, and rtol in 1e-12 … 1")
    if isinstance(matrices, torch.Tensor):
        if matrices.dim() != 3:
            raise ValueError(f"matrices has shape {list(matrices.shape)}; one tensor must be [B, m, n], else pass a list")
    tensors = [tensor.detach() for tensor in matrices]
    for i, tensor in enumerate(tensors):
        check_dtypes(**{f"matrices[{i}]": tensor})
        if tensor.device != tensors[0].device:
            raise ValueError(f"matrices[{i}] is on {tensor.device} but matrices[0] on {tensors[0].device}; move one of them")
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    eps = torch.finfo(dtype).eps
    sigma, bound = torch.zeros(2, 0, k)
    starts: list[torch.Tensor | None] = []
    if tensors:
        describe = lambda i: f"matrices[{i}] of shape {list(tensors[i].shape)}"
        _, sigma, bound, starts = statistics(tensors, [], describe, k, rtol, seed, all_moments=False, vectors=vectors)
    sides: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for i, tensor in enumerate(tensors if vectors else ()):
        left, right, sigma[i], bound[i] = _with_vectors(_rows(tensor), starts[i], sigma[i], bound[i], eps)
        sides[0].append(left.to(dtype))
        sides[1].append(right.to(dtype))
    values = sigma.to(dtype), (bound + eps * (bound > 0)).to(dtype)  # the result is rounded too
    if not vectors:
        return values if return_bound else values[0]
    found: list[Any] = [sides[0], values[0], sides[1], values[1]]
    if isinstance(matrices, torch.Tensor):
        for place, side, length in zip((0, 2), sides, matrices.shape[1:]):
            found[place] = torch.stack(side) if side else torch.zeros(0, length, k)
    return tuple(found if return_bound else found[:3])


def search_bytes(m: int, n: int, k: int) -> int:
    """What `svd_topk` takes beside one matrix [m, n] for its k largest values and their vectors, where it settles."""
    return krylov.search_bytes(m, n, k) + 4 * (m + n) * k * 8  # vectors in fp64, of both sides and their products


def statistics(
    tensors: list[torch.Tensor],
    bases: list[torch.Tensor],
    describe: Callable[[int], str],
    k: int,
    rtol: float,
    seed: int,
    all_moments: bool = True,
    vectors: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor | None]]:
    """Of every base + tensor (bases: none, or one for every tensor): moments [B, 4], singular values and bounds [B, k], fp64.

    With vectors also the singular vectors [min(k, m, n), min(m, n)] of the shorter side of `_as_matrix`, where it is not zero.
    Without all_moments, a pass over a matrix for its moments is made only where its scale is needed: they are NaN elsewhere.
    """
    groups: dict[tuple, list[int]] = {}
    matrices, added = [_as_matrix(t) for t in tensors], [_as_matrix(b) for b in bases]
    for i, matrix in enumerate(matrices):
        of_base = (added[i].dtype, added[i].stride()) if added else ()
        groups.setdefault((matrix.shape, matrix.dtype, matrix.stride(), of_base), []).append(i)
    device = tensors[0].device
    stats = torch.full((len(tensors), 4), torch.nan, dtype=torch.float64, device=device)
    sigma = torch.zeros(len(tensors), k, dtype=torch.float64, device=device)
    bound = torch.zeros_like(sigma)
    starts: list[torch.Tensor | None] = [None] * len(tensors)
    unsettled: list[int] = []

    def search(rows: list[int], scale: torch.Tensor) -> list[int]:
        """Fills sigma, bound and starts; -> the matrices whose numbers are out of range at this scale."""
        count = min(k, *matrices[rows[0]].shape)
        found = krylov.top_singular_values(*_select(matrices, added, rows), scale, count, rtol, seed, vectors)
        sigma[rows, :count] = found.sigma / scale[:, None]
        bound[rows, :count] = found.error / found.sigma
        if found.vectors is not None:
            for i, start in zip(rows, found.vectors):
                starts[i] = start
        flags = list(zip(rows, *torch.stack([found.settled, found.in_range]).tolist()))
        unsettled.extend(i for i, settled, in_range in flags if in_range and not settled)
        return [i for i, _, in_range in flags if not in_range]

    scaled = []  # groups whose scale is looked for, by a pass over their numbers
    for (shape, *_), rows in groups.items():
        if min(shape) > 1 and not all_moments:
            rows = search(rows, torch.ones_like(stats[rows, 3]))
        if rows:
            scaled.append(rows)
            stats[rows] = moments(*_select(matrices, added, rows))
    finite = {i: whether for rows in scaled for i, whether in zip(rows, stats[rows, 3].isfinite().tolist())}
    if not all(finite.values()):
        raise ValueError(f"{describe(min(i for i, whether in finite.items() if not whether))} holds NaN or infinity")

    for rows in scaled:
        rows = [i for i, largest in zip(rows, stats[rows, 3].tolist()) if largest > 0]
        if not rows:
            continue
        shape = matrices[rows[0]].shape
        if min(shape) == 1:
            sigma[rows, 0] = stats[rows, 2]
            bound[rows, 0] = 1e-15 * max(shape) ** 0.5
            for i in rows if vectors else ():
                starts[i] = sigma.new_ones(1, 1)
            continue
        unsettled += search(rows, torch.ldexp(torch.ones_like(stats[rows, 3]), -torch.frexp(stats[rows, 3])[1]))
    if unsettled:
        unsettled.sort()
        names = ", ".join(describe(i) for i in unsettled[:5]) + (", …" if len(unsettled) > 5 else "")
        warnings.warn(f"{len(unsettled)} of {len(tensors)} did not settle and are decomposed as a whole: {names}", stacklevel=3)
    for i in unsettled:
        sigma[i], bound[i], starts[i] = _exact(matrices[i], added[i] if added else None, k, vectors)
    return stats, sigma, bound.nan_to_num(nan=0.0), starts  # 0 / 0 where there is nothing to be wrong about


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """[d, …] as [d, rest], anything smaller as one row."""
    if tensor.dim() == 2:
        return tensor
    return tensor.reshape(tensor.shape[0] if tensor.dim() > 1 else 1, -1 if tensor.numel() else 0)


def _by_columns(matrix: torch.Tensor) -> bool:
    return matrix.stride(1) != 1 and matrix.stride(0) == 1


def _as_matrix(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or its transpose, as [m, n] with dense rows, a view wherever one can be had."""
    matrix = _rows(tensor)
    matrix = matrix.mT if _by_columns(matrix) else matrix
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _select(
    matrices: list[torch.Tensor], bases: list[torch.Tensor], rows: list[int]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return [matrices[i] for i in rows], [bases[i] for i in rows] if bases else []


def _exact(
    matrix: torch.Tensor, base: torch.Tensor | None, k: int, vectors: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    weight = matrix.double() if base is None else matrix.double() + base.double()
    m, n = weight.shape
    scale = 2.0 ** -torch.frexp(weight.abs().max())[1].item()
    start = None
    if vectors:
        left, values, right = torch.linalg.svd(weight * scale, full_matrices=False)
        start = right[:k] if n <= m else left[:, :k].mT
    else:
        values = torch.linalg.svdvals(weight * scale)
    values = values[:k]
    sigma, bound = weight.new_zeros(2, k)
    sigma[: len(values)] = values / scale
    bound[: len(values)] = max(m, n) * torch.finfo(torch.float64).eps * values[0] / values
    return sigma, bound, start


def _with_vectors(
    matrix: torch.Tensor, start: torch.Tensor | None, sigma: torch.Tensor, bound: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """left [m, k] and right [n, k] of W [m, n], its values and bounds [k]; fp64. start, sigma, bound: what `statistics` found.

    W is decomposed within the space of the start, so that W v = σ u to fp64's rounding and both are orthonormal, whatever the
    search's arithmetic was; ‖Wᵀu − σ v‖, what the space lacks, is measured. eps: to what the vectors will be rounded.
    """
    (m, n), k = matrix.shape, len(sigma)
    left, right = sigma.new_zeros(m, k), sigma.new_zeros(n, k)
    if start is None:
        return left, right, sigma, bound
    right_is_shorter = n < m or (n == m and not _by_columns(matrix))
    tall, long, short = (matrix, left, right) if right_is_shorter else (matrix.mT, right, left)
    space = torch.linalg.qr(start.mT)[0]
    mapped = _product(tall, space)
    scale = torch.ldexp(sigma.new_ones(()), -torch.frexp(sigma[0])[1])  # so that nothing that is squared leaves fp64
    u, s, zh = torch.linalg.svd(mapped * scale, full_matrices=False)
    v = space @ zh.mT
    residual = (_product(tall.mT, u) * scale - v * s).norm(dim=0)
    count = len(s)
    known = sigma[:count] > krylov.FLOOR * sigma[0]
    long[:, :count], short[:, :count] = u * known, v * known
    sigma, bound = sigma.clone(), bound.clone()
    sigma[:count] = torch.where(known, s / scale, sigma[:count])
    bound[:count] = torch.where(known, (residual + eps * s[0]) / s, bound[:count])
    return left, right, sigma.cummin(0)[0], bound


def _product(matrix: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """matrix [m, n] · vectors [n, k], fp64; of the matrix a few rows at a time are converted."""
    rows = max(1, 2**20 // matrix.shape[1])
    out = vectors.new_empty(matrix.shape[0], vectors.shape[1])
    for part, target in zip(matrix.split(rows), out.split(rows)):
        torch.mm(part.double(), vectors, out=target)
    return out
