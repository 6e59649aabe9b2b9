"""How the Triton kernels are launched: every choice of tile and number of warps."""

import os

import torch
import triton
import triton.language as tl

BLOCK = 1024  # numbers per block of packed weights; a block belongs to one layer
GROUP = 128  # numbers of a quantised task vector that share a scale

# Tuned on the first call for a number of tasks and a set of dtypes, which must come before a graph is captured. A tile's tasks
# are added up inside a thread in every configuration, so the choice does not change a bit of the result. Kernels that add
# across threads are not tuned: their order of summation would follow the timer.
WEIGHTED_SUM = [triton.Config({}, num_warps=4), triton.Config({}, num_warps=4, maxnreg=64), triton.Config({}, num_warps=2)]
if os.environ.get("TRITON_INTERPRET") == "1":
    WEIGHTED_SUM = WEIGHTED_SUM[:1]  # there is nothing to time


def task_group(num_tasks: int) -> int:
    """Task vectors that are read at once: a power of two, enough loads in flight without spilling registers."""
    return min(8, triton.next_power_of_2(max(num_tasks, 1)))


def row_tile(num_columns: int) -> dict[str, int]:
    """Numbers of a row that a program holds at once, 16 a thread, how often, and its warps: one for short rows."""
    tile = min(8192, max(32, triton.next_power_of_2(num_columns)))
    return {"TILE": tile, "TILES": triton.cdiv(num_columns, tile), "num_warps": min(16, max(1, tile // 512))}


def dense_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where its last dimension is dense, so that rows may lie apart, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


# Tiles of the block products: vectors of q, places of a panel along the longer side of a matrix, places along the shorter one.
# Their product is the numbers that a program holds in registers, 64 a thread.
VECTORS, PANEL, TILE = 8, 16, 64
SPAN = 4096  # digits that a program looks at together
if os.environ.get("TRITON_INTERPRET") == "1":
    PANEL, TILE, SPAN = 64, 256, 1 << 16  # the interpreter's time goes by the number of tiles
SEGMENT = 128  # pieces of a row, of BLOCK numbers each, that one program takes the moments of


def addresses(matrices: list[torch.Tensor]) -> torch.Tensor:
    """Where the matrices lie, [B] int64 on their device."""
    return torch.tensor([matrix.data_ptr() for matrix in matrices], dtype=torch.int64).to(matrices[0].device)


@triton.jit
def load_codes(codes, tasks, stride, valid, groups, lanes, half, BITS: tl.constexpr, GROUP: tl.constexpr):
    """Codes of one half of every group, [tasks, groups, GROUP / 2]: a byte each, or half a byte, plus 8."""
    first = groups * (GROUP * BITS // 8)
    if BITS == 8:
        first += half * (GROUP // 2)
    places = tasks[:, None, None] * stride + first[None, :, None] + lanes[None, None, :]
    tile = tl.load(codes + places, mask=valid[:, None, None], other=0).to(tl.int32)
    return tile if BITS == 8 else (tile >> (4 * half) & 15) - 8
