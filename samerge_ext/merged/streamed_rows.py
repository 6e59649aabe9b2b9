"""A large matrix of a streamed model, an output matrix say, merged some rows at a time."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from samerge_ext.ops.coefficient_grad import coefficient_grad
from samerge_ext.ops.weighted_sum import weighted_sum
from samerge_ext.packing.layout import BLOCK
from samerge_ext.packing.stores import InMemory, narrow

if TYPE_CHECKING:
    from samerge_ext.merged.streamed import StreamedWeights


class StreamedRows:
    """A matrix [V, H] of a streamed model of which no more than a slab of rows is merged at once; `ops.merged_linear_softmax_kl`.

    coefficients: [T] of it; what a backward finds to be their gradient is added to that of λ.
    """

    def __init__(self, weights: StreamedWeights, layer: int, at: Tensor):  # [T, L]
        layout = weights.packed.layout
        self._weights, self._layer, self._at = weights, layer, at.detach()
        self.shape, self._width = layout.shapes[layer], layout.shapes[layer][1:].numel()
        self._start, self._length = layout.extent(layer)
        self._aligned = BLOCK // math.gcd(BLOCK, self._width)  # so many rows are whole blocks
        all_rows, piece = -(-self.shape[0] // self._aligned) * self._aligned, weights.store.piece or self._length
        # Of what is fetched at a time.
        self._at_once = all_rows if piece >= self._length else piece // (self._aligned * self._width) * self._aligned
        self.coefficients = _Added.apply(at, weights, layer)

    @property
    def fits(self) -> bool:
        return self._at_once > 0

    def slabs(self, most: int) -> list[slice]:
        """All rows, about ``most`` at a time, none of two pieces."""
        classes, most = self.shape[0], max(self._aligned, most // self._aligned * self._aligned)
        pieces = [(first, min(first + self._at_once, classes)) for first in range(0, classes, self._at_once)]
        return [slice(r, min(r + most, last)) for first, last in pieces for r in range(first, last, most)]

    def rows(self, some: slice, out: Tensor, room: Tensor) -> Tensor:  # [v, H]
        base, task_vectors, start = self._fetch(some)
        merged = torch.empty_like(base)
        weighted_sum(base, task_vectors, self._at, self._weights.blocks(start, len(base)), out=merged)
        return out.copy_(merged[: out.numel()].view(out.shape))

    def contract(self, some: slice, gradient: Tensor, room: Tensor) -> Tensor:  # [v, H], -> [T]
        base, task_vectors, _ = self._fetch(some)
        flat = pad(gradient.reshape(-1), (0, len(base) - gradient.numel()))
        blocks = torch.zeros(len(flat) // BLOCK, dtype=torch.int32, device=flat.device)
        return coefficient_grad(flat, task_vectors, blocks, 1)[:, 0]

    def whole(self) -> Tensor:
        return self._weights.layer(self._layer, self._at)

    def contracted(self, gradient: Tensor) -> Tensor:  # by the whole matrix [V, H], -> [T]
        return torch.stack([self.contract(some, gradient[some], gradient) for some in self.slabs(len(gradient))]).sum(0)

    def _fetch(self, some: slice) -> tuple[Tensor, InMemory, int]:
        """base and task vectors of a slab, with what fills the layer's last block, and where they begin in the flat weights."""
        begin, last = some.start * self._width, some.stop == self.shape[0]
        end = self._length if last else some.stop * self._width
        piece = self._at_once * self._width
        first = begin // piece * piece
        base, task_vectors = self._weights.store.fetch(self._start + first, min(piece, self._length - first))
        place = (begin - first, end - begin)
        return narrow(base, *place), narrow(task_vectors, *place), self._start + begin


class _Added(torch.autograd.Function):
    """One layer's coefficients [T] of λ [T, L]: their gradient goes into that of λ, which is kept outside of autograd."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, weights: StreamedWeights, layer: int) -> Tensor:
        ctx.weights, ctx.layer = weights, layer
        return coefficients[:, layer].clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        ctx.weights.add_gradient(gradient, ctx.layer)
        return None, None, None
