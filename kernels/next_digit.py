"""The next digit of the smallest magnitude that is kept of each row: the largest that, with those above it, as many of the
counted numbers have as are kept.

One program takes a row, and its counts in spans, from the highest on.
"""

import torch
import triton
import triton.language as tl

from . import launch


def next_digit(
    counts: torch.Tensor,  # [T, 65536] int64, zero afterwards
    keys: torch.Tensor,  # [T] int64, the digits known so far
    ties: torch.Tensor,  # [T] int64, how many are kept of the numbers that were counted
    infinity: int,  # the digit of infinity; 65536 where the digit is not the first
    last: bool,  # whether none follows
) -> None:
    if keys.numel():
        with torch.cuda.device_of(counts):
            _next_digit[(keys.numel(),)](counts, keys, ties, infinity, LAST=last, DIGITS=counts.shape[1], SPAN=launch.SPAN)


@triton.jit
def _next_digit(counts, keys, ties, infinity, LAST: tl.constexpr, DIGITS: tl.constexpr, SPAN: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    kept, known = tl.load(ties + row), tl.load(keys + row)
    undecided = kept > 0
    above = kept * 0  # numbers with larger digits than the span's
    digit, larger, equal, beyond = above - 1, above, above, above
    for first in range(0, DIGITS, SPAN):
        digits = DIGITS - 1 - first - tl.arange(0, SPAN)
        place = counts + row * DIGITS + digits
        count = tl.load(place)
        beyond += tl.sum(tl.where(digits >= infinity, count, 0), 0)
        until = above + tl.cumsum(count, 0)
        is_it = (until >= kept) & (until - count < kept)
        digit = tl.maximum(digit, tl.max(tl.where(is_it, digits, -1), 0))
        larger += tl.sum(tl.where(is_it, until - count, 0), 0)
        equal += tl.sum(tl.where(is_it, count, 0), 0)
        above += tl.sum(count, 0)
        tl.store(place, tl.zeros([SPAN], tl.int64))
    key = tl.where(digit < 0, 0, (known << 16) | digit)
    left = kept - larger
    if LAST:
        left = tl.where((key == 0) | (left == equal), -1, left)
    left = tl.where((digit < 0) | (beyond > 0), -1, left)
    key = tl.where(beyond > 0, -1, key)
    tl.store(keys + row, tl.where(undecided, key, known))
    tl.store(ties + row, tl.where(undecided, left, kept))
