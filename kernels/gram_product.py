"""z = q WᵀW, or q WWᵀ where W has more columns than rows, W = scale · (base + matrix), for many matrices at once.

A program takes one chunk of one matrix, a panel at a time: some whole rows of a tall matrix, y = q W_pᵀ and z += y W_p, or
some columns of a wide one, y = q W_p and z += y W_pᵀ. Both products go over the panel in tiles, the second while the caches
hold it. A program adds its panels in its own row of partial sums, and the chunks are added in double: without atomics, so
that the result repeats to the bit. Moves W once from memory and once from the cache for every eight vectors, and
2 · width · side numbers per chunk for the sums. Matrices are found by their addresses.
"""

import torch
import triton
import triton.language as tl

from . import launch


def gram_product(
    matrices: list[torch.Tensor],  # B of [m, n]
    bases: list[torch.Tensor],  # none, or B of [m, n]
    q: torch.Tensor,  # [B, width, min(m, n)]
    scale: torch.Tensor,  # [B]
) -> torch.Tensor:  # [B, width, min(m, n)]
    (m, n), (batch, width, side) = matrices[0].shape, q.shape
    if not q.numel():
        return torch.empty_like(q, memory_format=torch.contiguous_format)
    longer = max(m, n)
    chunk = max(64, triton.cdiv(triton.cdiv(longer, 32), launch.PANEL) * launch.PANEL)
    chunks = triton.cdiv(longer, chunk)
    partials = torch.empty(batch, chunks, width, side, dtype=q.dtype, device=q.device)
    some = bases or matrices
    with torch.cuda.device_of(q):
        _multiply[(chunks, batch)](
            partials,
            launch.addresses(matrices),
            launch.addresses(some),
            matrices[0].new_empty(1),
            some[0].new_empty(1),
            q.contiguous(),
            scale.contiguous(),
            m,
            n,
            matrices[0].stride(0),
            some[0].stride(0),
            width,
            chunk,
            ADD_BASE=bool(bases),
            TALL=n <= m,
            VECTORS=launch.VECTORS,
            PANEL=launch.PANEL,
            TILE=launch.TILE,
        )
    return partials[:, 0] if chunks == 1 else partials.sum(1, dtype=torch.float64).to(q.dtype)


@triton.jit
def _multiply(
    partials,
    matrices,
    bases,
    matrix_type,
    base_type,
    q,
    scale,
    m,
    n,
    matrix_stride,
    base_stride,
    width,
    chunk,
    ADD_BASE: tl.constexpr,
    TALL: tl.constexpr,
    VECTORS: tl.constexpr,
    PANEL: tl.constexpr,
    TILE: tl.constexpr,
):
    wide: tl.constexpr = partials.dtype.element_ty
    part, i = tl.program_id(0), tl.program_id(1).to(tl.int64)
    # Numbers are addressed as W[place on the longer side, place on the shorter side].
    longer, side = (m, n) if TALL else (n, m)
    matrix = tl.load(matrices + i).to(matrix_type.dtype)
    base = tl.load(bases + i).to(base_type.dtype)
    factor = tl.load(scale + i).to(wide)
    row = (i * tl.num_programs(0) + part) * width
    begin = part * chunk
    end = tl.minimum(begin + chunk, longer)
    vector = part * 0
    while vector < width:
        vectors = vector + tl.arange(0, VECTORS)
        valid = vectors < width
        of_q, of_z = q + (i * width + vectors)[:, None] * side, partials + (row + vectors)[:, None] * side
        first = begin
        while first < end:
            places = first + tl.arange(0, PANEL).to(tl.int64)
            y = tl.zeros([PANEL, VECTORS], wide)
            column = part * 0
            while column < side:
                columns = column + tl.arange(0, TILE)
                tile = _tile(matrix, base, matrix_stride, base_stride, factor, places, columns, end, side, ADD_BASE, TALL)
                x = tl.load(of_q + columns[None, :], mask=valid[:, None] & (columns < side)[None, :], other=0)
                y += tl.sum(tile[:, None, :] * x[None, :, :], 2)  # [PANEL, VECTORS]
                column += TILE
            column = part * 0
            while column < side:
                columns = column + tl.arange(0, TILE)
                tile = _tile(matrix, base, matrix_stride, base_stride, factor, places, columns, end, side, ADD_BASE, TALL)
                z = tl.sum(tile[:, None, :] * y[:, :, None], 0)  # [VECTORS, TILE]
                mask = valid[:, None] & (columns < side)[None, :]
                z += tl.load(of_z + columns[None, :], mask=mask & (first > begin), other=0)
                tl.store(of_z + columns[None, :], z, mask=mask)
                column += TILE
            first += PANEL
        vector += VECTORS


@triton.jit
def _tile(
    matrix, base, matrix_stride, base_stride, factor, places, columns, end, side, ADD_BASE: tl.constexpr, TALL: tl.constexpr
):
    """scale · (base + matrix), [places, columns], zero outside."""
    mask = (places < end)[:, None] & (columns < side)[None, :]
    if TALL:
        tile = tl.load(matrix + places[:, None] * matrix_stride + columns[None, :], mask=mask, other=0).to(factor.dtype)
        if ADD_BASE:
            tile += tl.load(base + places[:, None] * base_stride + columns[None, :], mask=mask, other=0).to(factor.dtype)
    else:
        rows = columns.to(tl.int64)[None, :]
        tile = tl.load(matrix + rows * matrix_stride + places[:, None], mask=mask, other=0).to(factor.dtype)
        if ADD_BASE:
            tile += tl.load(base + rows * base_stride + places[:, None], mask=mask, other=0).to(factor.dtype)
    return tile * factor
