"""The k largest magnitudes of a vector that is seen piece by piece: exactly k of them, and nothing is sorted."""

from __future__ import annotations

import torch
from torch import Tensor

from samerge_ext import backend

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of a number -> the integers that its bits are read as
DIGITS = 1 << 16
PART = 1 << 18  # numbers handled at once: what is made of them stays in the processor's caches


def kept_count(density: float, numel: int) -> int:
    """How many of ``numel`` numbers a density keeps: at least one unless it is zero (as mergekit counts)."""
    if density >= 1 or density <= 0 or not numel:
        return numel if density > 0 else 0
    return max(1, int(density * numel))


class LargestMagnitudes:
    """Keeps the ``count`` numbers of largest magnitude and zeroes the others; of equal ones the first are kept.

    A radix selection: magnitudes are ordered as their bits are, sign aside, and every round counts one digit of 16 bits among
    the numbers whose higher digits are those of the k-th largest. The whole vector is seen once per round, piece by piece:

        for _ in range(largest.rounds):        # 1 for bf16 and fp16, 2 for fp32, 4 for fp64
            for piece in pieces: largest.look(piece)
            largest.next_round()
        for piece in pieces: largest.trim_(piece)

    key: the bits of the smallest magnitude that is kept, once all rounds are over.
    ties: how many numbers of just that magnitude are still to be kept; None where all of them are.
    """

    def __init__(self, count: int, dtype: torch.dtype):
        self.rounds = dtype.itemsize // 2
        self.key = 0
        self.ties: int | None = count
        self._shift = 16 * (self.rounds - 1)
        self._infinity = int(torch.tensor(torch.inf, dtype=dtype).view(BITS[dtype.itemsize])) >> self._shift
        self._first = True
        self._counts: Tensor | None = None  # [65536]

    def look(self, numbers: Tensor) -> None:
        """Counts the digits of ``numbers`` [n], contiguous."""
        if self._counts is None:
            self._counts = torch.zeros(DIGITS, dtype=torch.int64, device=numbers.device)
        if count := backend.fused("count_digits", numbers):
            count(self._counts, numbers, self._shift, -1 if self._first else self.key)
            return
        for part in numbers.split(2 * PART):
            self._counts += self._digits(part)

    def _digits(self, numbers: Tensor) -> Tensor:
        """[65536], how often every digit occurs in [n]."""
        keys = _keys(numbers)
        if not self._first:
            keys = keys[(keys >> (self._shift + 16)) == self.key]
        if self._shift:
            keys = keys >> self._shift
        if not self._first:
            keys = keys & (DIGITS - 1)
        return torch.bincount(keys, minlength=DIGITS)

    def next_round(self) -> None:
        """Raises ValueError where one of the numbers is NaN or infinite."""
        if self.ties is None:  # all are kept
            return
        counts = torch.zeros(DIGITS, dtype=torch.int64) if self._counts is None else self._counts.cpu()
        if self._first and counts[self._infinity :].any():
            raise ValueError("a task vector holds NaN or Inf")
        largest_first = counts.flip(0).cumsum(0)
        place = int(torch.searchsorted(largest_first, self.ties))  # of the digit of the k-th largest
        if place == DIGITS:  # there are fewer numbers than are to be kept
            self.key, self.ties = 0, None
        else:
            digit = DIGITS - 1 - place
            self.key = self.key << 16 | digit
            self.ties -= int(largest_first[place - 1]) if place else 0
            if not self._shift and self.ties == int(counts[digit]):
                self.ties = None
        self._first, self._counts = False, None
        self._shift -= 16

    def trim_(self, numbers: Tensor) -> None:
        """Zeroes what is not kept of ``numbers`` [n], contiguous, in place; pieces come in order."""
        if trim := backend.fused("trim", numbers):
            ties = trim(numbers, self.key, -1 if self.ties is None else self.ties)
            self.ties = None if self.ties is None else ties
            return
        for part in numbers.split(PART):
            keys, bits = _keys(part), part.view(BITS[part.dtype.itemsize])
            smallest = self.key + 1 if self.ties == 0 else self.key
            if self.ties:
                found = keys.numel() - int(torch.count_nonzero(keys ^ self.key))
                if found > self.ties:
                    bits[(keys == self.key).nonzero()[self.ties :]] = 0
                self.ties -= min(found, self.ties)
            # The sign bit of the difference, spread over all bits, is a mask of what is too small. (Comparisons are slower.)
            below = keys.sub_(smallest).bitwise_right_shift_(8 * part.dtype.itemsize - 1)
            bits.bitwise_and_(below.bitwise_not_())


def _keys(numbers: Tensor) -> Tensor:
    bits = BITS[numbers.dtype.itemsize]
    return numbers.view(bits) & torch.iinfo(bits).max
