"""Task vectors of LoRA experts as the factors that they are made of, in the place of a tensor [T, N]."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from samerge_ext.checkpoints.adapter_edits import product_numbers
from samerge_ext.checkpoints.lora import AdapterSource, Change
from samerge_ext.checkpoints.sources import Source
from samerge_ext.packing.in_pieces import InPieces
from samerge_ext.packing.layout import Layout

LORA = "lora"  # the form's name


class FactoredTaskVectors(InPieces[Tensor]):
    """T task vectors of N numbers, multiplied out piece by piece where they are read.

    changes: packed layer -> one `Change` per task, on the layout's device. dtype: of the products.
    """

    form = LORA
    where = "are kept as LoRA factors"

    def __init__(self, layout: Layout, changes: dict[int, tuple[Change, ...]], num_tasks: int, dtype: torch.dtype):
        self.layout, self.changes, self.num_tasks, self.dtype = layout, changes, num_tasks, dtype
        self.shape = torch.Size((num_tasks, layout.numel))
        self.device = self.reads_to = layout.block_layer.device
        self.nbytes = sum(part.nbytes for of_layer in changes.values() for change in of_layer for part in _parts(change))

    @classmethod
    def of(cls, experts: Sequence[tuple[str, AdapterSource]], layout: Layout, dtype: torch.dtype) -> FactoredTaskVectors:
        """The task vectors of LoRA adapters."""
        device = layout.block_layer.device
        changes = {}
        for layer, name in enumerate(layout.names):
            if layout.offsets[layer] is not None:
                changes[layer] = tuple(_moved(expert.change(name), device, dtype) for _, expert in experts)
        return cls(layout, changes, len(experts), dtype)

    @classmethod
    def from_tensors(cls, layout: Layout, tasks: Sequence[Mapping[str, Tensor]], dtype: torch.dtype) -> FactoredTaskVectors:
        """What `tensors` gave for each task, put together again."""
        device = layout.block_layer.device

        def change(tensors: Mapping[str, Tensor], name: str) -> Change:
            if f"{name}/whole" in tensors:
                return tensors[f"{name}/whole"]
            left, right = (tensors.get(f"{name}/{side}") for side in ("left", "right"))
            return None if left is None or right is None else (left, right)

        packed = (layer for layer, offset in enumerate(layout.offsets) if offset is not None)
        changes = {
            layer: tuple(_moved(change(tensors, layout.names[layer]), device, dtype) for tensors in tasks) for layer in packed
        }
        return cls(layout, changes, len(tasks), dtype)

    def tensors(self, task: int) -> dict[str, Tensor]:
        """The factors of one task, "LAYER/left" [m, r] and "LAYER/right" [r, n], and as "LAYER/whole" what is no product."""
        found: dict[str, Tensor] = {}
        for layer, of_layer in self.changes.items():
            name, change = self.layout.names[layer], of_layer[task]
            if isinstance(change, Tensor):
                found[f"{name}/whole"] = change
            elif change is not None:
                found[f"{name}/left"], found[f"{name}/right"] = change
        return found

    def empty(self, length: int, device: torch.device | str, pin_memory: bool = False) -> Tensor:
        return torch.empty(self.num_tasks, length, dtype=self.dtype, device=device, pin_memory=pin_memory)

    def read_into(self, start: int, length: int, out: Tensor) -> None:  # [T, ≥ length], on the device
        layers = list(self.changes)  # in the order of their offsets
        at = bisect_right(layers, start, key=lambda layer: self.layout.extent(layer)[0]) - 1
        end = start + length
        for layer in layers[max(at, 0) :]:
            first, size = self.layout.extent(layer)
            if first >= end:
                break
            begin, stop = max(start, first), min(end, first + size)
            for row, change in zip(out[:, begin - start : stop - start], self.changes[layer], strict=True):
                self._write(row, change, begin - first, self.layout.shapes[layer].numel())

    def of_task(self, task: int) -> FactoredTaskVectors:
        """One task vector of the T: the same factors."""
        changes: dict[int, tuple[Change, ...]] = {layer: (of_layer[task],) for layer, of_layer in self.changes.items()}
        return FactoredTaskVectors(self.layout, changes, 1, self.dtype)

    def to(self, device: torch.device | str) -> FactoredTaskVectors:
        changes = {i: tuple(_moved(c, device, self.dtype) for c in changes) for i, changes in self.changes.items()}
        layout = replace(self.layout, block_layer=self.layout.block_layer.to(device))
        return FactoredTaskVectors(layout, changes, self.num_tasks, self.dtype)

    @staticmethod
    def _write(row: Tensor, change: Change, start: int, numel: int) -> None:
        """Numbers ``start`` … of a layer of ``numel``; zeros after its last."""
        count = max(0, min(row.numel(), numel - start))
        row[count:] = 0
        if change is None:
            row.zero_()
        elif isinstance(change, Tensor):
            row[:count] = change.reshape(-1)[start : start + count]
        else:
            row[:count] = product_numbers(*change, start, count)


def require_adapters(experts: Sequence[tuple[str, Source]]) -> list[tuple[str, AdapterSource]]:
    """The experts; raises ValueError for one that has no factors."""
    adapters = []
    for task, expert in experts:
        if not isinstance(expert, AdapterSource):
            raise ValueError(f"{expert.label} is no LoRA adapter, and task_vector_dtype={LORA!r} keeps factors; leave it out")
        adapters.append((task, expert))
    return adapters


def _parts(change: Change) -> tuple[Tensor, ...]:
    return () if change is None else (change,) if isinstance(change, Tensor) else change


def _moved(change: Change, device: torch.device | str, dtype: torch.dtype) -> Change:
    if change is None:
        return None
    if isinstance(change, Tensor):
        return change.to(device, dtype).contiguous()
    left, right = (part.to(device, dtype).contiguous() for part in change)
    return left, right
