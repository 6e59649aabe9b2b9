"""A model whose layers are those of other models, in another order or number."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samerge_ext.checkpoints.advice import some
from samerge_ext.checkpoints.layers import layer_in, number_of_layers
from samerge_ext.checkpoints.sources import Source

# What says in a config.json how many layers there are, and what each is.
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
OF_LAYERS = ("layer_types", "layers_block_type", "attention_layers", "mlp_layer_types", "no_rope_layers")
INPUTS = re.compile(r"emb(?!ed_out)|\bwte\b|\bwpe\b")  # in the names of embeddings


@dataclass(frozen=True)
class Stack:
    """layers: of every layer of the new model, from the first one on, the model and the layer there that it is."""

    layers: Sequence[tuple[Path, int]]

    def of(self, models: Mapping[Path, Source], label: str) -> Stacked:
        """The new model; what belongs to no layer is that of the first layer's model, or, what comes after all, of the last's.

        Raises ValueError for a model whose layers are not in one stack of the same name as the others', and for a layer that is
        not there.
        """
        places: dict[str, tuple[Source, str]] = {}
        first = models[self.layers[0][0]]
        for place, (path, layer) in enumerate(self.layers):
            source = models[path]
            stack = stack_of(source)
            if stack != stack_of(first):
                raise ValueError(
                    f"layers are called '{stack}' in {source.label} and '{stack_of(first)}' in {first.label}; save both models "
                    "with the same class, so that their tensors have the same names"
                )
            found = [(part[2], name) for name in source.names if (part := layer_in(name)) and part[1] == layer]
            if not found:
                raise ValueError(f"{source.label} has no layer {layer}; the last one is {number_of_layers(source.names) - 1}")
            places.update({f"{stack}{place}{rest}": (source, name) for rest, name in found})
        for path, is_first in ((self.layers[0][0], True), (self.layers[-1][0], False)):
            source = models[path]
            outside = [name for name in source.names if layer_in(name) is None]
            places.update({name: (source, name) for name in outside if is_input(name) == is_first})
        return Stacked(places, f"{label} ({', '.join(dict.fromkeys(str(path) for path, _ in self.layers))})")

    def configuration(self, content: dict) -> dict:
        """A config.json with the new number of layers, and what it says of each."""
        nested = content.get("text_config")
        if isinstance(nested, dict) and not any(key in content for key in COUNTS):
            return {**content, "text_config": self.configuration(nested)}
        changed: dict[str, Any] = {key: len(self.layers) for key in COUNTS if key in content}
        for key in OF_LAYERS:
            each = content.get(key)
            if isinstance(each, list) and all(layer < len(each) for _, layer in self.layers):
                changed[key] = [each[layer] for _, layer in self.layers]
        return {**content, **changed}


class Stacked(Source):
    """places: name -> the model that a tensor is of, and its name there."""

    def __init__(self, places: Mapping[str, tuple[Source, str]], label: str):
        self.label, self._stored, self.names = label, places, tuple(places)
        self._places = places
        sources = {id(source): source for source, _ in places.values()}
        self.files = tuple(dict.fromkeys(file for source in sources.values() for file in source.files))
        first = next(source for name, (source, _) in places.items() if layer_in(name) is None)
        self.aliases = {
            alias: name for alias, name in first.aliases.items() if alias not in places and places.get(name) == (first, name)
        }

    def is_buffer(self, name: str) -> bool:
        source, there = self._places[self.aliases.get(name, name)]
        return source.is_buffer(there)

    def weight_dtype(self, name: str) -> torch.dtype:
        source, there = self._places[self.aliases.get(name, name)]
        return source.weight_dtype(there)

    def _shape(self, name: str) -> torch.Size:
        source, there = self._places[name]
        return source.shape(there)

    def _dtype(self, name: str) -> torch.dtype:
        source, there = self._places[name]
        return source.dtype(there)

    def _read(self, name: str) -> Tensor:
        source, there = self._places[name]
        return source.read(there)

    def _read_into(self, name: str, start: int, out: Tensor) -> None:
        source, there = self._places[name]
        source.read_into(there, start, out)


def is_input(name: str) -> bool:
    """Of a tensor that belongs to no layer, whether it comes before all; others come after."""
    return INPUTS.search(name) is not None


def stack_of(source: Source) -> str:
    """What the names of a model's layers begin with. Raises ValueError unless there is one stack of them."""
    found = sorted({part[0] for name in source.names if (part := layer_in(name))})
    if len(found) != 1:
        what = f"stacks of layers, {some(found)}" if found else "no layers"
        raise ValueError(f"{source.label} has {what}; slices are of models with one stack")
    return found[0]
