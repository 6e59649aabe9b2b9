"""mergekit's slices: a model whose layers are merged from layers of other models."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from samerge_ext.checkpoints.layers import layer_in
from samerge_ext.checkpoints.stacked import Stack, is_input
from samerge_ext.recipes.entries import ModelEntry, SliceEntry
from samerge_ext.recipes.parameters import METHODS, check_count


class Slices:
    """What is merged, slice after slice.

    stacks: of the base, where the method has one, and of what it merges beside it: the first sources of all slices, the second …

    Raises ValueError for slices that do not merge as many models each, or sources of a slice that do not have as many layers.
    """

    def __init__(self, method: str, slices: Sequence[SliceEntry], base: Path | None):
        self._slices = slices
        has_base = base is not None and METHODS[method].base != "one"
        sources = [_sources(entry, base if has_base else None) for entry in slices]
        for number, of_slice in enumerate(sources):
            check_count(method, [str(source.place) for source in of_slice[has_base:]])
            if len(of_slice) != len(sources[0]):
                raise ValueError(f"slices: slice {number + 1} merges {len(of_slice)} models, the first {len(sources[0])}")
        self._merged = [of_slice[has_base and METHODS[method].base != "first" :] for of_slice in sources]
        self._begins = [0]
        for of_slice in sources:
            lengths = {last - first for first, last in map(range_of, of_slice)}
            if len(lengths) > 1:
                raise ValueError(f"slices: the sources of a slice have {sorted(lengths)} layers; they have to have as many")
            self._begins.append(self._begins[-1] + lengths.pop())
        stacks = [
            Stack([(source.path, layer) for source in of_place for layer in range(*range_of(source))])
            for of_place in zip(*sources, strict=True)
        ]
        self.base = stacks[0] if has_base else None
        self.merged = stacks[has_base and METHODS[method].base != "first" :]

    def lookup(self, name: str, model: int | None = None) -> tuple[list[Mapping[str, Any]], str, float]:
        """Where a tensor's parameters stand beside the file's, as `tensor_settings.resolve` takes them: those for all, or of one
        of the models that are merged."""
        number, depth, part = 0 if is_input(name) else len(self._slices) - 1, 0.0, layer_in(name)
        if part is not None:
            number = next(i for i, end in enumerate(self._begins[1:]) if part[1] < end)
            length = self._begins[number + 1] - self._begins[number]
            depth = (part[1] - self._begins[number]) / (length - 1) if length > 1 else 1.0
        shared = self._slices[number].parameters
        if model is None:
            return [shared], name, depth
        source = self._merged[number][model]
        if part is not None:
            name = f"{part[0]}{range_of(source)[0] + part[1] - self._begins[number]}{part[2]}"
        return [source.parameters, shared], name, depth


def range_of(source: ModelEntry) -> tuple[int, int]:
    assert source.layer_range is not None
    return source.layer_range


def _sources(entry: SliceEntry, base: Path | None) -> list[ModelEntry]:
    """The sources of a slice, where there is a base it first: with its own layers, or those of the first source."""
    if base is None:
        return entry.sources
    real = os.path.realpath(base)
    of_base = [source for source in entry.sources if not source.adapter and os.path.realpath(source.model) == real]
    others = [source for source in entry.sources if source not in of_base]
    return [ModelEntry(model=base, layer_range=(of_base or entry.sources)[0].layer_range), *others]
