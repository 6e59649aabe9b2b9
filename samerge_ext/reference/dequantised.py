"""The numbers that quantised task vectors stand for: scale · code, one scale per 128 numbers."""

import torch


def dequantised(
    codes: torch.Tensor,  # [T, N] int8, or [T, N // 2] uint8
    scales: torch.Tensor,  # [T, N // 128]
    dtype: torch.dtype,
) -> torch.Tensor:  # [T, N]
    if codes.dtype == torch.uint8:  # byte j of 64: number j in the low half, number j + 64 in the high one, each plus 8
        pairs = codes.unflatten(1, (-1, 64))
        codes = torch.cat([pairs & 15, pairs >> 4], 2).to(torch.int8).flatten(1) - 8
    return (codes.unflatten(1, (-1, 128)).to(dtype) * scales[..., None].to(dtype)).flatten(1)
