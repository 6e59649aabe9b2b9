"""The matrices among a layout's tensors, for methods that look at more than one number at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from samerge_ext.checkpoints.sources import matches
from samerge_ext.packing.layout import Layout

Patterns = str | Sequence[str]


def matrix_views(
    layout: Layout, rows: Iterable[Tensor], *, transposed: Patterns = (), left_out: Patterns = ()
) -> Iterator[tuple[str, list[Tensor]]]:
    """Every matrix's name and, of each of the rows [N], a view of it [outputs, inputs]; a tensor [m, …] counts as [m, rest].

    transposed: shell-style patterns of those that are stored [inputs, outputs]. left_out: of those that are passed over.
    Raises ValueError, before the first one, for a pattern that fits nothing.
    """
    views = [layout.views(row) for row in rows]
    turned, out = fitting(layout, transposed), fitting(layout, left_out)
    return (
        (name, [oriented(of_row[name], name in turned) for of_row in views])
        for name, first in views[0].items()
        if first.dim() > 1 and name not in out
    )


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
