"""Where base and task vectors live while a streamed model runs, and how some of their numbers come to the device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias, overload

import torch
from torch import Tensor

from samerge_ext.packing.in_pieces import InPieces
from samerge_ext.packing.quantised import QuantisedTaskVectors

InMemory: TypeAlias = Tensor | QuantisedTaskVectors
Numbers: TypeAlias = InMemory | InPieces
READ_AT_ONCE = 1 << 22  # numbers of all rows, where all are read into memory


class Store(ABC):
    """Base and task vectors, as a streamed model fetches them.

    device: where what is fetched lies. piece: the most numbers that can be fetched at once, None where all can.
    """

    device: torch.device
    piece: int | None

    @abstractmethod
    def begin_pass(self) -> None:
        """A pass through the model begins: what was fetched in the last one will be fetched again, in its order."""

    @abstractmethod
    def fetch(self, start: int, length: int) -> tuple[Tensor, InMemory]:
        """base [length] and task vectors [T, length] from number ``start`` on, valid until the next fetch."""


class WholeStore(Store):
    """Base and task vectors that are on the device as they are."""

    piece = None

    def __init__(self, base: Tensor, task_vectors: InMemory):  # [N], [T, N]
        self.base, self.task_vectors = base, task_vectors
        self.device = base.device

    def begin_pass(self) -> None:
        pass

    def fetch(self, start: int, length: int) -> tuple[Tensor, InMemory]:
        return self.base[start : start + length], narrow(self.task_vectors, start, length)


class StagedStore(Store):
    """Base and task vectors in host memory or in pieces, brought to the device through two buffers.

    While one piece is used, the next is fetched by a thread of its own, and where the device is a GPU on a stream of its own;
    which one comes next is known from the last pass. Memory: two pieces of base and task vectors on the device, and two more
    of pinned memory between a file and a GPU.

    piece: numbers of a buffer, a multiple of 1,024.
    """

    def __init__(self, base: Tensor | InPieces[Tensor], task_vectors: Numbers, device: torch.device, piece: int):  # [N], [T, N]
        self.device, self.piece = device, min(piece, base.shape[0])
        self._base, self._task_vectors = base, task_vectors
        self._slots = [_Slot(base, task_vectors, self.piece, device) for _ in range(2)]
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="samerge-reader")
        self._last_pass: list[tuple[int, int]] = []
        self._this_pass: list[tuple[int, int]] = []
        self._place = 0

    def begin_pass(self) -> None:
        if self._this_pass:
            self._last_pass, self._this_pass, self._place = self._this_pass, [], 0

    def fetch(self, start: int, length: int) -> tuple[Tensor, InMemory]:
        wanted = (start, length)
        if self._slots[0].holds != wanted:
            if self._slots[1].holds != wanted:
                self._load(self._slots[1], wanted)
            self._slots.reverse()
            self._this_pass.append(wanted)
            ready = self._slots[0].ready.result()
            if ready is not None:
                torch.cuda.current_stream(self.device).wait_event(ready)
            following = self._following(wanted)
            if following not in (None, wanted):
                self._load(self._slots[1], following)
        self._slots[0].ready.result()  # raises what went wrong while reading, at every attempt to use it
        return self._slots[0].base[:length], narrow(self._slots[0].task_vectors, 0, length)

    def _following(self, wanted: tuple[int, int]) -> tuple[int, int] | None:
        """What was fetched after this in the last pass; after its last piece, the first one."""
        try:
            self._place = self._last_pass.index(wanted, self._place) + 1
        except ValueError:
            return None
        return self._last_pass[self._place % len(self._last_pass)]

    def _load(self, slot: _Slot, wanted: tuple[int, int]) -> None:
        slot.ready.exception()  # a load that turned out not to be wanted must not write into the buffer later
        slot.holds = wanted
        free = torch.cuda.current_stream(self.device).record_event() if self._stream is not None else None
        slot.ready = self._reader.submit(self._read, slot, free, *wanted)

    def _read(self, slot: _Slot, free: torch.cuda.Event | None, start: int, length: int) -> torch.cuda.Event | None:
        sources = zip((self._base, self._task_vectors), (slot.base, slot.task_vectors), slot.pinned, strict=True)
        if self._stream is None or free is None:
            for source, target, _ in sources:
                _fill(target, source, start, length)
            return None
        if slot.copied is not None:
            slot.copied.synchronize()  # the pinned buffers are read until then
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(free)
            for source, target, pinned in sources:
                if pinned is not None:
                    _fill(pinned, source, start, length)
                    copy_rows(narrow(pinned, 0, length), narrow(target, 0, length))
                else:
                    _fill(target, source, start, length)
            slot.copied = self._stream.record_event()
        return slot.copied


class _Slot:
    """One of two buffers. holds: start and length of the piece in it, or on the way; ready: resolves when it is there."""

    def __init__(self, base: Tensor | InPieces[Tensor], task_vectors: Numbers, piece: int, device: torch.device):
        self.holds: tuple[int, int] | None = None
        self.ready: Future[torch.cuda.Event | None] = Future()
        self.ready.set_result(None)
        self.copied: torch.cuda.Event | None = None
        self.base, self.task_vectors = empty_like(base, piece, device), empty_like(task_vectors, piece, device)
        self.pinned = [
            empty_like(source, piece, "cpu", pin_memory=True)
            if device.type == "cuda" and isinstance(source, InPieces) and source.reads_to.type == "cpu"
            else None
            for source in (base, task_vectors)
        ]


def known_device(device: torch.device | str) -> torch.device:
    """Raises ValueError where torch knows no such device."""
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r}: torch knows no such device; cpu and cuda are some") from error


def check_device(device: str | None) -> None:
    """Raises ValueError where torch knows no such device, or finds none here."""
    wanted = known_device(device or "cpu")
    if wanted.type == "cuda" and (wanted.index or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(f"device={device!r}: torch finds {count} GPUs here; leave device out to run on the CPU")
    if wanted.type not in ("cpu", "cuda"):
        try:
            torch.empty(1, device=wanted).item()
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"device={device!r}: torch cannot compute on it here; leave device out to run on the CPU") from error


def indexed(device: torch.device | str) -> torch.device:
    """A device as its tensors name it: "cuda" is the current one, "cuda:0" say."""
    device = known_device(device)
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def parts(numbers: InMemory) -> dict[str, Tensor]:
    """The tensors, a row per task (or alone), that hold base or task vectors: one, or codes and scales."""
    return {"numbers": numbers} if isinstance(numbers, Tensor) else numbers.tensors()


def map_parts(function: Callable[[Tensor], Tensor], numbers: InMemory) -> InMemory:
    """Numbers in memory, with what ``function`` makes of each tensor that holds them."""
    if isinstance(numbers, Tensor):
        return function(numbers)
    tensors = {name: function(part) for name, part in numbers.tensors().items()}
    return QuantisedTaskVectors(**tensors, shared=numbers.shared)


@overload
def narrow(numbers: Tensor, start: int, length: int) -> Tensor: ...
@overload
def narrow(numbers: InMemory, start: int, length: int) -> InMemory: ...
def narrow(numbers: InMemory, start: int, length: int) -> InMemory:
    """Numbers ``start`` … of [N] or [T, N], as views; multiples of 1,024. Quantised ones have a `narrow` of their own."""
    return numbers[..., start : start + length] if isinstance(numbers, Tensor) else numbers.narrow(start, length)


def on_host(numbers: Numbers) -> bool:
    """Whether they are in memory whole."""
    return not isinstance(numbers, InPieces)


@overload
def empty_like(
    numbers: Tensor | InPieces[Tensor], length: int, device: torch.device | str, pin_memory: bool = False
) -> Tensor: ...
@overload
def empty_like(numbers: Numbers, length: int, device: torch.device | str, pin_memory: bool = False) -> InMemory: ...
def empty_like(numbers: Numbers, length: int, device: torch.device | str, pin_memory: bool = False) -> InMemory:
    """Room for ``length`` such numbers, which may be more than these are."""
    if not isinstance(numbers, Tensor):
        return numbers.empty(length, device, pin_memory)
    return torch.empty(*numbers.shape[:-1], length, dtype=numbers.dtype, device=device, pin_memory=pin_memory)


@overload
def in_memory(numbers: Tensor | InPieces[Tensor], device: torch.device | str) -> Tensor: ...
@overload
def in_memory(numbers: Numbers, device: torch.device | str) -> InMemory: ...
def in_memory(numbers: Numbers, device: torch.device | str) -> InMemory:
    """All of them on a device; what is in a file and goes to a GPU takes no more of the host than some of them."""
    if not isinstance(numbers, InPieces):
        return numbers.to(device)
    numel = numbers.shape[-1]
    whole, at_once = empty_like(numbers, numel, device), min(READ_AT_ONCE, numel)
    buffer = None if numbers.reads_to.type == torch.device(device).type else empty_like(numbers, at_once, numbers.reads_to)
    for start in range(0, numel, READ_AT_ONCE):
        length = min(at_once, numel - start)
        place = narrow(whole, start, length)
        numbers.read_into(start, length, place if buffer is None else buffer)
        if buffer is not None:
            copy_rows(narrow(buffer, 0, length), place)
    return whole


def _fill(target: InMemory, source: Numbers, start: int, length: int) -> None:
    """Puts numbers ``start`` … of the source into the first places of the target."""
    if isinstance(source, InPieces):
        source.read_into(start, length, target)
    else:
        copy_rows(narrow(source, start, length), narrow(target, 0, length))


def copy_rows(source: InMemory, target: InMemory) -> None:
    """Row by row, since only what is contiguous is copied from pinned memory without a detour."""
    for name, part in parts(source).items():
        for row, place in zip(part.reshape(-1, part.shape[-1]), parts(target)[name].view(-1, part.shape[-1]), strict=True):
            place.copy_(row, non_blocking=True)


def pin(tensor: Tensor) -> None:
    """Pins host memory where it lies, so that it is copied to a GPU beside the computation; a copy would take it twice."""
    if not tensor.is_pinned():
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0))
