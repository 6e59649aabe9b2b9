"""The k largest magnitudes of vectors that are seen piece by piece: exactly k of them, and nothing is sorted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from samerge_ext import backend
from samerge_ext.reference.count_digits import BITS, DIGITS


def kept_count(density: float, numel: int) -> int:
    """How many of ``numel`` numbers a density keeps: at least one unless it is zero (as mergekit counts)."""
    if density >= 1 or density <= 0 or not numel:
        return numel if density > 0 else 0
    return max(1, int(density * numel))


class LargestMagnitudes:
    """Keeps the ``counts[t]`` numbers of largest magnitude of row t and zeroes the others; of equal ones the first are kept.

    A radix selection: magnitudes are ordered as their bits are, sign aside, and every round counts one digit of 16 bits among
    the numbers whose higher digits are those of the k-th largest. The rows, of ``numel`` numbers in all, are seen once per round,
    piece by piece:

        for _ in range(largest.rounds):        # 1 for bf16 and fp16, 2 for fp32, 4 for fp64
            for piece in pieces: largest.look(piece)
            largest.next_round()
        for piece in pieces: largest.trim(out, piece)

    Nothing of this is read by the host but, after the last round, whether all numbers are finite.

    keys: [T] int64, the bits of the smallest magnitude that is kept, once all rounds are over.
    ties: [T] int64, how many numbers of just that magnitude are still to be kept; -1 where all of them are. Zeros are all kept.
    """

    def __init__(self, counts: Sequence[int], numel: int, dtype: torch.dtype):
        above_all = torch.iinfo(BITS[dtype.itemsize]).max
        ties = [-1 if count >= numel else count for count in counts]
        self.keys = torch.tensor([0 if count else above_all for count in counts], dtype=torch.int64, device="cpu")
        self.ties = torch.tensor(ties, dtype=torch.int64, device="cpu")
        self.rounds = dtype.itemsize // 2 if any(count > 0 for count in ties) else 0
        self._shift = 16 * (dtype.itemsize // 2 - 1)
        infinity = torch.tensor(torch.inf, dtype=dtype, device="cpu").view(BITS[dtype.itemsize])
        self._infinity = int(infinity) >> self._shift
        self._counts: Tensor | None = None  # [T, 65536] int64
        self._first_ties: Tensor | None = None  # before any piece was trimmed

    def look(self, numbers: Tensor) -> None:
        """Counts the digits of ``numbers`` [T, n]; rows may lie apart."""
        self._follow(numbers.device)
        backend.kernel("count_digits", numbers)(self._held_counts(), numbers, self.keys, self.ties, self._shift)

    def next_round(self) -> None:
        """Raises ValueError after the last round where one of the numbers is NaN or infinite."""
        counts, is_last = self._held_counts(), not self._shift
        backend.kernel("next_digit", counts)(counts, self.keys, self.ties, self._infinity, is_last)
        self._infinity = DIGITS
        self._shift -= 16
        if is_last:
            self._counts = None
            if bool((self.keys < 0).any()):
                raise ValueError("a task vector holds NaN or Inf")

    def begin(self) -> None:
        """Pieces are trimmed from the first one on, maybe once more."""
        if self._first_ties is None:
            self._first_ties = self.ties.clone()
        self.ties = self._first_ties.clone()

    def trim(self, out: Tensor, numbers: Tensor) -> None:
        """Copies ``numbers`` [T, n] with zeros for what is not kept; ``out`` may be the numbers. Pieces come in order."""
        self._follow(numbers.device)
        backend.kernel("trim", numbers)(out, numbers, self.keys, self.ties)

    def _follow(self, device: torch.device) -> None:
        """What is known of the rows goes where they are."""
        self.keys, self.ties = self.keys.to(device, non_blocking=True), self.ties.to(device, non_blocking=True)

    def _held_counts(self) -> Tensor:
        if self._counts is None:
            self._counts = torch.zeros(self.keys.numel(), DIGITS, dtype=torch.int64, device=self.keys.device)
        return self._counts
