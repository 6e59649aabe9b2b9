"""Modules without memory for their weights, for models that take them from packed weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from samerge_ext.memory import large_tensors_mapped


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made inside have their parameters on `meta`, one by one as they are registered, and real buffers.

    `torch.device("meta")` would leave buffers without values, also those that no checkpoint has (rotary frequencies, say).
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta
    try:
        with large_tensors_mapped():  # a parameter that is dropped leaves no gap in malloc's heap
            yield
    finally:
        nn.Module.register_parameter = register
