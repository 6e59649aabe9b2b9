"""Pieces of a base and experts, read from model folders into buffers that are used again."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from samerge_ext.checkpoints.sources import Source
from samerge_ext.elementwise.piecewise import ALIGNMENT, Piece
from samerge_ext.elementwise.staging import Outlet, Slot, new_slot, numbers, read_ahead
from samerge_ext.packing.layout import BLOCK
from samerge_ext.packing.validation import check_finite

# Of one piece of all models as they are stored. A GPU's are larger: starting a piece's kernels, some tens at 5 to 10 µs each, is
# to be little beside its way over PCIe, 1 to 3 ms.
BUFFER_BYTES = {"cpu": 32 << 20, "cuda": 64 << 20}


@dataclass(frozen=True)
class Extent:
    """A tensor, or some of it: numbers ``start`` … of the tensor ``name``, ``size`` of them, to be merged in ``dtype``.

    unseen: the experts whose numbers are searched for NaN and Inf, which ValueError is raised for, since a rule drops some.
    unit: numbers that are in one piece together.
    """

    name: str
    dtype: torch.dtype
    size: int
    unseen: Collection[int] = ()
    unit: int = 1
    start: int = 0

    def in_parts(self, count: int) -> list[Extent]:
        """Equal ones."""
        size = self.size // count
        return [replace(self, start=self.start + part * size, size=size) for part in range(count)]


class FilePieces:
    """Reads pieces; every thread has buffers of its own, whose size does not depend on the model's.

    base: None where the rows of a piece are the experts themselves, beside a base of zeros.
    factors: of the task vectors, one for each expert.
    stored, merged, written: the dtypes of all tensors in their files, those that they are merged in, and those of the result.
    largest: the numbers of the largest tensor. longest: those of the longest unit, which a piece has room for at least.
    device: where pieces lie. On a GPU a thread has `BUFFER_BYTES` of pinned memory and of the GPU's (`in_turn` twice that), task
        vectors and a base there, and pinned memory for a merged piece.
    """

    def __init__(
        self,
        base: Source | None,
        experts: Sequence[Source],
        stored: Iterable[torch.dtype],
        merged: Iterable[torch.dtype],
        written: Iterable[torch.dtype],
        largest: int,
        longest: int,
        device: torch.device,
    ):
        self._has_base = base is not None
        self._sources = [base, *experts] if base is not None else list(experts)
        self._num_experts = len(experts)
        self._stored_bytes, self._merged_bytes, self._written_bytes = (
            max(dtype.itemsize for dtype in dtypes) for dtypes in (stored, merged, written)
        )
        fitting = BUFFER_BYTES[device.type] // (len(self._sources) * self._stored_bytes * ALIGNMENT)
        self.capacity = max(1, -(-longest // ALIGNMENT), min(fitting, -(-largest // ALIGNMENT))) * ALIGNMENT  # numbers
        self.factors = [1.0] * len(experts)
        self._device = device
        self._own = threading.local()

    @property
    def thread_bytes(self) -> int:
        """What a thread holds once it has read, merged and brought back a piece."""
        read = len(self._sources) * self._stored_bytes
        return self.capacity * (read + (self._num_experts + 2) * self._merged_bytes + self._written_bytes)

    def of(self, tensor: Extent) -> Callable[[], Iterator[Piece]]:
        """A function that goes through a tensor's pieces; a piece counts until the next one is taken.

        A tensor of one piece is read only once, by the first call.
        """
        extents = self._cut(tensor)
        if len(extents) != 1:
            return lambda: self._one_by_one(extents)
        held: list[Piece] = []

        def only() -> Iterator[Piece]:
            if not held:
                held.extend(self._one_by_one(extents))
            return iter(held)

        return only

    def in_turn(self, tensors: Iterable[Extent]) -> Generator[Piece, None, None]:
        """The pieces of all of these tensors, each until the next one is taken; on a GPU that is read meanwhile."""
        extents = [extent for tensor in tensors for extent in self._cut(tensor)]
        if self._device.type == "cpu":
            yield from self._one_by_one(extents)
            return
        slots = self._slots(2)
        for places, (extent, stored) in enumerate(read_ahead(self._fill, extents, slots, self._device)):
            yield self._piece(extent, slots[places % 2], stored)

    def number_in(self, tensor: Extent) -> int:
        """Of pieces."""
        return len(self._cut(tensor))

    def to_host(self, merged: Tensor) -> Tensor:  # [n]
        """A merged piece where it can be written from, until this thread's next one."""
        if not hasattr(self._own, "outlet"):
            self._own.outlet = Outlet(self.capacity * self._written_bytes, self._device)
        return self._own.outlet.bring(merged)

    def _cut(self, tensor: Extent) -> list[Extent]:
        """The extents of its pieces."""
        at_once = self.capacity // tensor.unit * tensor.unit
        end = tensor.start + tensor.size
        return [replace(tensor, size=min(at_once, end - start), start=start) for start in range(tensor.start, end, at_once)]

    def _one_by_one(self, extents: Iterable[Extent]) -> Iterator[Piece]:
        (slot,) = self._slots(1)
        for extent in extents:
            yield self._piece(extent, slot, self._fill(slot, extent))

    def _fill(self, slot: Slot, extent: Extent) -> list[Tensor]:
        """What each model stores, [size]."""
        name, start = extent.name, extent.start
        return slot.fill([(s.dtype(name), functools.partial(s.read_into, name, start)) for s in self._sources], extent.size)

    def _piece(self, extent: Extent, slot: Slot, stored: list[Tensor]) -> Piece:
        dtype, size = extent.dtype, extent.size
        padded = -(-size // BLOCK) * BLOCK
        experts = stored[-self._num_experts :]
        for place in extent.unseen:
            check_finite(self._sources[place - self._num_experts], extent.name, experts[place])
        rows, base = self._task_vectors_and_base()
        if self._has_base and stored[0].dtype == dtype:
            base = numbers(slot.stored[0], dtype, padded)
        else:
            base = numbers(base, dtype, padded)
            base[:size].copy_(stored[0]) if self._has_base else base.zero_()
        base[size:] = 0
        rows = numbers(rows, dtype, padded)  # [T, padded]
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
        return Piece(extent.start, size, base, rows, room=rows)

    def _slots(self, count: int) -> list[Slot]:
        """This thread's, for what is read."""
        own = self._own
        if not hasattr(own, "slots"):
            own.slots = []
        while len(own.slots) < count:
            own.slots.append(new_slot(len(self._sources), self.capacity * self._stored_bytes, self._device))
        return own.slots[:count]

    def _task_vectors_and_base(self) -> tuple[Tensor, Tensor]:
        """[T, bytes], and of a base of another dtype than is stored [bytes]."""
        own = self._own
        if not hasattr(own, "rows"):
            nbytes = self.capacity * self._merged_bytes
            own.rows = torch.empty(self._num_experts, nbytes, dtype=torch.uint8, device=self._device)
            own.base = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        return own.rows, own.base


class InTurn:
    """As `FilePieces.in_turn`, tensor by tensor: for one that is given up amid its pieces, the others are read on."""

    def __init__(self, pieces: FilePieces, tensors: Sequence[Extent]):
        self._pieces, self._tensors = pieces, tensors
        self._coming, self._amid = pieces.in_turn(tensors), False

    def of(self, tensor: Extent) -> Iterator[Piece]:
        """The pieces of the next tensor."""
        if self._amid:
            self._coming.close()
            self._coming = self._pieces.in_turn(self._tensors[self._tensors.index(tensor) :])
        self._amid = True
        yield from itertools.islice(self._coming, self._pieces.number_in(tensor))
        self._amid = False

    def close(self) -> None:
        """Ends the reading ahead."""
        self._coming.close()
