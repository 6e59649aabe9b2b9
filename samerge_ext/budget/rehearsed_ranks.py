"""The ranks of a dry run: what they would send to each other takes its memory and is counted, and nobody is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from samerge_ext.packing.ranks import Ranks


@dataclass
class Traffic:
    """received: bytes that come to a rank from the others. at_their_own: whether ranks merge at coefficients of their own, as
    teachers do."""

    received: int = 0
    at_their_own: bool = False


@dataclass(frozen=True)
class RehearsedRanks(Ranks):
    """Rank ``rank`` of ``size`` without the others: collectives give tensors of their shapes and send nothing.

    On the CPU gloo gathers into a copy of what it gives, and sums a copy of what it is given; on GPUs NCCL does neither.
    """

    traffic: Traffic = field(default_factory=Traffic)

    def gather(self, part: Tensor) -> Callable[[], Tensor]:
        self.traffic.received += (self.size - 1) * part.nbytes
        found = part.new_empty(self.size, *part.shape)
        until_it_is_there = [part, *self._copy(found)]

        def waited() -> Tensor:
            until_it_is_there.clear()
            return found

        return waited

    def gave_the_same(self, found: Tensor) -> bool:
        return not self.traffic.at_their_own

    def exchange(self, parts: Tensor) -> Callable[[], Tensor]:
        self.traffic.received += parts.nbytes // self.size * (self.size - 1)
        found, sent = torch.empty_like(parts), [parts]

        def waited() -> Tensor:
            sent.clear()
            return found

        return waited

    def scatter_sum(self, parts: Tensor) -> Tensor:
        self.traffic.received += (self.size - 1) * parts[0].nbytes
        copy = self._copy(parts)
        del copy
        return torch.empty_like(parts[0])

    def _copy(self, tensor: Tensor) -> list[Tensor]:
        return [torch.empty_like(tensor)] if tensor.device.type == "cpu" else []
