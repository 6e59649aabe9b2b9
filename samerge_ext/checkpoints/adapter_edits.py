"""What a LoRA adapter does to a tensor of its base."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from samerge_ext.checkpoints.files import SafetensorsFile


@dataclass(frozen=True)
class Pair:
    """Two factors by their names in the file: B A, or (B A)ᵀ, times the scaling, is the change of a weight.

    magnitude: of DoRA (arXiv 2402.09353), m [m]: every output's row of the sum gets the length m.
    """

    first: str
    second: str
    transposed: bool
    scaling: float
    magnitude: str | None = None

    def read(self, file: SafetensorsFile) -> tuple[Tensor, Tensor]:
        """The factors [m, r] and [r, n] of the change, in fp32 or wider, the scaling in B; a kernel's n is flattened."""
        a, b = (_widened(file.read(name)) for name in (self.first, self.second))
        a, b = a.flatten(1), b.flatten(1) * self.scaling
        return (a.T, b.T) if self.transposed else (b, a)


@dataclass(frozen=True)
class Edit:
    """What becomes of one tensor: ``own``, or the base's where there is none, plus the pair's product, or plus ``bias`` times
    its scaling; then ``rows`` in the place of those of the tokens. Names are the file's."""

    own: str | None = None
    pair: Pair | None = None
    bias: str | None = None
    scaling: float = 1.0
    rows: str | None = None
    tokens: list[int] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        return self.pair is None and self.rows is None and self.bias is None

    @property
    def is_product(self) -> bool:
        """Whether the change is the product of two factors."""
        return self.pair is not None and self.pair.magnitude is None


def product_numbers(left: Tensor, right: Tensor, start: int, count: int) -> Tensor:
    """Numbers ``start`` … of left [m, r] @ right [r, n], flattened, [count]; only the rows that they lie in are computed."""
    width = right.shape[1]
    first, last = start // width, -(-(start + count) // width)
    return (left[first:last] @ right).view(-1)[start - first * width :][:count]


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
