"""Sign election and the mean of those who agree: the last two steps of TIES."""

import torch

from .. import backend
from ._common import BLOCK, accumulator, check_devices, check_dtypes, define, library, shape

define("elected_sum(Tensor base, Tensor task_vectors, Tensor weights, float scale, bool normalize) -> Tensor")


def elected_sum(
    base: torch.Tensor, task_vectors: torch.Tensor, weights: torch.Tensor, scale: float = 1.0, normalize: bool = True
) -> torch.Tensor:
    """Every number's task vectors elect a sign by their weighted sum, and those of that sign are averaged (arXiv 2306.01708,
    section 3): out = base + scale · Σ_t∈A w_t τ_t / Σ_t∈A w_t, A the tasks where w_t τ_t ≠ 0 has the sign of Σ_t w_t τ_t.

    A sum of zero elects plus; a NaN among the task vectors gives NaN. Weights and products are rounded to the task vectors'
    dtype, as if weighted task vectors were stored, sums are kept in fp32 (fp64 for fp64). Not differentiable.

    Args:
        base: [N], N a multiple of 1,024; fp32, bf16 or fp16, or fp64 with everything else in fp64.
        task_vectors: [T, N], zero where trimmed; its dtype independent of the base's.
        weights: [T] fp32 (fp64 where base is fp64).
        scale: λ.
        normalize: divide by the weights of those who agree; without it their sum is taken.

    Returns:
        [N], of the base's dtype.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit.
    """
    if base.dim() != 1 or base.shape[0] % BLOCK:
        raise ValueError(f"base has shape {shape(base)}; it must be [N] with N a multiple of {BLOCK}, as a Layout packs it")
    if task_vectors.dim() != 2 or task_vectors.shape[1] != base.shape[0]:
        raise ValueError(
            f"task_vectors has shape {shape(task_vectors)}; with base of {shape(base)} it must be [T, {base.shape[0]}]"
        )
    if weights.shape != task_vectors.shape[:1]:
        raise ValueError(f"weights has shape {shape(weights)}; with task_vectors of {shape(task_vectors)} it must be [T]")
    check_dtypes(base=base, task_vectors=task_vectors)
    if weights.dtype != accumulator(base):
        raise TypeError(f"weights is {weights.dtype}; with base of {base.dtype} it must be {accumulator(base)}")
    check_devices(base=base, weights=weights)
    return torch.ops.samerge.elected_sum(base, task_vectors, weights, scale, normalize)


library.impl(
    "elected_sum",
    lambda base, *args: backend.kernel("elected_sum", base)(base, *args),
    "CompositeExplicitAutograd",
)
torch.library.register_fake("samerge::elected_sum", lambda base, *_: base.new_empty(base.shape), lib=library)
