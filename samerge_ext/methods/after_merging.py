"""A merged model once more: its experts as teachers, and itself as it was merged."""

from __future__ import annotations

import torch
from torch import Tensor

from samerge_ext.merged.model import MergedModel
from samerge_ext.merged.result import Result


class MergedAgain:
    """A result's module, taken over.

    model: whose teachers are the experts. dtype: of its weights, by default the packed base's.
    Raises ValueError for a result that has no module or no weights.
    """

    def __init__(self, result: Result, dtype: torch.dtype | None = None):
        if result.module is None or result.merged is None:
            raise ValueError(f"the merged model is to run; give {result.method} a module=, and do not stream its weights")
        self._merged = result.merged
        merged = result.packed.buffers  # the others are the heads' own, or never change
        self._buffers = {name: buffer.clone() for name, buffer in result.module.named_buffers() if name in merged}
        self.model = MergedModel(result.module, result.packed, 0.0, dtype=dtype)

    def restore(self) -> Tensor:
        """The model as it was merged, with statistics that were estimated anew; returns the weights [N]."""
        for name, buffer in self._buffers.items():
            self.model.module.get_buffer(name).copy_(buffer)
        return self.model.take_on(self._merged)
