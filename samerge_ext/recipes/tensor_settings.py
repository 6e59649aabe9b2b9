"""mergekit's parameters: one value, a gradient over the model's depth, or values by a part of the tensor's name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from samerge_ext.checkpoints.layers import layer_in
from samerge_ext.checkpoints.reading import shown


def resolve(key: str, sources: Iterable[Mapping[str, Any]], name: str, depth: float, convert: Callable[[Any], Any]) -> Any:
    """The value of ``key`` for the tensor ``name``: of the first source that has one for it, else None.

    depth: 0 … 1, the tensor's layer among its model's (see `depths`). convert: checks one scalar.
    """
    for source in sources:
        if key in source:
            value = _evaluate(source[key], name, depth, convert)
            if value is not None:
                return value
    return None


def check(setting: Any, convert: Callable[[Any], Any]) -> None:
    """Raises ValueError for a setting that is none for any tensor. convert: as of `resolve`."""
    if (by_name := _by_name(setting)) is not None:
        for _, value in by_name:
            check(value, convert)
    else:
        for value in setting if isinstance(setting, list) else [setting]:
            convert(value)


def _by_name(setting: Any) -> list[tuple[str, Any]] | None:
    """The filters and values of a setting by name; None where it is another one."""
    entries = [setting] if isinstance(setting, Mapping) else setting
    if not isinstance(entries, list) or not any(isinstance(entry, Mapping) for entry in entries):
        return None
    found = []
    for entry in entries:
        if not isinstance(entry, Mapping) or "value" not in entry or set(entry) - {"value", "filter"}:
            raise ValueError(f"{shown(entry)} is not a setting by name; it needs 'value' and may have 'filter'")
        part = entry.get("filter")
        if part is not None and not isinstance(part, str):
            raise ValueError(f"{shown(part)} is not a filter; a part of a tensor's name is expected, a number in quotes")
        found.append(("" if part in (None, "*") else part, entry["value"]))
    return found


def _evaluate(setting: Any, name: str, depth: float, convert: Callable[[Any], Any]) -> Any:
    if (by_name := _by_name(setting)) is not None:
        fitting = [value for part, value in by_name if part in name]
        return _evaluate(fitting[0], name, depth, convert) if fitting else None
    if not isinstance(setting, list):
        return convert(setting)
    values = [convert(entry) for entry in setting]
    if not values:
        return None
    place = depth * (len(values) - 1)
    if any(isinstance(value, bool) for value in values):
        return values[int(place)]
    below = int(place)
    above = min(below + 1, len(values) - 1)
    return values[below] + (place - below) * (values[above] - values[below])


def depths(names: Iterable[str]) -> dict[str, float]:
    """Every tensor's place in the stack of layers that it is in, first 0 to last 1; 0 outside of stacks.

    A stack is what the first number in a name counts: "model.layers.7.mlp.up_proj.weight" is of layer 7.
    """
    found = {name: layer_in(name) for name in names}
    last: dict[str, int] = {}
    for part in found.values():
        if part:
            last[part[0]] = max(last.get(part[0], 0), part[1])
    return {name: 0.0 if part is None else part[1] / last[part[0]] if last[part[0]] else 1.0 for name, part in found.items()}
