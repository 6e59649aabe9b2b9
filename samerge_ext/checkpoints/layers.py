"""Which layer of a model a tensor is in, by its name. Without torch, as all that a recipe is checked by."""

from __future__ import annotations

import re
from collections.abc import Iterable


def layer_in(name: str) -> tuple[str, int, str] | None:
    """What is before the first number in a tensor's name, which is its stack, that number, its layer, and what is after it:
    "model.layers.", 7, ".mlp.up_proj.weight". None for a name without a number of its own."""
    match = re.match(r"(.*?\.)?(\d+)(\..*|$)", name, re.DOTALL)
    return (match[1] or "", int(match[2]), match[3]) if match else None


def number_of_layers(names: Iterable[str]) -> int:
    """Of the deepest stack of a model with tensors of these names."""
    return max((found[1] for name in names if (found := layer_in(name))), default=-1) + 1
