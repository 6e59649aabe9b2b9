"""Merged layers that no graph holds: autograd keeps how one was merged, and it is merged again where it is wanted once more."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class MadeAgain:
    """Keeps merged layers out of the graphs of the forward passes that ran with them, with ``context`` around such a pass.

    A loss that is still at hand when the weights are merged anew would otherwise hold all those of before, a whole model.
    A backward takes a layer as it is while somebody else holds it, and makes it again otherwise, for as long as it is needed.
    """

    def __init__(self) -> None:
        self._layers: dict[int, _Layer] = {}  # address of its memory -> what was merged there
        self.context = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def add(self, merged: Tensor, make: Callable[[], Tensor]) -> None:
        """merged: what ``make`` makes, the same numbers whenever it is called; held weakly, and alone in its memory."""
        self._layers[merged.untyped_storage().data_ptr()] = _Layer(merged, make)

    def clear(self) -> None:
        """Forgets the layers, which are merged anew; the graphs of earlier passes keep how theirs are made."""
        self._layers.clear()

    def __reduce__(self) -> Any:
        return MadeAgain, ()  # a copy's layers are others

    def _pack(self, saved: Tensor) -> Any:
        layer = self._layers.get(saved.untyped_storage().data_ptr())
        if layer is None or layer.merged() is None:
            return saved.detach(), saved._version  # of the result of an operation autograd asks for another tensor than itself
        return layer, saved.shape, saved.stride(), saved.storage_offset()


class _Layer:
    def __init__(self, merged: Tensor, make: Callable[[], Tensor]):
        self._merged, self.make, self._version = weakref.ref(merged), make, merged._version

    def merged(self) -> Tensor | None:
        """The layer, while somebody holds it and nobody has changed it in place."""
        merged = self._merged()
        return None if merged is None or merged._version != self._version else merged.detach()


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed[0], Tensor):
        saved, version = packed
        if saved._version != version:
            raise RuntimeError(f"a tensor {list(saved.shape)} of the forward pass was changed in place before its backward")
        return saved
    layer, shape, stride, offset = packed
    merged = layer.merged()
    return (layer.make() if merged is None else merged).as_strided(shape, stride, offset)
