"""The resident way to hold a merged model: all merged weights and their gradient exist, a buffer each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from samerge_ext.checkpoints.sources import Source
from samerge_ext.packing.components import Components
from samerge_ext.packing.packed_weights import PackedWeights

# layer -> where it stands in the module: (owner, its own name for the tensor); several where the tensor is tied.
Places = dict[str, list[tuple[nn.Module, str]]]


class ResidentWeights:
    """merged [N] and gradient [N]; the module's parameters are views of the one, their ``.grad`` of the other."""

    def __init__(self, packed: PackedWeights, places: Places, dtype: torch.dtype | None):
        self.packed = packed
        self.merged = torch.empty(packed.layout.numel, dtype=dtype or packed.base.dtype, device=packed.base.device)
        self.gradient = torch.zeros_like(self.merged)
        self.device, self.dtype = self.merged.device, self.merged.dtype
        self._gradient_views = packed.layout.views(self.gradient)
        self._parameters = self._bind(places)
        self.store = packed.store()
        self.components = Components.none(packed)

    def use_components(self, components: Components) -> None:
        self.components = components

    def merge(self, coefficients: Tensor) -> None:
        """coefficients: [T, L], or with the components' deviations behind them, [T, L + C]."""
        layout = self.packed.layout
        self.packed.merge(coefficients[:, : layout.num_layers], out=self.merged)
        if deviations := self.components.split(coefficients):
            views = layout.views(self.merged)
            for name, of_layer in deviations.items():
                self.components.add(name, of_layer, views[name])
        # Autocast keeps casts of the weights it has seen; they would outlive this merge.
        torch.clear_autocast_cache()

    def layer(self, layer: int, coefficients: Tensor) -> Tensor:
        """One layer merged at ``coefficients`` [T, L], in memory of its own."""
        return self.packed.merge_layer(layer, coefficients, self.store, self.dtype)

    def read(self, source: Source) -> None:
        """In place of merged weights, those of one model."""
        for name, view in self.packed.layout.views(self.merged).items():
            view.copy_(source.read_shaped(name, view.shape))
        torch.clear_autocast_cache()

    def zero_gradients(self) -> None:
        """Zeroes the gradient buffer and binds every parameter's ``.grad`` to its place in it."""
        self.gradient.zero_()
        for name, parameter in self._parameters.items():
            parameter.grad = self._gradient_views[name]

    def coefficient_gradient(self) -> Tensor:
        """∂loss/∂λ [T, L], with components [T, L + C]."""
        for name, parameter in self._parameters.items():
            if parameter.grad is not self._gradient_views[name]:
                raise RuntimeError(
                    f"'{name}'.grad was replaced between zero_gradients() and contract(): do not call zero_grad() on "
                    "the module or on an optimiser of its parameters there"
                )
        found = self.packed.contract(self.gradient)
        of_components = (self.components.gradient(name, self._gradient_views[name]) for name in self.components.factors)
        return torch.cat([found, *of_components], 1)

    def unbind_gradients(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None

    def _bind(self, places: Places) -> dict[str, nn.Parameter]:
        """Registers a view of `merged` as every layer's parameter (not through .data: autograd must see a re-merge)."""
        bound = {}
        for name, view in self.packed.layout.views(self.merged).items():
            bound[name] = parameter = nn.Parameter(view)
            for owner, leaf in places[name]:
                set_parameter(owner, leaf, parameter)
        return bound


def set_parameter(owner: nn.Module, leaf: str, value: Tensor | None) -> None:
    """Puts a tensor in a parameter's place; recurrent layers keep a list of their weights beside it."""
    parameters: dict[str, Any] = owner._parameters  # torch's annotation allows parameters alone
    dict.__setitem__(parameters, leaf, value)
    if isinstance(owner, nn.RNNBase):
        owner._flat_weights[owner._flat_weights_names.index(leaf)] = value
