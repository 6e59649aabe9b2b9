"""What the linear layers of a merged model are given while it runs: the Grams of their inputs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from samerge_ext.merged.model import MergedModel


def layers_by_module(model: MergedModel) -> dict[nn.Module, dict[str, str]]:
    """Of every module its own parameters that are packed, by the module's name for them -> the layer."""
    if model.merged is None:
        raise RuntimeError("a streamed model's parameters are no layers; hold it resident")
    places = {view.data_ptr(): name for name, view in model.packed.layout.views(model.merged).items()}
    found = {}
    for part in model.module.modules():
        own = {leaf: parameter.data_ptr() for leaf, parameter in part._parameters.items() if parameter is not None}
        found[part] = {leaf: places[place] for leaf, place in own.items() if place in places}
    return found


def linear_layers(layers: Mapping[nn.Module, Mapping[str, str]], turned: Collection[str] = ()) -> dict[nn.Module, str]:
    """Modules that multiply what they are given with a packed weight -> the weight's layer: nn.Linear, and whatever has a weight
    among ``turned``. A weight that another kind of module has too is none of them."""
    found, others = {}, set()
    for part, own in layers.items():
        for leaf, layer in own.items():
            if leaf == "weight" and (isinstance(part, nn.Linear) or layer in turned):
                found[part] = layer
            else:
                others.add(layer)
    return {part: layer for part, layer in found.items() if layer not in others}


@contextmanager
def input_grams(linear: Mapping[nn.Module, str]) -> Iterator[dict[str, Tensor]]:
    """Layer -> XᵀX / rows [n, n] in fp64, of all rows X [rows, n] that its modules are given; complete when the context is left.

    Products are made in the inputs' type, fp32 at least. What no row reaches is not there.
    """
    grams: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def look(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else next(iter(kwargs.values()))
        layer, inputs = linear[part], given.detach().reshape(-1, given.shape[-1])
        with torch.autocast(inputs.device.type, enabled=False):
            inputs = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
            gram = inputs.mT @ inputs
        grams[layer] = grams[layer].add_(gram) if layer in grams else gram.double()
        rows[layer] = rows.get(layer, 0) + len(inputs)

    handles = [part.register_forward_pre_hook(look, with_kwargs=True) for part in linear]
    try:
        yield grams
    finally:
        for handle in handles:
            handle.remove()
    for layer, gram in grams.items():
        gram /= max(1, rows[layer])
