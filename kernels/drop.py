"""out[t, i] = factors[t] · numbers[t, i] where a hash of its place and its stretch's key is below thresholds[t], else 0.

One program takes 1,024 numbers of a row, which lie in one stretch. Moves 1 read and 1 write per number.
"""

import torch
import triton
import triton.language as tl

from . import launch

STRETCH = 1 << 16  # numbers of a row that share a key


def drop(
    out: torch.Tensor,  # [T, n]; may be the numbers
    numbers: torch.Tensor,  # [T, n]
    keys: torch.Tensor,  # [T, n up to whole stretches / 65536] int32
    thresholds: torch.Tensor,  # [T] int64, the share that is kept, times 2³¹
    factors: torch.Tensor,  # [T] fp32, fp64 where the numbers are
) -> None:
    rows, count = numbers.shape
    if not numbers.numel():
        return
    tiles = triton.cdiv(count, launch.BLOCK)
    with torch.cuda.device_of(numbers):
        _drop[(rows * tiles,)](
            out, numbers, keys, thresholds, factors, out.stride(0), numbers.stride(0), keys.stride(0), count, tiles,
            STRETCH=STRETCH, BLOCK=launch.BLOCK,
        )  # fmt: skip


@triton.jit
def _drop(
    out,
    numbers,
    keys,
    thresholds,
    factors,
    out_stride,
    stride,
    key_stride,
    count,
    tiles,
    STRETCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    places = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = places < count
    key = tl.load(keys + row * key_stride + tile // (STRETCH // BLOCK)).to(tl.uint32)
    mixed = (places % STRETCH).to(tl.uint32) * 0x9E3779B9 + key
    mixed = (mixed ^ (mixed >> 16)) * 0x85EBCA6B
    mixed = (mixed ^ (mixed >> 13)) * 0xC2B2AE35
    kept = ((mixed ^ (mixed >> 16)) >> 1).to(tl.int64) < tl.load(thresholds + row)
    factor = tl.load(factors + row)
    x = tl.load(numbers + row * stride + places, mask=valid, other=0).to(factor.dtype) * factor
    x = tl.where(kept, x, 0.0)
    tl.store(out + row * out_stride + places, x.to(out.dtype.element_ty), mask=valid)
