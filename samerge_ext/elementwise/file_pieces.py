"""Pieces of a base and experts, read from model folders into buffers that are used again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from samerge_ext.checkpoints.sources import Source
from samerge_ext.elementwise.piecewise import ALIGNMENT, Piece
from samerge_ext.packing.layout import BLOCK
from samerge_ext.packing.validation import check_finite

BUFFER_BYTES = 32 << 20  # of one piece of all models as they are stored


class FilePieces:
    """Reads pieces; every thread has buffers of its own, whose size does not depend on the model's.

    base: None where the rows of a piece are the experts themselves, beside a base of zeros.
    factors: of the task vectors, one for each expert.
    stored, merged: the dtypes of all tensors in their files, and those that they are merged in.
    """

    def __init__(
        self,
        base: Source | None,
        experts: Sequence[Source],
        stored: Iterable[torch.dtype],
        merged: Iterable[torch.dtype],
    ):
        self._has_base = base is not None
        self._sources = [base, *experts] if base is not None else list(experts)
        self._num_experts = len(experts)
        self._stored_bytes = max(dtype.itemsize for dtype in stored)
        self._merged_bytes = max(dtype.itemsize for dtype in merged)
        pieces = BUFFER_BYTES // (len(self._sources) * self._stored_bytes * ALIGNMENT)
        self.capacity = max(1, pieces) * ALIGNMENT  # numbers
        self.factors = [1.0] * len(experts)
        self._buffers = threading.local()

    def of(
        self, name: str, dtype: torch.dtype, numel: int, unseen: Collection[int] = ()
    ) -> Callable[[], Iterator[Piece]]:
        """A function that goes through a tensor's pieces; a piece counts until the next one is taken.

        unseen: the experts whose numbers are searched for NaN and Inf, which ValueError is raised for, since a rule drops some.
        A tensor of one piece is read only once, by the first call.
        """
        starts = range(0, numel, self.capacity)
        if len(starts) != 1:
            return lambda: (self._read(name, dtype, start, min(self.capacity, numel - start), unseen) for start in starts)
        held: list[Piece] = []

        def only() -> Iterator[Piece]:
            if not held:
                held.append(self._read(name, dtype, 0, numel, unseen))
            return iter(held)

        return only

    def _read(self, name: str, dtype: torch.dtype, start: int, size: int, unseen: Collection[int]) -> Piece:
        buffer, rows, base = self._own_buffers()
        padded = -(-size // BLOCK) * BLOCK
        stored = []
        for source, numbers in zip(self._sources, buffer, strict=True):
            stored.append(_numbers(numbers, source.dtype(name), size))
            source.read_into(name, start, stored[-1])
        experts = stored[-self._num_experts :]
        for place in unseen:
            check_finite(self._sources[place - self._num_experts], name, experts[place])
        if self._has_base and stored[0].dtype == dtype:
            base = _numbers(buffer[0], dtype, padded)
        else:
            base = _numbers(base, dtype, padded)
            base[:size].copy_(stored[0]) if self._has_base else base.zero_()
        base[size:] = 0
        rows = _numbers(rows, dtype, padded)  # [T, padded]
        rows[:, size:] = 0
        for row, expert, factor in zip(rows[:, :size], experts, self.factors, strict=True):
            if not self._has_base:
                row.copy_(expert)
            elif expert.dtype == dtype:
                torch.sub(expert, base[:size], out=row)
            else:
                row.copy_(expert).sub_(base[:size])
            if factor != 1:
                row.mul_(factor)
        return Piece(start, size, base, rows, room=rows)

    def _own_buffers(self) -> tuple[list[Tensor], Tensor, Tensor]:
        """What is read, [bytes] for each model; task vectors, [T, bytes]; a base of another dtype, [bytes]."""
        own = self._buffers
        if not hasattr(own, "stored"):
            own.stored = [torch.empty(self.capacity * self._stored_bytes, dtype=torch.uint8) for _ in self._sources]
            own.rows = torch.empty(self._num_experts, self.capacity * self._merged_bytes, dtype=torch.uint8)
            own.base = torch.empty(self.capacity * self._merged_bytes, dtype=torch.uint8)
        return own.stored, own.rows, own.base


def _numbers(buffer: Tensor, dtype: torch.dtype, count: int) -> Tensor:
    """The first ``count`` numbers in bytes [..., capacity]."""
    return buffer[..., : count * dtype.itemsize].view(dtype)
