"""The next digit of the smallest magnitude that is kept, from how often every digit occurs; see
samerge_ext.elementwise.magnitudes."""

import torch


def next_digit(
    counts: torch.Tensor,  # [T, 65536] int64, zero afterwards
    keys: torch.Tensor,  # [T] int64, the digits known so far
    ties: torch.Tensor,  # [T] int64, how many are kept of the numbers that were counted
    infinity: int,  # the digit of infinity; 65536 where the digit is not the first
    last: bool,  # whether none follows
) -> None:
    wanted = ties[:, None]
    largest_first = counts.flip(1).cumsum(1)  # [T, 65536]
    place = torch.searchsorted(largest_first, wanted.clamp(min=1))  # [T, 1], of the digit, if any
    found = place < counts.shape[1]
    place = place.clamp(max=counts.shape[1] - 1)
    digit = counts.shape[1] - 1 - place
    equal = counts.gather(1, digit)
    left = wanted - (largest_first.gather(1, place) - equal)
    key = torch.where(found, keys[:, None] << 16 | digit, 0)
    all_kept = ~found | (last & ((key == 0) | (left == equal)))
    broken = counts[:, infinity:].any(1, keepdim=True)
    key, left = torch.where(broken, -1, key), torch.where(broken | all_kept, -1, left)
    undecided = wanted > 0
    keys.copy_(torch.where(undecided, key, keys[:, None])[:, 0])
    ties.copy_(torch.where(undecided, left, wanted)[:, 0])
    counts.zero_()
