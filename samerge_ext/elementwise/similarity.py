"""How large and how alike task vectors are: their norms, the cosines between them, and where they pull to different sides."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from samerge_ext.elementwise.file_plan import FileMerge
from samerge_ext.elementwise.opening import opened
from samerge_ext.elementwise.piecewise import chunks


def similarity(merge: FileMerge) -> dict[str, Any]:
    """Of the task vectors that would be merged, or where there is no base of the models themselves, before any rule changes them.

    "of": which of the two. "models": T names. "cosines": [T, T]. "conflicts": [T, T], of the numbers that are not 0 in either of
    two, the share whose signs differ. "layers": "cosine" and "sign conflicts" -> layer -> the mean over all pairs. "norms": model
    -> layer -> ‖·‖_F.

    Models are read once, piece by piece, in memory that does not depend on their size. Raises ValueError as `merge_files` does
    for models that do not fit together, and where there is only one.
    """
    if len(merge.experts) < 2 and merge.stacks is None:
        raise ValueError("similarity is between the task vectors of two models or more; the merge is of one")
    with opened(merge) as models:
        plan = models.plan
        pieces, count = plan.pieces(models.device), len(plan.experts)
        total = torch.zeros(3, count, count, dtype=torch.float64)
        by_layer: dict[str, dict[str, float]] = {"cosine": {}, "sign conflicts": {}}
        norms: dict[str, dict[str, float]] = {task: {} for task, _ in plan.experts}
        for name in plan.layers:
            sums = torch.zeros_like(total)
            for piece in pieces.in_turn([plan.extent(name)]):
                rows = piece.rows()
                for place in chunks(piece):
                    sums += pair_sums(rows[:, place]).cpu()
            cosines, conflicts = _of_pairs(sums)
            by_layer["cosine"][name], by_layer["sign conflicts"][name] = _mean_of_pairs(cosines), _mean_of_pairs(conflicts)
            for of_model, square in zip(norms.values(), sums[0].diagonal().tolist(), strict=True):
                of_model[name] = square**0.5
            total += sums
        cosines, conflicts = _of_pairs(total)
        return {
            "of": "models" if plan.base is None else "task vectors",
            "models": list(norms),
            "cosines": cosines.tolist(),
            "conflicts": conflicts.tolist(),
            "layers": by_layer,
            "norms": norms,
        }


def pair_sums(rows: Tensor) -> Tensor:  # [T, n] -> [3, T, T] in fp64
    """Of all pairs of rows the inner products, how many numbers differ in sign, and how many are 0 in neither."""
    wide, signs = rows.double(), rows.sign().float()  # counts of n < 2²⁴ are exact in fp32
    both = signs.abs() @ signs.abs().mT
    return torch.stack([wide @ wide.mT, (both - signs @ signs.mT).double() / 2, both.double()])


def _of_pairs(sums: Tensor) -> tuple[Tensor, Tensor]:  # [3, T, T] -> cosines and conflicts, [T, T]
    products, conflicts, both = sums
    norms = products.diagonal().sqrt()
    return products / (norms[:, None] * norms).clamp(min=torch.finfo(torch.float64).tiny), conflicts / both.clamp(min=1)


def _mean_of_pairs(values: Tensor) -> float:
    count = len(values)
    above = torch.triu_indices(count, count, 1)
    return values[above[0], above[1]].mean().item()
