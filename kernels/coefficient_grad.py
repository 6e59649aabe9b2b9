"""out[t, l] = Σ over i in layer l of grad[i] · task_vectors[t, i].

Two stages, without atomics, so that the result repeats to the bit. A program of the first multiplies one block of 1,024
numbers of the gradient with the task vectors, eight at a time, and writes one sum per task; a program of the second adds, in
double, the sums of all blocks of one layer, whose place it finds by a search in block_layer. Moves T + 1 reads per number,
and 8 T bytes per block for the sums.
"""

import torch
import triton
import triton.language as tl

from . import launch


def coefficient_grad(
    grad: torch.Tensor,  # [N]
    task_vectors: torch.Tensor,  # [T, N], or their codes
    block_layer: torch.Tensor,  # [N // 1024]
    num_layers: int,
    scales: torch.Tensor | None = None,  # [T, N // 128] of codes
) -> torch.Tensor:  # [T, L]
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    num_tasks, num_blocks = task_vectors.shape[0], block_layer.numel()
    if not (num_tasks and num_layers and num_blocks):
        return torch.zeros(num_tasks, num_layers, dtype=wide, device=grad.device)
    out = torch.empty(num_tasks, num_layers, dtype=wide, device=grad.device)
    block_sums = torch.empty(num_tasks, num_blocks, dtype=wide, device=grad.device)
    tasks = launch.dense_rows(task_vectors)
    with torch.cuda.device_of(grad):
        if scales is None:
            _sum_blocks[(num_blocks,)](
                block_sums,
                grad.contiguous(),
                tasks,
                tasks.stride(0),
                num_blocks,
                num_tasks=num_tasks,
                GROUP=launch.task_group(num_tasks),
                BLOCK=launch.BLOCK,
            )
        else:
            scales = launch.dense_rows(scales)
            _sum_blocks_of_codes[(num_blocks,)](
                block_sums,
                grad.contiguous(),
                tasks,
                scales,
                tasks.stride(0),
                scales.stride(0),
                num_blocks,
                num_tasks=num_tasks,
                BITS=8 if tasks.dtype == torch.int8 else 4,
                TASKS=launch.task_group(num_tasks),
                BLOCK=launch.BLOCK,
                GROUP=launch.GROUP,
            )
        _sum_layers[(num_layers, num_tasks)](
            out, block_sums, block_layer.contiguous(), num_blocks, num_layers, WIDTH=1024, num_warps=8
        )
    return out


@triton.jit
def _sum_blocks(
    block_sums,
    grad,
    task_vectors,
    task_stride,
    num_blocks,
    num_tasks: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wide: tl.constexpr = block_sums.dtype.element_ty
    block = tl.program_id(0)
    places = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(grad + places).to(wide)
    for first in range(0, num_tasks, GROUP):
        tasks = (first + tl.arange(0, GROUP)).to(tl.int64)
        valid = tasks < num_tasks
        rows = task_vectors + tasks[:, None] * task_stride
        tile = tl.load(rows + places[None, :], mask=valid[:, None], other=0)  # [GROUP, BLOCK]
        sums = tl.sum(tile.to(wide) * g[None, :], 1)
        tl.store(block_sums + tasks * num_blocks + block, sums, mask=valid)


@triton.jit
def _sum_blocks_of_codes(
    block_sums,
    grad,
    codes,
    scales,
    code_stride,
    scale_stride,
    num_blocks,
    num_tasks: tl.constexpr,
    BITS: tl.constexpr,
    TASKS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """As above: a group's products are added up before they are scaled."""
    wide: tl.constexpr = block_sums.dtype.element_ty
    block = tl.program_id(0)
    groups = block.to(tl.int64) * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
    lanes = tl.arange(0, GROUP // 2)
    for first in range(0, num_tasks, TASKS):
        tasks = (first + tl.arange(0, TASKS)).to(tl.int64)
        valid = tasks < num_tasks
        sums = tl.zeros([TASKS, BLOCK // GROUP], wide)
        for half in tl.static_range(2):
            g = tl.load(grad + groups[:, None] * GROUP + half * (GROUP // 2) + lanes[None, :]).to(wide)
            tile = launch.load_codes(codes, tasks, code_stride, valid, groups, lanes, half, BITS, GROUP)
            sums += tl.sum(tile.to(wide) * g[None, :, :], 2)
        scale = tl.load(scales + tasks[:, None] * scale_stride + groups[None, :], mask=valid[:, None], other=0)
        tl.store(block_sums + tasks * num_blocks + block, tl.sum(sums * scale.to(wide), 1), mask=valid)


@triton.jit
def _sum_layers(out, block_sums, block_layer, num_blocks, num_layers, WIDTH: tl.constexpr):
    layer, task = tl.program_id(0), tl.program_id(1)
    begin = _blocks_before(block_layer, num_blocks, layer, WIDTH)
    end = _blocks_before(block_layer, num_blocks, layer + 1, WIDTH)
    row = block_sums + task.to(tl.int64) * num_blocks
    total = tl.zeros([WIDTH], tl.float64)
    while begin < end:
        blocks = begin + tl.arange(0, WIDTH)
        total += tl.load(row + blocks, mask=blocks < end, other=0).to(tl.float64)
        begin += WIDTH
    tl.store(out + task.to(tl.int64) * num_layers + layer, tl.sum(total, 0).to(out.dtype.element_ty))


@triton.jit
def _blocks_before(block_layer, num_blocks, layer, WIDTH: tl.constexpr):
    """The number of blocks of earlier layers; each round keeps one of WIDTH parts of what is left."""
    begin = layer * 0
    end = begin + num_blocks
    while begin < end:
        step = tl.cdiv(end - begin, WIDTH)
        places = begin + tl.arange(0, WIDTH) * step
        earlier = tl.load(block_layer + places, mask=places < end, other=layer) < layer
        count = tl.sum(earlier.to(tl.int32), 0)
        end = tl.minimum(end, begin + count * step)
        begin = tl.maximum(begin, begin + (count - 1) * step + 1)
    return begin
