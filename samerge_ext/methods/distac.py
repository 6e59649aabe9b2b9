"""DisTaC's norm alignment (arXiv 2508.01148): task vectors of one length, before any other method merges them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from samerge_ext.packing.packed_weights import PackedWeights


def align_norms(packed: PackedWeights) -> PackedWeights:
    """The same base with every τ_t shortened to the smallest ‖τ_t‖: a long one would outvote the others.

    The distillation that the paper has follow is not part of it. Raises ValueError where a task vector is zero, NaN or Inf,
    or quantised.
    """
    stored = packed.exact_task_vectors("aligning norms")
    squares = [sum(float(piece.double().square().sum()) for piece in row.split(1 << 20)) for row in stored]
    task_vectors = stored.clone()
    for row, factor in zip(task_vectors, shortening(squares, packed.tasks), strict=True):
        row.mul_(factor)
    return replace(packed, task_vectors=task_vectors)


def shortening(squares: Sequence[float], tasks: Sequence[str]) -> list[float]:
    """The factor of every task vector, from the squares of their norms; fp32 numbers."""
    for square, task in zip(squares, tasks, strict=True):
        if not 0 < square < torch.inf:
            raise ValueError(f"the task vector of '{task}' has the norm {square**0.5:g}; it cannot be aligned, leave it out")
    return torch.tensor([(min(squares) / square) ** 0.5 for square in squares], dtype=torch.float32).tolist()
