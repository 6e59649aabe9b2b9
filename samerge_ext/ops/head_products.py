"""Products with a head [V, H], slab by slab of its rows, with sums in fp32, or fp64 for fp64.

On a CPU the package's own loops read a head once, where it lies and whatever its dtype: a library packs it anew for every few
rows, which takes longer than their products. Without the loops, or where a head's rows are not dense, a slab is widened and
multiplied in fp32. On a GPU a product of two bf16 matrices is taken as it is, by tensor cores that sum in fp32 and store fp32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import backend
from ._common import accumulator

SLAB = {"cpu": 2**20, "cuda": 2**26}  # numbers


class Head:
    """The head of a model: logits = hidden · weightᵀ + bias."""

    def __init__(self, weight: Tensor, bias: Tensor | None, hidden: Tensor):  # [V, H], [V], [R, H]
        self.weight, self.bias, self.wide = weight, bias, accumulator(hidden)
        on_tensor_cores = weight.device.type == "cuda" and weight.dtype == hidden.dtype == torch.bfloat16
        self.operand = torch.bfloat16 if on_tensor_cores else self.wide  # the dtype of what is multiplied
        numbers = SLAB.get(weight.device.type, SLAB["cuda"])
        self._slab = max(1, min(len(weight), numbers // max(weight.shape[1], 1)))  # rows
        dense = weight.shape[1] <= 1 or weight.stride(1) == 1
        self._rows_times_transposed = backend.fused("rows_times_transposed", weight) if dense else None
        self._add_rows_times = backend.fused("add_rows_times", weight) if dense else None

        self._widened: Tensor

    @property
    def row_bytes(self) -> int:
        """What a row of hidden states takes beside its logits: itself, its gradient, and a narrow slab of that by the logits."""
        narrow = 0 if self.operand == self.wide else self._slab * self.operand.itemsize
        turned = self._rows_times_transposed is not None  # the loops' own copy
        return (2 + turned) * self.weight.shape[1] * self.wide.itemsize + narrow

    @property
    def slab_bytes(self) -> int:
        """What a slab of the head takes: widened, or a product of its shape that is stored wide."""
        alone = self.weight.dtype == self.operand == self.wide or self._add_rows_times is not None
        return 0 if alone else self._slab * self.weight.shape[1] * self.wide.itemsize

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:  # [n, H] of the operands' dtype, [n, V] wide
        if self._rows_times_transposed is not None:
            self._rows_times_transposed(out, hidden.contiguous(), self.weight)
        else:
            for rows, slab in self._slabs():
                product(hidden, slab.t(), out[:, rows])
        if self.bias is not None:
            out += self.bias
        return out

    def hidden_grad(self, grad: Tensor) -> Tensor:  # of the logits [n, V] -> [n, H] wide
        total = grad.new_zeros(len(grad), self.weight.shape[1])
        if self._add_rows_times is not None:
            self._add_rows_times(total, grad, self.weight)
            return total
        for rows, slab in self._slabs():
            add_product(grad[:, rows].to(self.operand), slab, total)
        return total

    def add_weight_grad(self, grad: Tensor, hidden: Tensor, total: Tensor) -> None:  # [n, V], [n, H], [V, H] wide
        for rows in self._rows():
            add_product(grad[:, rows].to(self.operand).t(), hidden, total[rows])

    def widen_into(self, room: Tensor) -> None:
        """From now on into this memory, slab_bytes of the wide dtype."""
        self._widened = room

    def _rows(self) -> Iterator[slice]:
        rows = len(self.weight)
        return (slice(first, min(first + self._slab, rows)) for first in range(0, rows, self._slab))

    def _slabs(self) -> Iterator[tuple[slice, Tensor]]:
        for rows in self._rows():
            slab = self.weight[rows]
            if slab.dtype != self.operand:
                slab = self._widened[: slab.numel()].view(slab.shape).copy_(slab)
            yield rows, slab


def product(a: Tensor, b: Tensor, out: Tensor) -> None:  # [m, k], [k, n], [m, n]
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def add_product(a: Tensor, b: Tensor, out: Tensor) -> None:  # [m, k], [k, n], [m, n]
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        out += torch.mm(a, b, out_dtype=out.dtype)
