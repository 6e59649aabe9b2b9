"""The k largest singular values of many matrices, without a full decomposition and without copies."""

import warnings
from collections.abc import Callable, Sequence
from typing import Literal, overload

import torch

from . import krylov
from ._common import check_dtypes
from .gram_product import moments


@overload
def svd_topk(
    matrices: Sequence[torch.Tensor] | torch.Tensor,
    k: int,
    rtol: float = 1e-3,
    return_bound: Literal[False] = False,
    seed: int = 0,
) -> torch.Tensor: ...
@overload
def svd_topk(
    matrices: Sequence[torch.Tensor] | torch.Tensor,
    k: int,
    rtol: float = 1e-3,
    *,
    return_bound: Literal[True],
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def svd_topk(
    matrices: Sequence[torch.Tensor] | torch.Tensor,
    k: int,
    rtol: float = 1e-3,
    return_bound: bool = False,
    seed: int = 0,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The k largest singular values of every matrix, by block Lanczos over all matrices of one shape at once
    (`samerge_ext.ops.krylov` has the method, its bounds and sources).

    Every value has a relative error of at most `rtol`, except that one below 1e-6 of its matrix's largest is only known to lie
    there. A matrix whose values do not settle goes to torch.linalg.svdvals in fp64, with a warning that names it. The scale of
    a matrix does not matter. Tensors of other than two dimensions: [d, …] counts as [d, rest]; of a vector or a number the norm
    is the one singular value. Matrices are read where they lie; one is copied first only where neither its rows nor its columns
    are dense. Beyond that, memory is at most 64 MiB (measured in fp32 up to 8,192 × 8,192), but for a matrix that goes to
    svdvals. Not differentiable.

    Args:
        matrices: tensors of any shapes, or one tensor [B, m, n]; fp32, bf16, fp16 (computed in fp32, or fp64 where that does not
            settle a value) or fp64.
        k: at least 1; values beyond min(m, n) are 0.
        rtol: relative error, at least 1e-12.
        return_bound: whether to return the bounds as well; how they are found, and what they are worth, stands in `krylov`.
        seed: of the random start; the same seed gives the same result.

    Returns:
        [B, k] in the order of `matrices`, descending; fp32 (fp64 where a matrix is fp64). With `return_bound` also a bound on
        every relative error, |σ̂ − σ| ≤ bound · σ̂; it exceeds `rtol` only for values below 1e-6 of the largest.

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
    if not tensors:
        empty = torch.zeros(0, k)
        return (empty, empty.clone()) if return_bound else empty
    describe = lambda i: f"matrices[{i}] of shape {list(tensors[i].shape)}"
    _, sigma, bound = statistics(tensors, [], describe, k, rtol, seed, all_moments=False)
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    if return_bound:
        return sigma.to(dtype), (bound + torch.finfo(dtype).eps * (bound > 0)).to(dtype)  # the result is rounded too
    return sigma.to(dtype)


def statistics(
    tensors: list[torch.Tensor],
    bases: list[torch.Tensor],
    describe: Callable[[int], str],
    k: int,
    rtol: float,
    seed: int,
    all_moments: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of every base + tensor (bases: none, or one for every tensor): moments [B, 4], singular values and bounds [B, k], fp64.

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
    unsettled: list[int] = []

    def search(rows: list[int], scale: torch.Tensor) -> list[int]:
        """Fills sigma and bound; -> the matrices whose numbers are out of range at this scale."""
        count = min(k, *matrices[rows[0]].shape)
        found = krylov.top_singular_values(*_select(matrices, added, rows), scale, count, rtol, seed)
        sigma[rows, :count] = found.sigma / scale[:, None]
        bound[rows, :count] = found.error / found.sigma
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
            continue
        unsettled += search(rows, torch.ldexp(torch.ones_like(stats[rows, 3]), -torch.frexp(stats[rows, 3])[1]))
    if unsettled:
        unsettled.sort()
        names = ", ".join(describe(i) for i in unsettled[:5]) + (", …" if len(unsettled) > 5 else "")
        warnings.warn(f"{len(unsettled)} of {len(tensors)} did not settle and go to svdvals: {names}", stacklevel=3)
    for i in unsettled:
        sigma[i], bound[i] = _exact(matrices[i], added[i] if added else None, k)
    return stats, sigma, bound.nan_to_num(nan=0.0)  # 0 / 0 where there is nothing to be wrong about


def _as_matrix(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as [m, n] with dense rows, a view wherever one can be had; the order of rows and columns does not matter."""
    if tensor.dim() != 2:
        tensor = tensor.reshape(tensor.shape[0] if tensor.dim() > 1 else 1, -1 if tensor.numel() else 0)
    if tensor.stride(1) != 1 and tensor.stride(0) == 1:
        tensor = tensor.mT
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _select(
    matrices: list[torch.Tensor], bases: list[torch.Tensor], rows: list[int]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return [matrices[i] for i in rows], [bases[i] for i in rows] if bases else []


def _exact(matrix: torch.Tensor, base: torch.Tensor | None, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    weight = matrix.double() if base is None else matrix.double() + base.double()
    scale = 2.0 ** -torch.frexp(weight.abs().max())[1].item()
    values = torch.linalg.svdvals(weight * scale)[:k]
    sigma, bound = weight.new_zeros(2, k)
    sigma[: len(values)] = values / scale
    bound[: len(values)] = max(weight.shape) * torch.finfo(torch.float64).eps * values[0] / values
    return sigma, bound
