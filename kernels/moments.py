"""Mean, population variance, norm and largest magnitude of W = base + matrix, for many matrices at once.

A program takes one segment of one matrix, a piece of a row at a time: it finds the piece's mean and the squares of the
deviations from it in double, and combines them with what it has (Chan, Golub and LeVeque); the segments are combined the same
way by torch. Nothing cancels, and nothing is atomic. Moves W once.
"""

import torch
import triton
import triton.language as tl

from . import launch


def moments(
    matrices: list[torch.Tensor],  # B of [m, n]
    bases: list[torch.Tensor],  # none, or B of [m, n]
) -> torch.Tensor:  # [B, 4]
    (m, n), batch, first = matrices[0].shape, len(matrices), matrices[0]
    if not first.numel():
        return torch.zeros(batch, 4, dtype=torch.float64, device=first.device)
    pieces = m * triton.cdiv(n, launch.BLOCK)
    segments = triton.cdiv(pieces, launch.SEGMENT)
    partials = torch.empty(4, batch, segments, dtype=torch.float64, device=first.device)
    some = bases or matrices
    with torch.cuda.device_of(first):
        _segments[(segments, batch)](
            partials,
            launch.addresses(matrices),
            launch.addresses(some),
            first.new_empty(1),
            some[0].new_empty(1),
            m,
            n,
            first.stride(0),
            some[0].stride(0),
            ADD_BASE=bool(bases),
            SEGMENT=launch.SEGMENT,
            BLOCK=launch.BLOCK,
        )
    counts, means, squares, largest = partials  # [B, segments]
    mean = (counts * means).sum(1) / (m * n)
    total = (squares + counts * (means - mean[:, None]).square()).sum(1)
    return torch.stack([mean, total / (m * n), (total + m * n * mean.square()).sqrt(), largest.amax(1)], 1)


@triton.jit
def _segments(
    partials,
    matrices,
    bases,
    matrix_type,
    base_type,
    m,
    n,
    matrix_stride,
    base_stride,
    ADD_BASE: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    segment, i = tl.program_id(0), tl.program_id(1).to(tl.int64)
    matrix = tl.load(matrices + i).to(matrix_type.dtype)
    base = tl.load(bases + i).to(base_type.dtype)
    row_pieces = tl.cdiv(n, BLOCK)
    begin = segment * SEGMENT
    end = tl.minimum(begin + SEGMENT, m * row_pieces)
    count = tl.zeros([1], tl.float64)
    mean = tl.zeros([1], tl.float64)
    squares = tl.zeros([1], tl.float64)
    largest = tl.zeros([BLOCK], tl.float64)
    piece = begin
    while piece < end:
        row, columns = (piece // row_pieces).to(tl.int64), piece % row_pieces * BLOCK + tl.arange(0, BLOCK)
        valid = columns < n
        x = tl.load(matrix + row * matrix_stride + columns, mask=valid, other=0).to(tl.float64)
        if ADD_BASE:
            x += tl.load(base + row * base_stride + columns, mask=valid, other=0).to(tl.float64)
        numbers = tl.sum(valid.to(tl.float64), 0)
        of_piece = tl.sum(x, 0) / numbers
        deviation = tl.where(valid, x - of_piece, 0)
        magnitude = tl.abs(x)
        largest = tl.where((magnitude > largest) | (magnitude != magnitude), magnitude, largest)
        together, step = count + numbers, of_piece - mean
        squares += tl.sum(deviation * deviation, 0) + step * step * (count * numbers / together)
        mean += step * (numbers / together)
        count = together
        piece += 1
    out = partials + i * tl.num_programs(0) + segment + tl.zeros([1], tl.int64)
    matrix_of_sums = tl.num_programs(1).to(tl.int64) * tl.num_programs(0)
    broken = tl.max((largest != largest).to(tl.int32), 0) > 0
    tl.store(out, count)
    tl.store(out + matrix_of_sums, mean)
    tl.store(out + 2 * matrix_of_sums, squares)
    tl.store(out + 3 * matrix_of_sums, tl.where(broken, float("nan"), tl.max(largest, 0)))
