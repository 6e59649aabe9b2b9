"""How often every digit of 16 bits occurs among the magnitudes that begin with the digits known so far; see
samerge_ext.elementwise.magnitudes."""

import torch

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of a number -> the integers that its bits are read as
DIGITS = 1 << 16
PART = 1 << 19  # numbers handled at once


def count_digits(
    counts: torch.Tensor,  # [T, 65536] int64, added to
    numbers: torch.Tensor,  # [T, n]
    keys: torch.Tensor,  # [T] int64, the digits known so far
    ties: torch.Tensor,  # [T] int64; a row without any is not counted
    shift: int,  # bits below the digit
) -> None:
    is_first = shift == 8 * numbers.itemsize - 16
    for count, row, key, left in zip(counts, numbers, keys, ties, strict=True):
        for part in row.split(PART):
            magnitudes = magnitudes_of(part)
            counted = (left > 0).expand_as(magnitudes)
            if not is_first:
                counted = counted & (magnitudes >> (shift + 16) == key)
            digits = (magnitudes >> shift).bitwise_and_(DIGITS - 1).long()
            count.scatter_add_(0, digits, counted.long())


def magnitudes_of(numbers: torch.Tensor) -> torch.Tensor:
    """The bits without the sign's, which are ordered as magnitudes are."""
    bits = BITS[numbers.itemsize]
    return numbers.view(bits) & torch.iinfo(bits).max
