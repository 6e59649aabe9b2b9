"""Buffers between files and what merges, the CPU or, by way of pinned memory, a GPU: what alone knows where they lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

Place = TypeVar("Place")
Read = TypeVar("Read")
Reads = Sequence[tuple[torch.dtype, Callable[[Tensor], None]]]  # of every model: its type, and what reads into [n] of it


class Slot:
    """Room for what every model stores of one piece.

    stored: [bytes] of each model, on the device.
    """

    def __init__(self, stored: Sequence[Tensor]):
        self.stored = stored

    def fill(self, reads: Reads, size: int) -> list[Tensor]:
        """Reads ``size`` numbers of every model; returns them, [size] each, on the device after `arrive`."""
        found = []
        for buffer, (dtype, read) in zip(self.stored, reads, strict=True):
            found.append(numbers(buffer, dtype, size))
            read(found[-1])
        return found

    def arrive(self) -> None:
        """What the current stream does from here on finds what was filled in, maybe by another thread."""

    def release(self) -> None:
        """What the current stream has done so far was the last use of what is in it."""

    def settle(self) -> None:
        """Waits until nothing is on its way into it."""


class PinnedSlot(Slot):
    """A slot on a GPU: every model's part is on its way, on the stream of whoever fills it, while the next one's is read."""

    def __init__(self, stored: Sequence[Tensor], pinned: Tensor):  # [bytes] each, [models, bytes]
        super().__init__(stored)
        self._pinned, self._device = pinned, stored[0].device
        self._used = self._copied = torch.cuda.current_stream(self._device).record_event()  # after who had this memory before

    def fill(self, reads: Reads, size: int) -> list[Tensor]:
        self._copied.synchronize()
        stream, found = torch.cuda.current_stream(self._device), []
        stream.wait_event(self._used)
        for pinned, buffer, (dtype, read) in zip(self._pinned, self.stored, reads, strict=True):
            read(numbers(pinned, dtype, size))
            found.append(numbers(buffer, dtype, size).copy_(numbers(pinned, dtype, size), non_blocking=True))
            self._copied = stream.record_event()  # also where the next one cannot be read
        return found

    def arrive(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._copied)

    def release(self) -> None:
        self._used = torch.cuda.current_stream(self._device).record_event()

    def settle(self) -> None:
        self._copied.synchronize()


def new_slot(models: int, nbytes: int, device: torch.device) -> Slot:
    """Of ``nbytes`` for each model. Pinned memory is one block, since torch takes the next power of two for each."""
    stored = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(models)]
    if device.type == "cpu":
        return Slot(stored)
    return PinnedSlot(stored, torch.empty(models, nbytes, dtype=torch.uint8, device="cpu", pin_memory=True))


class Outlet:
    """The way of merged numbers back to the host, for a device that is a GPU by way of ``nbytes`` of pinned memory."""

    def __init__(self, nbytes: int, device: torch.device):
        self._device = device
        if device.type != "cpu":
            self._pinned = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def bring(self, merged: Tensor) -> Tensor:  # [n]
        """On the host, until the next call. Waits for the current stream alone."""
        if self._device.type == "cpu":
            return merged
        on_host = numbers(self._pinned, merged.dtype, merged.numel()).copy_(merged, non_blocking=True)
        torch.cuda.current_stream(self._device).record_event().synchronize()
        return on_host


def read_ahead(
    read: Callable[[Slot, Place], Read], places: Sequence[Place], slots: Sequence[Slot], device: torch.device
) -> Iterator[tuple[Place, Read]]:
    """What ``read`` brings from every place, in their order and valid until the next one is asked for: the next is read into the
    other of two slots meanwhile, by a thread and on a stream of its own."""
    try:
        with ThreadPoolExecutor(1, "samerge-reader", on_own_stream, (device,)) as reader:
            coming = [reader.submit(read, slots[0], place) for place in places[:1]]
            for i, place in enumerate(places):
                found = coming.pop().result()
                coming += [reader.submit(read, slots[(i + 1) % 2], following) for following in places[i + 1 : i + 2]]
                slots[i % 2].arrive()
                try:
                    yield place, found
                finally:
                    slots[i % 2].release()
    finally:
        for slot in slots:
            slot.settle()


def on_own_stream(device: torch.device) -> None:
    """From here on, what this thread asks of a GPU runs beside what others do."""
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device))


def numbers(buffer: Tensor, dtype: torch.dtype, count: int) -> Tensor:
    """The first ``count`` numbers in bytes [..., capacity]."""
    return buffer[..., : count * dtype.itemsize].view(dtype)
