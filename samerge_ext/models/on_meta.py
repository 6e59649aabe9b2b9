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
