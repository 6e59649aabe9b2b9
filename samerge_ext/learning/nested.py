"""Tensors inside of batches: alone, or in dicts, tuples and lists."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
    """``value`` as at most so many, each with as many rows of its tensors as any other or one more; whole, where these have not
    equally many rows, and where there is anything else in it: texts, say, of which nobody knows whose they are."""
    rows = {len(leaf) if isinstance(leaf, Tensor) and leaf.dim() else 0 for leaf in _leaves(value) if leaf is not None}
    parts = min(parts, *rows) if len(rows) == 1 else 1

    def part(place: int) -> Any:
        return map_tensors(lambda tensor: tensor.tensor_split(parts)[place], value)

    return [part(place) for place in range(parts)] if parts > 1 else [value]


def _leaves(value: Any) -> Iterator[Any]:
    """What is in dicts, tuples and lists."""
    if not isinstance(value, Mapping | tuple | list):
        yield value
        return
    for item in value.values() if isinstance(value, Mapping) else value:
        yield from _leaves(item)


def to_device(value: Any, device: torch.device) -> Any:
    """``value`` with its tensors on ``device``; those in pinned memory are copied without waiting for it."""
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), value)
