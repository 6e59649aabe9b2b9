"""Zeroes what is smaller than the smallest magnitude that is kept, and those of its size beyond the first few.

Three launches: one program counts the equal numbers of 1,024 of a row, one for each row adds these counts up, and one for each
1,024 numbers writes them. Moves 1 read and 1 write per number, and 1 read of the rows that have some of several equal numbers
to keep.
"""

import torch
import triton
import triton.language as tl

from . import launch
from .count_digits import BITS, magnitudes_of


def trim(
    out: torch.Tensor,  # [T, n]; may be the numbers
    numbers: torch.Tensor,  # [T, n]
    keys: torch.Tensor,  # [T] int64, the smallest magnitudes that are kept
    ties: torch.Tensor,  # [T] int64, how many equal ones are kept, of which those that were met are taken off; -1: all
) -> None:
    rows, count = numbers.shape
    if not numbers.numel():
        return
    tiles = triton.cdiv(count, launch.BLOCK)
    bits, target = numbers.view(BITS[numbers.itemsize]), out.view(BITS[out.itemsize])
    kept = torch.empty(rows, tiles, dtype=torch.int64, device=numbers.device)
    constants = {"WIDTH": 8 * numbers.itemsize, "BLOCK": launch.BLOCK}
    with torch.cuda.device_of(numbers):
        _count_equal[(rows * tiles,)](kept, bits, keys, ties, bits.stride(0), count, tiles, **constants)
        _share_ties[(rows,)](kept, ties, tiles, BLOCK=launch.BLOCK)
        _trim[(rows * tiles,)](target, bits, keys, kept, target.stride(0), bits.stride(0), count, tiles, **constants)


@triton.jit
def _count_equal(kept, bits, keys, ties, stride, count, tiles, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // tiles).to(tl.int64)
    places = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = (places < count) & (tl.load(ties + row) > 0)
    equal = magnitudes_of(tl.load(bits + row * stride + places, mask=valid, other=0), WIDTH) == tl.load(keys + row)
    tl.store(kept + tl.program_id(0), tl.sum((equal & valid).to(tl.int64), 0))


@triton.jit
def _share_ties(kept, ties, tiles, BLOCK: tl.constexpr):
    """Makes of the equal numbers of each tile how many of them, of all before its end, are kept."""
    row = tl.program_id(0).to(tl.int64)
    left = tl.load(ties + row)
    limited = left >= 0
    first = tiles * 0
    while first < tiles:
        places = first + tl.arange(0, BLOCK)
        valid = places < tiles
        equal = tl.load(kept + row * tiles + places, mask=valid, other=0)
        before = tl.cumsum(equal, 0) - equal
        most = tl.where(limited, tl.maximum(left - before, 0), 1 << 62)
        tl.store(kept + row * tiles + places, most, mask=valid)
        left = tl.where(limited, tl.maximum(left - tl.sum(equal, 0), 0), left)
        first += BLOCK
    tl.store(ties + row, left)


@triton.jit
def _trim(out, bits, keys, kept, out_stride, stride, count, tiles, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // tiles).to(tl.int64)
    places = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    numbers = tl.load(bits + row * stride + places, mask=places < count, other=0)
    magnitudes, key = magnitudes_of(numbers, WIDTH), tl.load(keys + row)
    equal = magnitudes == key
    rank = tl.cumsum(equal.to(tl.int64), 0)
    stays = (magnitudes > key) | (equal & (rank <= tl.load(kept + tl.program_id(0))))
    tl.store(out + row * out_stride + places, tl.where(stays, numbers, 0).to(numbers.dtype), mask=places < count)
