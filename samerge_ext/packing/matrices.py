"""The matrices among a layout's tensors, for methods that look at more than one number at a time."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from samerge_ext.checkpoints.sources import matches
from samerge_ext.packing.factors import FactoredTaskVectors
from samerge_ext.packing.layout import Layout
from samerge_ext.packing.packed_weights import PackedWeights

Patterns = str | Sequence[str]
# A mixture's experts as one tensor [k, m, n], or their biases [k, n]; and equal layers as one, [k, …], as Megatron-LM has them.
OF_EXPERTS = re.compile(r"(^|[._])(experts|moe)([._]|$)")
OF_LAYERS = re.compile(r"(^|\.)layers\.(?!\d)")
MatrixChange = Tensor | tuple[Tensor, Tensor]  # what an expert adds to a matrix: [m, n], or its factors [m, r] and [r, n]


@dataclass(frozen=True)
class Place:
    """A matrix, or a vector, among a layout's tensors: all of one, or number ``part`` of a stack."""

    name: str
    part: int | None
    is_vector: bool
    turned: bool

    def of(self, views: Mapping[str, Tensor]) -> Tensor:
        """It, as `oriented`, in the tensors of one row."""
        tensor = views[self.name]
        return oriented(tensor if self.part is None else stacked(self.name, tensor)[self.part], self.turned)

    def __str__(self) -> str:
        return self.name if self.part is None else f"{self.name}[{self.part}]"


def stack_of(name: str, shape: torch.Size) -> tuple[int, torch.Size]:
    """How many tensors of one shape a tensor is, one after the other, and that shape: 1 but for stacks, of which each counts as
    a tensor of its own: [k, m, n] of a mixture's experts, [k, n] of their biases, and [k, …] of layers."""
    if 0 in shape:
        return 1, shape
    depth = int(bool(OF_LAYERS.search(name)) and len(shape) > 1 and "conv" not in name)
    depth += bool(OF_EXPERTS.search(name)) and len(shape) - depth == (2 if name.endswith("bias") else 3)
    return shape[:depth].numel(), torch.Size(shape[depth:])


def stacked(name: str, tensor: Tensor) -> Tensor:
    """[k, …], the k tensors of `stack_of`."""
    count, shape = stack_of(name, tensor.shape)
    return tensor.view(count, *shape)


def places(name: str, whole: torch.Size, turned: bool) -> list[Place]:
    """Of the matrices or vectors that a tensor of this shape is."""
    count, shape = stack_of(name, whole)
    parts: Iterable[int | None] = (None,) if shape == whole else range(count)
    return [Place(name, part, len(shape) < 2, turned) for part in parts]


def matrix_views(
    layout: Layout, rows: Iterable[Tensor], *, transposed: Patterns = (), left_out: Patterns = ()
) -> Iterator[tuple[str, list[Tensor]]]:
    """Every matrix's name and, of each of the rows [N], a view of it [outputs, inputs]; a tensor [m, …] counts as [m, rest], and
    a stack as its parts.

    transposed: shell-style patterns of those that are stored [inputs, outputs]. left_out: of those that are passed over.
    Raises ValueError, before the first one, for a pattern that fits nothing.
    """
    views = [layout.views(row) for row in rows]
    turned, out = fitting(layout, transposed), fitting(layout, left_out)
    return (
        (str(place), [place.of(of_row) for of_row in views])
        for name, first in views[0].items()
        for place in places(name, first.shape, name in turned)
        if not place.is_vector and name not in out
    )


def matrix_changes(
    packed: PackedWeights, method: str, *, transposed: Patterns = ()
) -> Iterator[tuple[Place, list[MatrixChange]]]:
    """Every matrix and vector, and what each of the T tasks adds to it, as [outputs, inputs], or [1, n] for a vector.

    LoRA factors are given as they are, of whole tensors. Raises ValueError for a pattern that fits nothing and where task vectors
    are quantised, TypeError where they lie in a file; while it goes on, ValueError for NaN and Inf.
    """
    turned, stored = fitting(packed.layout, transposed), packed.task_vectors
    if isinstance(stored, FactoredTaskVectors):
        return _of_factors(packed, stored, turned)
    views = [packed.layout.views(row) for row in packed.exact_task_vectors(method)]
    return (
        (place, _checked(name, [place.of(of_task) for of_task in views]))
        for name, first in views[0].items()
        for place in places(name, first.shape, name in turned)
    )


def whole(change: MatrixChange) -> Tensor:
    """A change [m, n], in fp64."""
    return change.double() if isinstance(change, Tensor) else change[0].double() @ change[1].double()


def turned_round(change: MatrixChange) -> MatrixChange:
    """The transposed change, [n, m]."""
    return change.mT if isinstance(change, Tensor) else (change[1].mT, change[0].mT)


def shape_of(change: MatrixChange) -> tuple[int, int]:
    """m and n of a change."""
    left, right = (change, change) if isinstance(change, Tensor) else change
    return left.shape[0], right.shape[1]


def check_finite(name: str, found: Sequence[Tensor], of: str = "a task vector") -> None:
    """Raises ValueError where one of a tensor's matrices holds NaN or Inf."""
    if not torch.stack([matrix.isfinite().all() for matrix in found]).all():
        raise ValueError(f"'{name}' of {of} holds NaN or Inf")


def fitting(layout: Layout, patterns: Patterns) -> set[str]:
    """The matrices that shell-style patterns fit. Raises ValueError for a pattern that fits none."""
    found: set[str] = set()
    packed = zip(layout.names, layout.shapes, layout.offsets, strict=True)
    names = [name for name, shape, offset in packed if offset is not None and len(shape) > 1]
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        fitting = {name for name in names if matches(name, (pattern,))}
        if not fitting:
            raise ValueError(f"pattern {pattern!r} fits no matrix; the last are {names[-3:]}")
        found |= fitting
    return found


def oriented(tensor: Tensor, turned: bool) -> Tensor:
    """[m, …] as [m, rest], or turned as [rest, m]; a vector [n] as [1, n]."""
    matrix = tensor.flatten(1) if tensor.dim() > 1 else tensor.reshape(1, -1)
    return matrix.mT if turned else matrix


def _of_factors(
    packed: PackedWeights, stored: FactoredTaskVectors, turned: Collection[str]
) -> Iterator[tuple[Place, list[MatrixChange]]]:
    bases = packed.layout.views(packed.base)
    for layer, of_tasks in stored.changes.items():
        name = packed.layout.names[layer]
        m, n = oriented(bases[name], False).shape
        found: list[MatrixChange] = []
        for change in of_tasks:
            if isinstance(change, Tensor):
                found.append(oriented(change.view(bases[name].shape), name in turned))
            else:
                factors = (packed.base.new_zeros(m, 0), packed.base.new_zeros(0, n)) if change is None else change
                found.append(turned_round(factors) if name in turned else factors)
        yield Place(name, None, bases[name].dim() < 2, name in turned), _checked(name, found)


def _checked(name: str, found: list[MatrixChange]) -> list[MatrixChange]:
    check_finite(name, [part for change in found for part in ((change,) if isinstance(change, Tensor) else change)])
    return found
