"""Statistics of every layer of every expert: the features of StatsMerging."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .svd_topk import statistics

if TYPE_CHECKING:
    from samerge_ext.packing.packed_weights import PackedWeights


def layer_stats(
    packed: PackedWeights,
    top_k: int = 3,
    of: str = "experts",
    rtol: float = 1e-3,
    seed: int = 0,
) -> torch.Tensor:
    """Mean, population variance, Frobenius norm and the largest singular values of every layer (arXiv 2506.04567, S_{t,l}).

    Reads the packed weights where they lie; experts, base + task vector, are added up number by number as they are read.
    Quantised task vectors are those that are stored, in fp32, and one expert's at a time exists. Mean,
    variance and norm come from one pass, in fp64; singular values as in `svd_topk`, which also says what is settled how far.
    A tensor with more than two dimensions counts as [dim 0, rest]; of a vector, σ₁ is the norm and the others are 0.

    Args:
        packed: PackedWeights of T tasks and L layers.
        top_k: how many singular values; 0 for none.
        of: "experts", the paper's choice, or "task_vectors". A layer that no expert changed has a task vector of zeros.
        rtol: relative error of the singular values.
        seed: of their random start.

    Returns:
        [T, L, 3 + top_k], fp32 (fp64 for an fp64 store): mean, variance, norm, σ₁ … σ_k.

    Raises:
        ValueError: a layer holds NaN or infinity (named with its task), or an argument is out of range.
    """
    if of not in ("experts", "task_vectors"):
        raise ValueError(f"of is {of!r}; choose 'experts' or 'task_vectors'")
    if top_k < 0 or not 1e-12 <= rtol < 1:
        raise ValueError(f"top_k is {top_k} and rtol {rtol}; top_k must not be negative, and rtol in 1e-12 … 1")
    layout, dtype = packed.layout, packed.coefficient_dtype
    device = packed.base.device
    out = torch.zeros(packed.num_tasks, layout.num_layers, 3 + top_k, dtype=torch.float64, device=device)
    position = {name: l for l, name in enumerate(layout.names)}

    def fill(tensors: list[torch.Tensor], bases: list[torch.Tensor], tasks: list[str], layers: list[int]) -> None:
        if not tensors:
            return
        count = max(top_k, 1)
        describe = lambda i: f"layer {layout.names[layers[i]]!r} of {tasks[i] if tasks else 'the base'} ({of})"
        stats, sigma, _, _ = statistics(tensors, bases, describe, count, rtol, seed)
        rows = torch.cat([stats[:, :3], sigma[:, :top_k]], 1)  # [B, 3 + top_k]
        index = torch.tensor(layers, device=device)
        if tasks:
            out[torch.tensor([packed.tasks.index(t) for t in tasks], device=device), index] = rows
        else:
            out[:, index] = rows

    base = layout.views(packed.base)
    # Rows of a tensor are views; a quantised one is dequantised while its statistics are computed.
    task_vectors = packed.whole_task_vectors()
    pairs = zip(packed.tasks, task_vectors)
    for rows in [list(pairs)] if isinstance(task_vectors, torch.Tensor) else ([pair] for pair in pairs):
        changed = [(t, name, view) for t, row in rows for name, view in layout.views(row).items()]
        fill(
            [view for _, _, view in changed],
            [base[name] for _, name, _ in changed] if of == "experts" else [],
            [task for task, _, _ in changed],
            [position[name] for _, name, _ in changed],
        )
    if of == "experts":
        fill(list(packed.unchanged.values()), [], [], [position[name] for name in packed.unchanged])
    return out.to(dtype)
