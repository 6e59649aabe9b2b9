"""Merging what is spread over ranks: each merges and contracts its own numbers, and two collectives do the rest.

    weights of some layers = all_gather(weighted_sum(own base, own task vectors, λ))
    ∂loss/∂λ = Σ over ranks of coefficient_grad(reduce_scatter(∂loss/∂weights), own task vectors)

Ranks may merge at different λ, as teachers do: then each merges its own numbers for every rank, and all_to_all takes the place of
all_gather. The bytes that come to a rank are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from samerge_ext.ops._common import accumulator
from samerge_ext.ops.coefficient_grad import coefficient_grad
from samerge_ext.ops.weighted_sum import weighted_sum
from samerge_ext.packing.layout import BLOCK
from samerge_ext.packing.shards import Shards
from samerge_ext.packing.stores import Store

AT_ONCE = 1 << 24  # numbers of a whole model that are gathered at a time


class SpreadMerge:
    """Layers merged by all ranks together. store: hands out this rank's own base and task vectors.

    Every method is called by all ranks, with the same layers in the same order.
    """

    def __init__(self, shards: Shards, store: Store):
        self.shards, self.store = shards, store
        self._block_layer = shards.block_layer.to(store.device)

    def of_ranks(self, coefficients: Tensor) -> Tensor:
        """The coefficients of all ranks, [W, T, L], from this one's [T, L]; where they are the same, once, [1, T, L]."""
        found = self.shards.ranks.gather(coefficients.to(self.store.device))()
        return found[:1] if self.shards.ranks.gave_the_same(found) else found

    def start(self, layers: Sequence[int], coefficients: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
        """Begins to merge layers at ``coefficients``, as `of_ranks` gives them; what this returns waits for the others' parts,
        and gives the layers one after the other, each to the end of its last block, [n]."""
        ranks, longest = self.shards.ranks, self.shards.most(layers)
        parts = torch.empty(len(coefficients), longest, dtype=dtype, device=self.store.device)
        for start, length, place in self._pieces(layers):
            base, task_vectors = self.store.fetch(start, length)
            blocks = self._blocks(start, length)
            for part, of_rank in zip(parts, coefficients, strict=True):
                weighted_sum(base, task_vectors, of_rank, blocks, out=part[place : place + length])
        gathered = ranks.gather(parts[0]) if len(coefficients) == 1 else ranks.exchange(parts)
        order = self.shards.order(layers, self.store.device)
        return lambda: gathered().view(-1, BLOCK).index_select(0, order).view(-1)

    def contract(self, layers: Sequence[int], gradients: Sequence[Tensor | None], dtype: torch.dtype, into: Tensor) -> None:
        """Adds this rank's part of ∂loss/∂λ to ``into`` [T, L], from the gradients that all ranks have found by these layers'
        weights, each of a layer's shape, or filled up to the end of its last block; None is zero. dtype: of the weights."""
        ranks, order = self.shards.ranks, self.shards.order(layers, self.store.device)
        parts = torch.zeros(ranks.size * self.shards.most(layers) // BLOCK, BLOCK, dtype=dtype, device=self.store.device)
        counts = [self.shards.layout.extent(layer)[1] // BLOCK for layer in layers]
        for gradient, places in zip(gradients, order.split(counts), strict=True):
            if gradient is not None:
                whole, rest = gradient.numel() // BLOCK, gradient.numel() % BLOCK
                numbers = gradient.reshape(-1)
                parts.index_copy_(0, places[:whole], numbers[: whole * BLOCK].view(whole, BLOCK))
                if rest:
                    parts.index_copy_(0, places[whole:], pad(numbers[whole * BLOCK :], (0, BLOCK - rest))[None])
        own = ranks.scatter_sum(parts.view(ranks.size, -1))
        for start, length, place in self._pieces(layers):
            _, task_vectors = self.store.fetch(start, length)
            into += coefficient_grad(own[place : place + length], task_vectors, self._blocks(start, length), into.shape[1])

    def merge(self, coefficients: Tensor, out: Tensor) -> Tensor:
        """All layers merged at this rank's coefficients [T, L] into ``out`` [N]."""
        at = self.of_ranks(coefficients)
        for layers, place in self._groups():
            out[place] = self.start(layers, at, out.dtype)()
        return out

    def gradient(self, gradient: Tensor, num_tasks: int) -> Tensor:  # [N] -> [T, L]
        """∂loss/∂λ, from the gradients that all ranks have found by all weights."""
        found = torch.zeros(num_tasks, self.shards.layout.num_layers, dtype=accumulator(gradient), device=gradient.device)
        for layers, _ in self._groups():
            gradients = [gradient[start : start + length] for start, length in map(self.shards.layout.extent, layers)]
            self.contract(layers, gradients, gradient.dtype, found)
        return self.shards.ranks.sum(found)

    def _pieces(self, layers: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """Own numbers of layers as the store hands them out: (first, how many, their place in this rank's part)."""
        place = 0
        for start, length in self._runs(layers):
            at_once = self.store.piece or max(length, 1)
            for first in range(0, length, at_once):
                count = min(at_once, length - first)
                yield start + first, count, place + first
            place += length

    def _runs(self, layers: Sequence[int]) -> list[tuple[int, int]]:
        """Own numbers of layers that lie side by side."""
        runs: list[tuple[int, int]] = []
        for layer in layers:
            start, length = self.shards.extent(layer)
            if runs and sum(runs[-1]) == start:
                runs[-1] = (runs[-1][0], runs[-1][1] + length)
            elif length:
                runs.append((start, length))
        return runs

    def _groups(self) -> Iterator[tuple[list[int], slice]]:
        """All packed layers, as many side by side as are gathered at a time, and where they are in the flat weights."""
        layout = self.shards.layout
        group: list[int] = []
        begin = 0
        for layer in (layer for layer, offset in enumerate(layout.offsets) if offset is not None):
            start, length = layout.extent(layer)
            if group and start + length - begin > AT_ONCE:
                yield group, slice(begin, start)
                group, begin = [], start
            group.append(layer)
        if group:
            yield group, slice(begin, layout.numel)

    def _blocks(self, start: int, length: int) -> Tensor:
        return self._block_layer[start // BLOCK : (start + length) // BLOCK]
