"""Modules without memory for their weights, for models that take them from packed weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from samerge_ext.memory import large_tensors_mapped


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made inside have their parameters on `meta`, one by one as they are registered, and real buffers.

    `torch.device("meta")` would leave buffers without values, also those that no checkpoint has (rotary frequencies, say).
    """
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        with large_tensors_mapped():  # a parameter that is dropped leaves no gap in malloc's heap
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def fill(module: Any, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None) -> list[str]:
    """Puts tensors, by name, into a module of transformers or open_clip; the names of parameters that stay on `meta`.

    What the module has no place for is left out, as the head of another architecture. dtype: of all of them that are floats.
    """
    for name, tensor in tensors:
        path, _, leaf = name.rpartition(".")
        try:
            owner = module.get_submodule(path)
        except AttributeError:
            continue
        tensor = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        elif leaf in owner._buffers:
            owner._buffers[leaf] = tensor
    if hasattr(module, "tie_weights"):  # of transformers
        module.tie_weights()
    return [name for name, parameter in module.named_parameters() if parameter.is_meta]
