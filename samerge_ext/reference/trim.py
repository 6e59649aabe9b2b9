"""Zeroes what is smaller than the smallest magnitude that is kept; see samerge_ext.elementwise.magnitudes."""

import torch

from samerge_ext.reference.count_digits import PART, magnitudes_of


def trim(
    out: torch.Tensor,  # [T, n]; may be the numbers
    numbers: torch.Tensor,  # [T, n]
    keys: torch.Tensor,  # [T] int64, the smallest magnitudes that are kept
    ties: torch.Tensor,  # [T] int64, how many equal ones are kept, of which those that were met are taken off; -1: all
) -> None:
    for target, row, key, left in zip(out, numbers, keys, ties, strict=True):
        for place, part in zip(target.split(PART), row.split(PART), strict=True):
            magnitudes = magnitudes_of(part).long()
            equal = magnitudes == key
            rank = equal.cumsum(0)
            kept = (magnitudes > key) | (equal & ((left < 0) | (rank <= left)))
            place.copy_(torch.where(kept, part, 0))
            left.copy_(torch.where(left < 0, left, (left - equal.sum()).clamp(min=0)))
