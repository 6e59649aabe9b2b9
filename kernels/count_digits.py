"""How often every digit of 16 bits occurs among the magnitudes of a row that begin with its key.

One program takes 1,024 numbers of a row and counts them in global memory, by atomic additions of integers, whose order does not
matter: as fast as the second-level cache adds, where the CUDA kernel counts in shared memory first. Zeros, which are zero kept
or not, are left out.
"""

import torch
import triton
import triton.language as tl

from . import launch

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of a number -> the integers that its bits are read as


def count_digits(
    counts: torch.Tensor,  # [T, 65536] int64, added to
    numbers: torch.Tensor,  # [T, n]
    keys: torch.Tensor,  # [T] int64, the digits known so far
    ties: torch.Tensor,  # [T] int64; a row without any is not counted
    shift: int,  # bits below the digit
) -> None:
    rows, count = numbers.shape
    if not numbers.numel():
        return
    tiles = triton.cdiv(count, launch.BLOCK)
    bits = numbers.view(BITS[numbers.itemsize])
    with torch.cuda.device_of(numbers):
        _count_digits[(rows * tiles,)](
            counts, bits, keys, ties, bits.stride(0), count, tiles,
            SHIFT=shift, WIDTH=8 * numbers.itemsize, BLOCK=launch.BLOCK,
        )  # fmt: skip


@triton.jit
def _count_digits(counts, bits, keys, ties, stride, count, tiles, SHIFT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // tiles).to(tl.int64)
    places = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    undecided = tl.load(ties + row) > 0
    magnitudes = magnitudes_of(tl.load(bits + row * stride + places, mask=(places < count) & undecided, other=0), WIDTH)
    counted = magnitudes != 0
    if SHIFT + 16 < WIDTH:
        counted = counted & (magnitudes >> (SHIFT + 16) == tl.load(keys + row))
    digits = (magnitudes >> SHIFT) & 0xFFFF
    tl.atomic_add(counts + row * 65536 + digits, tl.full([BLOCK], 1, tl.int64), mask=counted)


@triton.jit
def magnitudes_of(bits, WIDTH: tl.constexpr):
    """int64, without the sign's bit."""
    return bits.to(tl.int64) & ((1 << (WIDTH - 1)) - 1)
