"""Experts whose task vectors are replaced, kept as they were packed: teachers are read from there."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from samerge_ext.checkpoints.sources import Source
from samerge_ext.packing.factors import FactoredTaskVectors
from samerge_ext.packing.packed_weights import PackedWeights


def experts_of(packed: PackedWeights) -> dict[str, Source | Path]:
    """What `PackedWeights.experts` is where other task vectors take the place of ``packed``'s, which stay held."""
    kept = {task: PackedExpert(packed, row, f"expert '{task}'") for row, task in enumerate(packed.tasks)}
    return {**kept, **packed.experts}


class PackedExpert(Source):
    """An expert as it was packed: base and task vector, added up tensor by tensor."""

    _stored: dict[str, Tensor]

    def __init__(self, packed: PackedWeights, row: int, label: str):
        self.label, self.names, self.aliases = label, packed.layout.names, packed.aliases
        self._stored = {**packed.unchanged, **packed.layout.views(packed.base)}
        stored = packed.task_vectors
        self._task_vector = stored.of_task(row) if isinstance(stored, FactoredTaskVectors) else packed.whole_task_vectors()[row]
        self._layout = packed.layout

    def _shape(self, name: str) -> torch.Size:
        return self._stored[name].shape

    def _dtype(self, name: str) -> torch.dtype:
        return self._stored[name].dtype

    def _read(self, name: str) -> Tensor:
        layer = self._layout.names.index(name)
        if self._layout.offsets[layer] is None:
            return self._stored[name]
        start, length = self._layout.extent(layer)
        if isinstance(self._task_vector, Tensor):
            change = self._task_vector[start : start + length]
        else:
            room = self._task_vector.empty(length, self._task_vector.device)
            self._task_vector.read_into(start, length, room)
            change = room[0]
        return self._stored[name] + change[: self._layout.shapes[layer].numel()].view(self._layout.shapes[layer])
