"""Where every parameter tensor lies in one flat buffer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from samerge_ext.ops._common import BLOCK


@dataclass(frozen=True)
class Layout:
    """Offsets of L layers (parameter tensors) in a flat buffer of N numbers.

    Every layer starts at a multiple of 1,024, so that block ``b`` belongs to layer ``block_layer[b]``. A layer
    with ``offsets[l] is None`` is the same in the base and all experts: it has a merging coefficient like any
    other, but takes no room in the buffer.

    names: layer names, in named_parameters() or checkpoint order.
    shapes, dtypes: of the tensors as they were found in the base.
    offsets: first number of each layer, or None.
    numel: N, a multiple of 1,024.
    block_layer: [N // 1024] int32, non-decreasing.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    offsets: tuple[int | None, ...]
    numel: int
    block_layer: Tensor = field(repr=False, compare=False)

    @classmethod
    def build(
        cls,
        names: Sequence[str],
        shapes: Sequence[torch.Size],
        dtypes: Sequence[torch.dtype],
        packed: Sequence[bool],
        device: torch.device | str = "cpu",
    ) -> Layout:
        """Lays out the layers whose ``packed`` flag is set, one after the other."""
        offsets: list[int | None] = []
        blocks: list[int] = []
        total = 0
        for shape, is_packed in zip(shapes, packed, strict=True):
            offsets.append(total * BLOCK if is_packed else None)
            blocks.append(-(-shape.numel() // BLOCK) if is_packed else 0)
            total += blocks[-1]
        layers = torch.arange(len(names), dtype=torch.int32)
        block_layer = layers.repeat_interleave(torch.tensor(blocks, dtype=torch.int64))
        return cls(tuple(names), tuple(shapes), tuple(dtypes), tuple(offsets), total * BLOCK, block_layer.to(device))

    @property
    def num_layers(self) -> int:
        """L, the number of merging coefficients per task."""
        return len(self.names)

    @property
    def num_parameters(self) -> int:
        """Numbers in the packed layers, padding not counted."""
        return sum(s.numel() for s, o in zip(self.shapes, self.offsets, strict=True) if o is not None)

    def extent(self, layer: int) -> tuple[int, int]:
        """First number and length, padding included, of a packed layer."""
        offset = self.offsets[layer]
        if offset is None:
            raise ValueError(f"layer '{self.names[layer]}' is the same in all models and not packed")
        return offset, -(-self.shapes[layer].numel() // BLOCK) * BLOCK

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The packed layers of ``flat`` [N] as views of their own shapes, by name."""
        return {
            name: flat[offset : offset + shape.numel()].view(shape)
            for name, shape, offset in zip(self.names, self.shapes, self.offsets, strict=True)
            if offset is not None
        }
