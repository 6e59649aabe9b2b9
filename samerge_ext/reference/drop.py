"""Drops numbers at random and rescales the others; see samerge_ext.methods.dare."""

import functools

import torch

STRETCH = 1 << 16  # numbers of a row that share a key


def drop(
    out: torch.Tensor,  # [T, n]; may be the numbers
    numbers: torch.Tensor,  # [T, n]
    keys: torch.Tensor,  # [T, n up to whole stretches / 65536] int32
    thresholds: torch.Tensor,  # [T] int64, the share that is kept, times 2³¹
    factors: torch.Tensor,  # [T] fp32, fp64 where the numbers are
) -> None:
    rows = zip(out, numbers, keys, thresholds, factors, strict=True)
    for target, row, of_row, threshold, factor in rows:
        for place, part, key in zip(target.split(STRETCH), row.split(STRETCH), of_row, strict=True):
            kept = uniform(key)[: part.numel()] < threshold
            place.copy_(torch.where(kept, (part.to(factor.dtype) * factor).to(part.dtype), 0))


def uniform(key: torch.Tensor) -> torch.Tensor:
    """[65536] int64 from 0 to 2³¹ - 1, each by its place and the key [] int32: the same on every device and at any time.

    Both are mixed by the finalizer of MurmurHash3, on integers that wrap around.
    """
    mixed = _spread(key.device) + key
    for shift, factor in ((16, -0x7A143595), (13, -0x3D4D51CB)):
        mixed.bitwise_xor_((mixed >> shift).bitwise_and_((1 << (32 - shift)) - 1)).mul_(factor)
    mixed.bitwise_xor_((mixed >> 16).bitwise_and_(0xFFFF))
    return mixed.bitwise_right_shift_(1).bitwise_and_(0x7FFFFFFF).long()


@functools.cache
def _spread(device: torch.device) -> torch.Tensor:
    """[65536] int32, the places times 2³² over the golden ratio."""
    return (torch.arange(STRETCH, device="cpu") * 0x9E3779B9).to(torch.int32).to(device)
