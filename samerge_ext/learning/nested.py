"""Tensors inside of batches: alone, or in dicts, tuples and lists."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """``value`` with every tensor in it, or in dicts, tuples and lists of them, replaced by function(tensor)."""
    kind = type(value)
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return kind({key: map_tensors(function, item) for key, item in value.items()})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return kind(*(map_tensors(function, item) for item in value))
    if isinstance(value, tuple | list):
        return kind(map_tensors(function, item) for item in value)
    return value


def split_rows(value: Any, parts: int) -> list[Any]:
    """``value`` as at most so many, each with as many rows of its tensors as any other or one more; whole, where it has none or
    they have not as many rows each."""
    rows: list[int] = []
    map_tensors(lambda tensor: rows.append(len(tensor) if tensor.dim() else 0), value)
    parts = min(parts, rows[0]) if len(set(rows)) == 1 else 1

    def part(place: int) -> Any:
        return map_tensors(lambda tensor: tensor.tensor_split(parts)[place], value)

    return [part(place) for place in range(parts)] if parts > 1 else [value]


def to_device(value: Any, device: torch.device) -> Any:
    """``value`` with its tensors on ``device``; those in pinned memory are copied without waiting for it."""
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), value)
