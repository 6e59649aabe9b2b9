"""out[i] = base[i] + Σ_t coefficients[t, layer(i)] · task_vectors[t, i].

One program merges one block of 1,024 numbers, which lies in one layer. It reads up to eight task vectors as one tile, so that
their loads are in flight together. Moves T + 1 reads and 1 write per number.
"""

import torch
import triton
import triton.language as tl

from . import launch


def weighted_sum(
    out: torch.Tensor,  # [N], written
    base: torch.Tensor,  # [N]
    task_vectors: torch.Tensor,  # [T, N], or their codes
    coefficients: torch.Tensor,  # [T, L]
    block_layer: torch.Tensor,  # [N // 1024]
    scales: torch.Tensor | None = None,  # [T, N // 128] of codes
) -> None:
    num_tasks, num_layers = coefficients.shape
    if not base.numel():
        return
    tasks = launch.dense_rows(task_vectors)
    if scales is not None:
        scales = launch.dense_rows(scales)
        with torch.cuda.device_of(base):
            _weighted_sum_of_codes[(block_layer.numel(),)](
                out,
                base.contiguous(),
                tasks,
                scales,
                coefficients.contiguous(),
                block_layer.contiguous(),
                num_layers,
                tasks.stride(0),
                scales.stride(0),
                num_tasks=num_tasks,
                BITS=8 if tasks.dtype == torch.int8 else 4,
                TASKS=launch.task_group(num_tasks),
                BLOCK=launch.BLOCK,
                GROUP=launch.GROUP,
            )
        return
    with torch.cuda.device_of(base):
        _weighted_sum[(block_layer.numel(),)](
            out,
            base.contiguous(),
            tasks,
            coefficients.contiguous(),
            block_layer.contiguous(),
            num_layers,
            tasks.stride(0),
            num_tasks=num_tasks,
            GROUP=launch.task_group(num_tasks),
            BLOCK=launch.BLOCK,
        )


@triton.autotune(configs=launch.WEIGHTED_SUM, key=["num_tasks"])
@triton.jit
def _weighted_sum(
    out,
    base,
    task_vectors,
    coefficients,
    block_layer,
    num_layers,
    task_stride,
    num_tasks: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wide: tl.constexpr = coefficients.dtype.element_ty
    block = tl.program_id(0)
    layer = tl.load(block_layer + block)
    places = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(base + places).to(wide)
    for first in range(0, num_tasks, GROUP):
        tasks = (first + tl.arange(0, GROUP)).to(tl.int64)
        valid = tasks < num_tasks
        rows = task_vectors + tasks[:, None] * task_stride
        tile = tl.load(rows + places[None, :], mask=valid[:, None], other=0)  # [GROUP, BLOCK]
        coefficient = tl.load(coefficients + tasks * num_layers + layer, mask=valid, other=0)
        total += tl.sum(tile.to(wide) * coefficient[:, None], 0)
    tl.store(out + places, total.to(out.dtype.element_ty))


@triton.jit
def _weighted_sum_of_codes(
    out,
    base,
    codes,
    scales,
    coefficients,
    block_layer,
    num_layers,
    code_stride,
    scale_stride,
    num_tasks: tl.constexpr,
    BITS: tl.constexpr,
    TASKS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """As above: the first halves of a block's groups, then the second ones, whose codes are in the same bytes for 4 bits."""
    wide: tl.constexpr = coefficients.dtype.element_ty
    block = tl.program_id(0)
    layer = tl.load(block_layer + block)
    groups = block.to(tl.int64) * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
    lanes = tl.arange(0, GROUP // 2)
    for half in tl.static_range(2):
        places = groups[:, None] * GROUP + half * (GROUP // 2) + lanes[None, :]  # [groups, GROUP / 2]
        total = tl.load(base + places).to(wide)
        for first in range(0, num_tasks, TASKS):
            tasks = (first + tl.arange(0, TASKS)).to(tl.int64)
            valid = tasks < num_tasks
            coefficient = tl.load(coefficients + tasks * num_layers + layer, mask=valid, other=0)
            scale = tl.load(scales + tasks[:, None] * scale_stride + groups[None, :], mask=valid[:, None], other=0)
            factor = coefficient[:, None] * scale.to(wide)  # [TASKS, groups]
            tile = launch.load_codes(codes, tasks, code_stride, valid, groups, lanes, half, BITS, GROUP)
            total += tl.sum(tile.to(wide) * factor[:, :, None], 0)
        tl.store(out + places, total.to(out.dtype.element_ty))
