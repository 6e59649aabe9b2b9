"""Base and task vectors spread over ranks: which numbers are whose."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from samerge_ext.packing.in_pieces import InPieces
from samerge_ext.packing.layout import BLOCK, Layout
from samerge_ext.packing.ranks import Ranks
from samerge_ext.packing.stores import InMemory, Numbers, empty_like, in_memory, map_parts, narrow, parts


class Shards:
    """How the blocks of a layout are dealt to W ranks: each has a contiguous part of every layer.

    What cannot be dealt evenly goes to the ranks in turn, from layer to layer: of layers that lie side by side no rank has more
    than one block more than another. A rank's own numbers [M] lie one layer after the other.

    numel: M, a multiple of 1,024. block_layer: [M // 1024] int32, the layer of every own block.
    """

    def __init__(self, layout: Layout, ranks: Ranks):
        self.layout, self.ranks = layout, ranks
        layers, packed = range(layout.num_layers), [offset is not None for offset in layout.offsets]
        blocks = torch.tensor([layout.extent(layer)[1] // BLOCK if packed[layer] else 0 for layer in layers], dtype=torch.int64)
        left_over = blocks % ranks.size
        turn = left_over.cumsum(0) - left_over  # whose it is to take the first of them
        takes = (torch.arange(ranks.size) - turn[:, None]) % ranks.size < left_over[:, None]
        counts = blocks[:, None] // ranks.size + takes  # [L, W] blocks
        own = counts[:, ranks.rank]
        self.numel = int(own.sum()) * BLOCK
        self.block_layer = torch.arange(len(own), dtype=torch.int32).repeat_interleave(own).to(layout.block_layer.device)
        self._orders: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}
        # As numbers, which are there in a dry run, too.
        self._counts: list[list[int]] = counts.tolist()
        self._first: list[int] = (counts.cumsum(1) - counts)[:, ranks.rank].tolist()  # [L], of a layer's blocks this rank's first
        self._places: list[int] = ((own.cumsum(0) - own) * BLOCK).tolist()  # of a layer's own numbers

    def extent(self, layer: int) -> tuple[int, int]:
        """First number and length of a layer among this rank's own."""
        return self._places[layer], self._counts[layer][self.ranks.rank] * BLOCK

    def ranges(self, start: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Own numbers ``start`` …, where they lie in the flat weights: (first, place behind ``start``, how many)."""
        end = start + length
        for layer in range(max(0, bisect_right(self._places, start) - 1), len(self._places)):
            place, count = self.extent(layer)
            if place >= end:
                break
            begin, stop = max(start, place), min(end, place + count)
            if begin < stop:
                first = self.layout.extent(layer)[0] + self._first[layer] * BLOCK
                yield first + begin - place, begin - start, stop - begin

    def most(self, layers: Sequence[int]) -> int:
        """Numbers of these layers on the rank that has most of them."""
        counts = zip(*(self._counts[layer] for layer in layers), strict=True)
        return max(map(sum, counts), default=0) * BLOCK

    def order(self, layers: Sequence[int], device: torch.device) -> Tensor:
        """Where the blocks of these layers, one layer after the other, are among those of the ranks' parts, each filled up to
        the length of the longest, [blocks] int64."""
        key = tuple(layers), device
        if key not in self._orders:
            counts = torch.tensor([self._counts[layer] for layer in layers])  # [k, W]
            place = counts.cumsum(0) - counts + torch.arange(self.ranks.size) * (self.most(layers) // BLOCK)
            counts, place = counts.flatten(), place.flatten()
            blocks = sum(sum(self._counts[layer]) for layer in layers)
            behind = (place - (counts.cumsum(0) - counts)).repeat_interleave(counts, output_size=blocks)
            self._orders[key] = (torch.arange(blocks) + behind).to(device)
        return self._orders[key]

    def own(self, numbers: Numbers) -> Numbers:
        """This rank's own of base [N] or task vectors [T, N]: a copy, or where they come in pieces what reads no others."""
        if isinstance(numbers, InPieces):
            return OwnPieces(numbers, self)
        found = [narrow(numbers, first, count) for first, _, count in self.ranges(0, self.numel)]
        if not found:
            return empty_like(numbers, 0, numbers.device)
        joined = {name: torch.cat([parts(each)[name] for each in found], -1) for name in parts(numbers)}
        names = iter(joined.values())
        return map_parts(lambda part: next(names), numbers)


class OwnPieces(InPieces[Any]):
    """This rank's own of numbers that come in pieces. source: all of them; nbytes: of the source."""

    def __init__(self, source: InPieces, shards: Shards):
        self.source, self.shards = source, shards
        self.shape = torch.Size((*source.shape[:-1], shards.numel))
        self.nbytes, self.device, self.reads_to, self.where = source.nbytes, source.device, source.reads_to, source.where
        self.form = source.form

    def empty(self, length: int, device: torch.device | str, pin_memory: bool = False) -> InMemory:
        return self.source.empty(length, device, pin_memory)

    def read_into(self, start: int, length: int, out: InMemory) -> None:
        for first, place, count in self.shards.ranges(start, length):
            self.source.read_into(first, count, narrow(out, place, count))

    def to(self, device: torch.device | str) -> OwnPieces:
        return OwnPieces(self.source.to(device), self.shards)


class Spread(InPieces[Any]):
    """Base [N] or task vectors [T, N] that are spread over ranks. own: this rank's, [M] or [T, M]; nbytes: of these. device: that
    computes with them and sends, by default where they are.

    Nothing reads the others' numbers; what merges and contracts them is `spread_merge.SpreadMerge`.
    """

    def __init__(self, own: Numbers, shards: Shards, dtype: torch.dtype | None, form: str, device: torch.device | None = None):
        self.own, self.shards, self.dtype, self.form = own, shards, dtype, form
        self.shape = torch.Size((*own.shape[:-1], shards.layout.numel))
        self.nbytes, self.device = own.nbytes, device or own.device
        self.reads_to = own.reads_to if isinstance(own, InPieces) else own.device
        self.where = f"are spread over {shards.ranks.size} ranks"

    @classmethod
    def of(cls, numbers: Numbers, shards: Shards) -> Spread:
        return cls.like(numbers, shards.own(numbers), shards)

    @classmethod
    def like(cls, numbers: Numbers, own: Numbers, shards: Shards) -> Spread:
        """With what is a rank's ``own`` of numbers of this form."""
        form = str(numbers.dtype) if isinstance(numbers, Tensor) else numbers.form
        return cls(own, shards, getattr(numbers, "dtype", None), form)

    def empty(self, length: int, device: torch.device | str, pin_memory: bool = False) -> InMemory:
        return empty_like(self.own, length, device, pin_memory)

    def read_into(self, start: int, length: int, out: InMemory) -> NoReturn:
        raise self.not_whole()

    def to(self, device: torch.device | str) -> Spread:
        return Spread(self.own.to(device), self.shards, self.dtype, self.form)

    def in_memory(self, device: torch.device | str) -> Spread:
        """The same with this rank's own numbers as tensors."""
        return Spread(in_memory(self.own, device), self.shards, self.dtype, self.form)

    def on_host(self) -> Spread:
        """The same with this rank's own numbers in the host's memory, from where they are fetched to the device."""
        return Spread(in_memory(self.own, "cpu"), self.shards, self.dtype, self.form, self.device)

    def not_whole(self) -> TypeError:
        return TypeError(f"these weights {self.where}; what needs them whole is given those that shard() was called on")


def own(numbers: Any) -> Any:
    """This rank's own of base or task vectors: all of them, unless they are spread over ranks."""
    return numbers.own if isinstance(numbers, Spread) else numbers
