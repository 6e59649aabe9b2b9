"""The units of a streamed model: parts of a module whose weights exist only while they run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from samerge_ext.packing.layout import Layout

# Lists whose elements run one after another; a ModuleList and a ModuleDict have no forward of their own.
LISTS = (nn.ModuleList, nn.Sequential)
WITHOUT_FORWARD = (nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Unit:
    """Layers that are merged together.

    name: of the module whose forward uses them, or of the layer where no unit's forward does.
    layers: their places in the layout, ascending; only those that are packed.
    places: where each layer's numbers begin in the unit's buffer, [numel].
    pieces: (start, length, place): what is fetched at a time, start and length in the flat weights [N].
    """

    name: str
    layers: tuple[int, ...]
    places: dict[int, int]
    pieces: tuple[tuple[int, int, int], ...]
    numel: int

    @classmethod
    def of(cls, name: str, layers: Iterable[int], layout: Layout, piece: int | None = None) -> Unit:
        """piece: the most numbers that are fetched at a time, a multiple of 1,024; otherwise as many as lie side by side."""
        layers = tuple(sorted(layers))
        places, numel = {}, 0
        runs: list[list[int]] = []
        for layer in layers:
            start, length = layout.extent(layer)
            places[layer] = numel
            if runs and sum(runs[-1][:2]) == start:
                runs[-1][1] += length
            else:
                runs.append([start, length, numel])
            numel += length
        pieces = []
        for start, length, place in runs:
            for first in range(0, length, piece or max(length, 1)):
                pieces.append((start + first, min(piece or length, length - first), place + first))
        return cls(name, layers, places, tuple(pieces), numel)


def find_units(module: nn.Module, patterns: Sequence[str] = ()) -> dict[str, nn.Module]:
    """Modules, by name, that become units: together they cover nearly all parameters, and none lies within another.

    A module that fits one of the shell-style ``patterns`` is one. Of the rest, the elements of lists (ModuleList,
    Sequential) are, and outside of lists the smallest modules that own parameters, with what lies below them. Parameters of a
    module that has lists of its own, below which units are found, belong to no unit: they are merged where they are read.

    Raises ValueError for a pattern that fits no module.
    """
    names = [name for name, _ in module.named_modules()]
    for pattern in patterns:
        if not any(_fits(name, (pattern,)) for name in names):
            raise ValueError(f"units pattern '{pattern}' fits no module; the module's are {', '.join(names[1:9])} …")
    units: dict[str, nn.Module] = {}
    _visit("", module, tuple(patterns), units, set())
    return units


def _visit(
    name: str, module: nn.Module, patterns: tuple[str, ...], units: dict[str, nn.Module], seen: set[int], in_list: bool = False
) -> None:
    if id(module) in seen or not any(True for _ in module.parameters()):
        return
    if not isinstance(module, WITHOUT_FORWARD) and _is_unit(name, module, patterns, in_list):
        units[name] = module
        seen.update(id(below) for below in module.modules())
        return
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        _visit(path, child, patterns, units, seen, isinstance(module, LISTS))


def _is_unit(name: str, module: nn.Module, patterns: tuple[str, ...], in_list: bool) -> bool:
    """Named by a pattern; else, unless a module below is named: an element of a list, or an owner of parameters without lists."""
    below = [path for path, _ in module.named_modules(prefix=name)]  # itself first
    if _fits(below[0], patterns):
        return True
    if any(_fits(path, patterns) for path in below[1:]):
        return False
    owns = any(parameter is not None for parameter in module._parameters.values())
    return in_list or (owns and not any(isinstance(part, LISTS) for part in module.modules()))


def _fits(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
