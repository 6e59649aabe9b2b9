"""Numbers by row and layer as a map of coloured cells: where its cells, lines and labels lie, for a page that draws it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

ROW, LEGIBLE, CHARACTER = 22, 14, 7  # pixels: the height of a row, of a label on its side, the width of a letter
WIDTH = 960  # that a map has where its layers are few enough; cells are never thinner than 4


@dataclass(frozen=True)
class HeatMap:
    """columns: (x, what is said of the layer, for every row (y, whether it is negative, |value| as a share of the largest)).
    labels: (x, text) of groups of layers. lines: x of the borders between them. means: (group, mean of every row).
    limit: the largest |value|."""

    title: str
    rows: list[str]
    columns: list[tuple[int, str, list[tuple[int, bool, float]]]]
    labels: list[tuple[int, str]]
    lines: list[int]
    means: list[tuple[str, list[float]]]
    limit: float
    cell: int
    width: int
    height: int
    label_height: int
    upright: bool  # whether labels stand on their side


def heat_map(title: str, values: Mapping[str, Mapping[str, float]], form: str = ".3g") -> HeatMap:
    """Of row -> layer -> number, rows of the same layers. Colours are centred on 0."""
    rows, layers = list(values), list(next(iter(values.values())))
    limit = max((abs(values[row][layer]) for row in rows for layer in layers), default=0.0)
    cell = max(4, min(24, WIDTH // max(1, len(layers))))
    columns = []
    for i, layer in enumerate(layers):
        numbers = [values[row][layer] for row in rows]
        said = "\n".join([layer, *(f"{row}: {number:{form}}" for row, number in zip(rows, numbers, strict=True))])
        shares = [(ROW * r, number < 0, round(abs(number) / (limit or 1), 3)) for r, number in enumerate(numbers)]
        columns.append((cell * i, said, shares))
    starts, groups = layer_groups(layers)
    ends = [*starts[1:], len(layers)]
    upright = any(CHARACTER * len(name) > cell * (end - start) for name, start, end in zip(groups, starts, ends, strict=True))
    labels, free = [], 0
    for name, start, end in zip(groups, starts, ends, strict=True):
        middle = cell * (start + end) // 2
        if middle >= free:  # of groups that lie closer than letters are high, the first
            labels.append((middle, name))
            free = middle + LEGIBLE if upright else 0
    means = [
        (name, [fmean(values[row][layer] for layer in layers[start:end]) for row in rows])
        for name, start, end in zip(groups, starts, ends, strict=True)
    ]
    label_height = CHARACTER * max(map(len, groups), default=0) + 8 if upright else 20
    lines = [cell * start for start in starts[1:]]
    size = (cell, cell * len(layers), ROW * len(rows), label_height)
    return HeatMap(title, rows, columns, labels, lines, means, limit, *size, upright)


def layer_groups(layer_names: Sequence[str]) -> tuple[list[int], list[str]]:
    """Where runs of layers of one group start, and the groups' names.

    A name's group ends at its first number (``encoder.layer.1.output.dense.weight`` → ``layer 1``), or is its first
    part where it has none (``embeddings.LayerNorm.bias`` → ``embeddings``).
    """
    starts: list[int] = []
    groups: list[str] = []
    for i, name in enumerate(layer_names):
        numbered = re.search(r"([^.]+)\.(\d+)(\.|$)", name)
        group = f"{numbered[1]} {numbered[2]}" if numbered else name.split(".")[0]
        if not groups or group != groups[-1]:
            starts.append(i)
            groups.append(group)
    return starts, groups
