"""The largest singular values of many matrices of one shape at once, with bounds on their errors.

Block Lanczos on A = WᵀW (or WWᵀ, whichever is smaller), which is never formed: a step multiplies A with a block of vectors,
which reads W once, and the new vectors are orthogonalised against all earlier ones. The eigenvalues θ₁ ≥ θ₂ … of A in the space
built so far approach σ₁² ≥ σ₂² … from below. The block is wider than k, so that repeated singular values are all found.

Bounds. The residual r_i = ‖A v_i − θ_i v_i‖ costs nothing: it is the part of the last block that leaves the space. θ_i is
taken to be off by at most 2 r_i, or by 4 r_i² / (θ_i − θ_b), b the block's width, where r_i is less than half that gap (Parlett,
The Symmetric Eigenvalue Problem, §11.7). The factors 2 and 4 stand for what no residual can show, the part of the spectrum
that the space has not met: they are margins, tested on random spectra of many kinds, not theorems. Rounding adds 8 ε σ₁² for
the ε of the arithmetic: in fp32 this settles values down to about σ₁ / 30 to a relative 1e-3; what it does not settle is
computed again in fp64, which settles them down to 1e-6 σ₁. The method: Golub, Luk and Overton, ACM TOMS 7 (1981).

Where the vectors v_i are asked for too, the search goes on until 2 r_i is below rtol θ_i: values, whose errors are of second
order in those of vectors, settle long before.

The steps are composed of torch's operators here, and once more in C++ (csrc/cpu/lanczos_*), where a thread can take a matrix
through several of them while it lies in the cache, and in CUDA (csrc/cuda/lanczos*), a few kernels each. Values and bounds are
found from their results, here, for every backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from samerge_ext import backend
from samerge_ext.ops.gram_product import WIDTH, gram_product

FLOOR = 1e-6  # of σ₁: a value known to lie below it counts as found
MAX_STEPS = 40
DIRECT_SIDE = 160  # up to here A itself is computed, by one product with the identity
_SPARE = 5  # vectors of a block beyond k
_BASIS_BYTES = 16 * 2**20  # of all bases of a batch, as long as they have _BASIS_BLOCKS
_BASIS_BLOCKS = 8
_LANES = 16  # the side of a basis vector is padded to a multiple of it
_FP32_RTOL = 1e-5  # below it fp32 cannot settle even σ₁
_CHECKS = (4, 5, *range(6, MAX_STEPS, 2))  # the steps after which values are computed, which costs more than a late step


class Found:
    """Values of B matrices as they become known: sigma, error [B, k] fp64, and which of the matrices are settled; where a side is
    given, also the vectors [B, k, side] fp64 of those that are.

    Out of range are those whose products are not finite, or near the ends of what fp32 can hold: they are not searched.
    """

    def __init__(self, batch: int, k: int, device: torch.device, side: int | None = None):
        self.sigma = torch.zeros(batch, k, dtype=torch.float64, device=device)
        self.error = torch.zeros_like(self.sigma)
        self.settled = torch.zeros(batch, dtype=torch.bool, device=device)
        self.in_range = torch.zeros_like(self.settled)
        self.vectors = None if side is None else torch.zeros(batch, k, side, dtype=torch.float64, device=device)

    def put(self, rows: slice | Tensor, some: Found) -> None:
        for name in ("sigma", "error", "settled", "in_range", *(("vectors",) if self.vectors is not None else ())):
            getattr(self, name)[rows] = getattr(some, name)


def top_singular_values(
    matrices: list[Tensor],  # B of [m, n], as gram_product takes them; none of them zero
    bases: list[Tensor],
    scale: Tensor,  # [B] fp64: powers of two; those that bring the largest magnitude near 1 bring every matrix into range
    k: int,  # at most min(m, n)
    rtol: float,
    seed: int,
    vectors: bool = False,
) -> Found:
    """σ₁ … σ_k of scale · (base + matrix) for every matrix, bounds on their absolute errors and, where asked for, the singular
    vectors of the shorter side, the right ones of a square matrix.

    Settled are those matrices whose every value has a relative error below rtol (with vectors: and their residuals, relative to
    it, are), or is known to lie below 1e-6 σ₁.
    """
    side = min(matrices[0].shape)
    wide = torch.float64 in (matrices[0].dtype, *(b.dtype for b in bases[:1])) or rtol < _FP32_RTOL
    width = _width(k)
    if side <= max(DIRECT_SIDE, 8 * width):
        return _in_batches(_direct, _direct_bytes(*matrices[0].shape), matrices, bases, scale, k, vectors, rtol)

    def search(wide: bool, matrices: list[Tensor], bases: list[Tensor], scale: Tensor) -> Found:
        bytes_each = (_BASIS_BLOCKS + 6) * width * side * (8 if wide else 4)
        dtype = torch.float64 if wide else torch.float32
        return _in_batches(_krylov, bytes_each, matrices, bases, scale, k, vectors, rtol, width, seed, dtype)

    found = search(wide, matrices, bases, scale)
    rest = (found.in_range & ~found.settled).nonzero()[:, 0]
    if not wide and len(rest):
        found.put(rest, search(True, _pick(matrices, rest), _pick(bases, rest), scale[rest]))
    return found


def search_bytes(m: int, n: int, k: int) -> int:
    """What a search in one matrix takes beside it, at most: after MAX_STEPS, in fp64."""
    side, width = min(m, n), _width(k)
    return _direct_bytes(m, n) if side <= max(DIRECT_SIDE, 8 * width) else (MAX_STEPS + 6) * width * side * 8


def _width(k: int) -> int:
    """Of a block."""
    return -(-(k + _SPARE) // WIDTH) * WIDTH


def _direct_bytes(m: int, n: int) -> int:
    chunks = min(32, m * n // 2**18 + 1)  # of gram_product, each with a result of its own
    return (6 + chunks) * min(m, n) ** 2 * 8


def _pick(matrices: list[Tensor], rows: Tensor) -> list[Tensor]:
    return [matrices[i] for i in rows.tolist()] if matrices else []


def _in_batches(
    search: Callable[..., Found],
    bytes_each: int,
    matrices: list[Tensor],
    bases: list[Tensor],
    scale: Tensor,
    k: int,
    vectors: bool,
    *arguments: Any,
) -> Found:
    found = Found(len(matrices), k, scale.device, min(matrices[0].shape) if vectors else None)
    batch = max(1, _BASIS_BYTES // bytes_each)
    for i in range(0, len(matrices), batch):
        part = slice(i, i + batch)
        found.put(part, search(matrices[part], bases[part], scale[part], k, vectors, *arguments))
    return found


def _direct(matrices: list[Tensor], bases: list[Tensor], scale: Tensor, k: int, vectors: bool, rtol: float) -> Found:
    batch, side = len(matrices), min(matrices[0].shape)
    identity = torch.eye(-(-side // WIDTH) * WIDTH, side, dtype=torch.float64, device=scale.device)
    gram = gram_product(matrices, bases, identity.expand(batch, -1, -1), scale)[:, :side]  # [B, side, side]
    found = Found(batch, k, scale.device)
    found.in_range = _in_range(gram)
    gram = gram.where(found.in_range[:, None, None], 0)
    if vectors:
        values, every = torch.linalg.eigh(gram)
        found.vectors = every.flip(2)[:, :, :k].mT
    else:
        values = torch.linalg.eigvalsh(gram)
    values = values.flip(1)[:, :k]
    zero = torch.zeros_like(values)
    found.sigma, found.error, found.settled, _ = _judge(values, zero, zero if vectors else None, torch.float64, rtol)
    return found


def _in_range(products: Tensor) -> Tensor:  # [B, …] -> [B]
    largest = products.abs().flatten(1).amax(1)
    return (largest > 2.0**-50) & (largest < 2.0**50)  # not where NaN; squares of vectors like them are in range as well


def _judge(
    values: Tensor, error: Tensor, residual: Tensor | None, dtype: torch.dtype, rtol: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """θ [B, k], bounds on their errors and, where vectors count, on their residuals -> σ and bounds on its errors, or on the
    residuals of its vectors, [B, k]; [B] settled; [B] held up by rounding."""
    values = values.clamp(min=0)
    rounding = 8 * torch.finfo(dtype).eps * values[:, :1]
    total = error + rounding
    sigma = values.sqrt()
    bound = torch.minimum(total / (sigma + (values - total).clamp(min=0).sqrt()), total.sqrt())
    nothing = sigma + bound <= FLOOR * sigma[:, :1]
    if residual is not None:
        error = residual
        bound = torch.where(nothing, bound, (residual + rounding) / sigma)
    fine = (bound <= rtol * sigma) | nothing
    return sigma, bound, fine.all(1), (~fine & (error <= rounding)).any(1)


def _krylov(
    matrices: list[Tensor],
    bases: list[Tensor],
    scale: Tensor,
    k: int,
    vectors: bool,
    rtol: float,
    width: int,
    seed: int,
    dtype: torch.dtype,
) -> Found:
    batch, side, device = len(matrices), min(matrices[0].shape), scale.device
    found = Found(batch, k, device, side if vectors else None)
    rows = torch.arange(batch, device=device)  # the matrices still searched
    generator = torch.Generator("cpu").manual_seed(seed)
    start = torch.linalg.qr(torch.randn(width, side, generator=generator, dtype=torch.float64, device="cpu").mT)[0].mT
    steps = min(MAX_STEPS, side // width - 1)
    checks = [step for step in _CHECKS if step < steps] + [steps]
    blocks = min(_BASIS_BLOCKS, steps)
    basis = torch.zeros(batch, (blocks + 1) * width, -(-side // _LANES) * _LANES, dtype=dtype, device=device)
    basis[:, :width, :side] = start.to(device, dtype)
    projected = torch.zeros(batch, blocks * width, blocks * width, dtype=torch.float64, device=device)  # basis A basisᵀ

    for done, step in zip([0, *checks], checks):
        end = step * width
        if end > projected.shape[1]:
            more = projected.shape[1]
            basis = torch.nn.functional.pad(basis, (0, 0, 0, more))
            projected = torch.nn.functional.pad(projected, (0, more, 0, more))
        leaving = _lanczos(matrices, bases, scale, basis, projected, width, done, step)
        small = projected[:, :end, :end]
        if done == 0:
            found.in_range = _in_range(torch.cat([small.flatten(1), leaving.flatten(1)], 1))
            small, leaving = (t.where(found.in_range[:, None, None], 0) for t in (small, leaving))
        values, inner = torch.linalg.eigh(small)  # of the lower triangle
        values, inner = values.flip(1), inner.flip(2)[:, :, :k].mT  # [B, k, end]
        residual = (inner[:, :, -width:] @ leaving).norm(dim=2)  # [B, k]
        gap = values[:, :k] - values[:, width - 1 : width]
        error = torch.where(residual < gap / 2, 4 * residual.square() / gap, 2 * residual)
        sigma, bound, settled, held_up = _judge(values[:, :k], error, 2 * residual if vectors else None, dtype, rtol)
        found.sigma[rows], found.error[rows], found.settled[rows] = sigma, bound, settled
        if found.vectors is not None:
            for i in settled.nonzero()[:, 0].tolist():
                found.vectors[rows[i]] = inner[i].to(dtype) @ basis[i, :end, :side]
        keep = (found.in_range[rows] & ~(settled | held_up)).nonzero()[:, 0]  # which waits for a device
        if len(keep) == 0:
            break
        if len(keep) < len(rows):
            rows, scale, basis, projected = (t[keep] for t in (rows, scale, basis, projected))
            matrices, bases = _pick(matrices, keep), _pick(bases, keep)
    return found


def _lanczos(
    matrices: list[Tensor],
    bases: list[Tensor],
    scale: Tensor,
    basis: Tensor,
    projected: Tensor,
    width: int,
    first: int,
    last: int,
) -> Tensor:
    """Steps `first` … `last` − 1. A step's q lies in basis [B, capacity, padded side] at step · width; its results are the
    rows of `projected` there, the next q behind it and, of the last step, what is returned: leaving [B, width, width]."""
    if fused := backend.fused("lanczos", basis):
        return fused(matrices, bases, scale, basis, projected, width, first, last)
    side = min(matrices[0].shape)
    for step in range(first, last):
        begin, end = step * width, (step + 1) * width
        q, known = basis[:, begin:end, :side], basis[:, :end, :side]
        z = gram_product(matrices, bases, q.contiguous(), scale)
        inside = z @ known.mT  # [B, width, end]
        # z = inside · known + leaving · q. Twice, and normalised between, so that the second time removes what rounding left
        # even where little leaves the space. Where nothing does but rounding, arbitrary vectors widen it.
        leaving, q = _orthonormal_rows(torch.baddbmm(z, inside, known, alpha=-1))
        nothing = leaving.diagonal(dim1=1, dim2=2).abs() <= 8 * torch.finfo(z.dtype).eps * z.norm(dim=2)  # [B, width]
        q = torch.where(nothing[..., None], basis[:, :width, :side].roll(step + 1, 2), q)
        leaving = leaving.masked_fill(nothing[:, None], 0)
        again = q @ known.mT
        inside = torch.baddbmm(inside, leaving, again)
        last_leaving, q = _orthonormal_rows(torch.baddbmm(q, again, known, alpha=-1))
        basis[:, end : end + width, :side] = q
        projected[:, begin:end, :end] = inside.double()
    return (leaving @ last_leaving).double()


def _orthonormal_rows(block: Tensor) -> tuple[Tensor, Tensor]:
    """block [B, width, side] = factor [B, width, width] · rows [B, width, side]."""
    q, r = torch.linalg.qr(block.mT)
    return r.mT, q.mT
