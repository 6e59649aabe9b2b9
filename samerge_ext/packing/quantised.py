"""Task vectors in 8 or 4 bits a number, in the place of a tensor [T, N]."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from samerge_ext.packing.layout import BLOCK
from samerge_ext.reference.dequantised import dequantised

GROUP = 128  # numbers that share a scale
LARGEST_CODE = {8: 127, 4: 7}
LARGEST_SHARED = 119  # 16 · 7 + 7
FORMATS = {"int8": 8, "int4": 4, "int4-residual": 4}  # name -> bits of a number of one task
_CHUNK = 1 << 22  # numbers that are quantised at once: bounds what quantising allocates


@dataclass(frozen=True, eq=False)
class QuantisedTaskVectors:
    """T task vectors of N numbers, symmetric: a number is scale · code, with one scale per 128 numbers.

    codes: [R, N] int8, or [R, N // 2] uint8 for 4 bits. There, of 128 numbers in 64 bytes, byte j holds number j in its low
        half and number j + 64 in its high half, each plus 8: whole vectors of bytes become whole vectors of numbers.
    scales: [R, N // 128] bf16. A scale of two bytes costs 0.125 bits a number where fp32 would cost 0.25, of 4; bf16 has
        fp32's range, so that no task vector is too small for it. It is rounded up, and the codes are found with the rounded
        one: the error of a number is at most half a scale, and a group's largest number decides its scale.
    shared: R = T + 2. All tasks share an offset, their mean when they are packed, and the first T rows are what differs
        from it. The offset has 239 levels: the last two rows are 16 · high + low of its codes, so that it is two more task
        vectors of 4 bits whose coefficient is the sum of all tasks', and no operator need know of it.

    R = T otherwise. Bytes per number of one task: 1.016 for int8, 0.516 for int4, 0.516 (T + 2) / T for int4-residual.
    """

    codes: Tensor
    scales: Tensor
    shared: bool = False

    @classmethod
    def zeros(cls, num_tasks: int, numel: int, form: str, device: torch.device | str = "cpu") -> QuantisedTaskVectors:
        """T task vectors of zeros, to be written; form is one of `FORMATS`."""
        parts = parts_of(num_tasks, form).items()
        tensors = {name: torch.zeros(rows, numel // per, dtype=dtype, device=device) for name, (rows, dtype, per) in parts}
        return cls(**tensors, shared=is_shared(form))

    def empty(self, length: int, device: torch.device | str, pin_memory: bool = False) -> QuantisedTaskVectors:
        """Room for ``length`` numbers of as many task vectors, in the same form."""
        options: dict = {"device": device, "pin_memory": pin_memory}
        parts = parts_of(len(self), self.form).items()
        tensors = {name: torch.empty(rows, length // per, dtype=dtype, **options) for name, (rows, dtype, per) in parts}
        return QuantisedTaskVectors(**tensors, shared=self.shared)

    @classmethod
    def of(cls, task_vectors: Tensor, form: str) -> QuantisedTaskVectors:  # [T, N]
        """Quantises task vectors that are at hand; `PackedWeights.from_*` quantises tensor by tensor."""
        num_tasks, numel = task_vectors.shape
        store = cls.zeros(num_tasks, numel, form, task_vectors.device)
        offset = store.write_shared(0, sum(task_vectors) / task_vectors.new_tensor(num_tasks)) if store.shared else 0
        for task, task_vector in enumerate(task_vectors):
            store.write(task, 0, task_vector - offset)
        return store

    @property
    def shape(self) -> torch.Size:
        """[T, N]."""
        return torch.Size((len(self), self.scales.shape[1] * GROUP))

    @property
    def bits(self) -> int:
        """Of a number of one task."""
        return 8 if self.codes.dtype == torch.int8 else 4

    @property
    def form(self) -> str:
        """One of `FORMATS`."""
        return f"int{self.bits}{'-residual' * self.shared}"

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def __len__(self) -> int:
        return self.codes.shape[0] - 2 * self.shared

    def __getitem__(self, task: int) -> Tensor:
        """The numbers of one task, [N] fp32."""
        if not -len(self) <= task < len(self):
            raise IndexError(f"task {task} of {len(self)}")
        row = task % len(self)
        numbers = dequantised(self.codes[row, None], self.scales[row, None], torch.float32)[0]
        return numbers + self._offset() if self.shared else numbers

    def __iter__(self) -> Iterator[Tensor]:
        return (self[task] for task in range(len(self)))

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """All numbers, [T, N]."""
        rows = dequantised(self.codes, self.scales, dtype)
        return rows[:-2] + rows[-2:].sum(0) if self.shared else rows

    def narrow(self, start: int, length: int) -> QuantisedTaskVectors:
        """The numbers from ``start`` on, ``length`` of them, as views; both are multiples of 1,024."""
        if start % BLOCK or length % BLOCK:
            raise ValueError(f"numbers {start} … {start + length} do not begin and end at multiples of {BLOCK}")
        per_code = 8 // self.bits
        codes = self.codes.narrow(1, start // per_code, length // per_code)
        return QuantisedTaskVectors(codes, self.scales.narrow(1, start // GROUP, length // GROUP), self.shared)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> QuantisedTaskVectors:
        tensors = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self.tensors().items()}
        return QuantisedTaskVectors(**tensors, shared=self.shared)

    def tensors(self) -> dict[str, Tensor]:
        """The parts; ``QuantisedTaskVectors(**parts, shared=shared)`` puts them together again."""
        return {"codes": self.codes, "scales": self.scales}

    def write(self, task: int, start: int, numbers: Tensor) -> None:  # [n]
        """Quantises numbers into task's place from ``start``, a multiple of 128, on. Of a shared store: without the offset.

        Raises ValueError for NaN, Inf, and numbers that no scale reaches (beyond 3.3e38).
        """
        for first, codes, scales in _quantised(numbers, LARGEST_CODE[self.bits]):
            self._put(task, start + first, codes, scales)

    def write_shared(self, start: int, numbers: Tensor) -> Tensor:  # [n] -> [n]
        """Quantises the offset of all tasks from ``start`` on; returns it as it is stored. Raises as `write`."""
        for first, codes, scales in _quantised(numbers, LARGEST_SHARED):
            high = (codes + 8).div(16, rounding_mode="floor")
            self._put(-2, start + first, high, scales * 16)
            self._put(-1, start + first, codes - 16 * high, scales)
        some = slice(start // GROUP, start // GROUP - (-len(numbers) // GROUP))
        codes = self.codes[-2:, some.start * GROUP // 2 : some.stop * GROUP // 2]
        return dequantised(codes, self.scales[-2:, some], numbers.dtype).sum(0)[: len(numbers)]

    def of_rows(self, coefficients: Tensor) -> Tensor:  # [T, L] -> [R, L]
        """The coefficients of all rows: the shared ones have the sum of the tasks'."""
        if not self.shared:
            return coefficients
        return torch.cat([coefficients, coefficients.sum(0, keepdim=True).expand(2, -1)])

    def of_tasks(self, gradient: Tensor) -> Tensor:  # [R, L] -> [T, L]
        """The gradient of the tasks' coefficients from that of all rows'."""
        return gradient[:-2] + gradient[-2:].sum(0) if self.shared else gradient

    def _offset(self) -> Tensor:  # [N]
        return dequantised(self.codes[-2:], self.scales[-2:], torch.float32).sum(0)

    def _put(self, row: int, start: int, codes: Tensor, scales: Tensor) -> None:  # [G, 128], [G]
        if self.bits == 4:
            low, high = (codes + 8).to(torch.uint8).view(-1, 2, GROUP // 2).unbind(1)
            codes = low | high << 4
        stored = codes.to(self.codes.dtype).view(-1)
        first = start * self.bits // 8
        self.codes[row, first : first + len(stored)] = stored
        self.scales[row, start // GROUP : start // GROUP + len(scales)] = scales


def is_shared(form: str) -> bool:
    """Whether the tasks of a format share an offset."""
    return form.endswith("-residual")


def parts_of(num_tasks: int, form: str) -> dict[str, tuple[int, torch.dtype, int]]:
    """The tensors that hold T task vectors in one of `FORMATS`: name -> rows, dtype, and how many numbers an entry is for."""
    rows = num_tasks + 2 * is_shared(form)
    codes = (torch.int8, 1) if FORMATS[form] == 8 else (torch.uint8, 2)
    return {"codes": (rows, *codes), "scales": (rows, torch.bfloat16, GROUP)}


def _quantised(numbers: Tensor, largest: int) -> Iterator[tuple[int, Tensor, Tensor]]:  # [n]
    """Chunk by chunk: its first number, codes [G, 128] in the numbers' dtype, scales [G]; the last group is filled with 0."""
    numbers = numbers.detach().flatten()
    for first in range(0, len(numbers), _CHUNK):
        groups = numbers[first : first + _CHUNK].to(torch.promote_types(numbers.dtype, torch.float32))
        groups = torch.nn.functional.pad(groups, (0, -len(groups) % GROUP)).view(-1, GROUP)
        low, high = torch.aminmax(groups, dim=1)
        magnitude = torch.maximum(-low, high)  # [G]
        # A tensor: divided by a number, a GPU multiplies with its inverse, and rounds otherwise than a CPU.
        scales = _bf16_at_least(magnitude / magnitude.new_tensor(largest))
        # Larger numbers than the scale reaches would be cut off, as would those of an infinite scale.
        if not (magnitude.isfinite() & (scales.float() * largest).isfinite()).all():
            what = "NaN" if magnitude.isnan().any() else "Inf, or a number too large to be quantised"
            raise ValueError(f"task vector holds {what}")
        codes = (groups / scales.to(groups.dtype)[:, None]).round_().clamp_(-largest, largest)
        yield first, codes, scales


def _bf16_at_least(numbers: Tensor) -> Tensor:
    """The least bf16, subnormals aside, that is not below a number ≥ 0."""
    bits = numbers.float().clamp_min(torch.finfo(torch.bfloat16).tiny).view(torch.int32)
    return (bits + 0xFFFF >> 16 << 16).view(torch.float32).to(torch.bfloat16)
