"""out[i] = base[i] + scale · the mean, or the sum, of those weights[t] · task_vectors[t, i] that have the sign of their sum.

One program takes one block of 1,024 numbers, and its task vectors twice: for the sign, and, from the cache, for the sum of those
who agree. Products are not fused with the additions, so that vectors that cancel sum to zero. Moves T + 1 reads and 1 write per
number.
"""

import torch
import triton
import triton.language as tl

from . import launch


def elected_sum(
    base: torch.Tensor,  # [N]
    task_vectors: torch.Tensor,  # [T, N]
    weights: torch.Tensor,  # [T]
    scale: float,
    normalize: bool,
) -> torch.Tensor:  # [N]
    out = torch.empty_like(base, memory_format=torch.contiguous_format)
    if not out.numel():
        return out
    tasks = launch.dense_rows(task_vectors)
    with torch.cuda.device_of(base):
        _elected_sum[(out.numel() // launch.BLOCK,)](
            out,
            base.contiguous(),
            tasks,
            weights.to(tasks.dtype).to(weights.dtype).contiguous(),
            torch.full((1,), scale, dtype=weights.dtype, device=base.device),
            tasks.stride(0),
            num_tasks=tasks.shape[0],
            NORMALIZE=normalize,
            BLOCK=launch.BLOCK,
            enable_fp_fusion=False,
        )
    return out


@triton.jit
def _elected_sum(
    out,
    base,
    task_vectors,
    weights,
    scale,
    task_stride,
    num_tasks: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wide: tl.constexpr = weights.dtype.element_ty
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], wide)
    for t in range(0, num_tasks):
        total += _weighted(task_vectors, weights, t, task_stride, places)
    merged, divisor = tl.zeros([BLOCK], wide), tl.zeros([BLOCK], wide)
    for t in range(0, num_tasks):
        value = _weighted(task_vectors, weights, t, task_stride, places)
        agrees = tl.where(total >= 0, value > 0, value < 0)
        merged += tl.where(agrees, value, 0.0)
        divisor += tl.where(agrees, tl.load(weights + t), 0.0)
    if NORMALIZE:
        merged = merged / tl.where(divisor == 0, 1.0, divisor)
    merged = tl.where(total == total, merged, total)  # a NaN elects nobody, and shows
    result = tl.load(base + places).to(wide) + tl.load(scale) * merged
    tl.store(out + places, result.to(out.dtype.element_ty))


@triton.jit
def _weighted(task_vectors, weights, t, task_stride, places):
    """A task's weighted numbers, as they read after being stored."""
    task = (t + tl.arange(0, 1)).to(tl.int64)
    numbers = tl.load(task_vectors + task * task_stride + places)
    weight = tl.load(weights + task)
    return (numbers.to(weight.dtype) * weight).to(numbers.dtype).to(weight.dtype)
