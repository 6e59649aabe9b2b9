"""The streamed way to hold a merged model: a unit's weights exist only while it runs.

A unit's forward is replaced by checkpoint(forward with its layers merged): what autograd would save is dropped, weights
included, and in the backward torch.utils.checkpoint runs the unit again, with the same random state, on weights that are
merged again. A layer's gradient is contracted into that of λ and of its components, and freed, as soon as it appears.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from samerge_ext.checkpoints.sources import Source
from samerge_ext.merged.resident import Places, set_parameter
from samerge_ext.merged.streamed_rows import StreamedRows
from samerge_ext.merged.units import Unit, find_units
from samerge_ext.ops.coefficient_grad import coefficient_grad
from samerge_ext.ops.weighted_sum import weighted_sum
from samerge_ext.packing.components import Components
from samerge_ext.packing.layout import BLOCK
from samerge_ext.packing.packed_weights import PackedWeights
from samerge_ext.packing.stores import Store, narrow

FIRST = 2**64 - 1  # autograd's own accumulation of leaf gradients has this priority


class StreamedWeights:
    """The layers of ``module``, merged unit by unit while it runs.

    store: hands out base and task vectors, some numbers at a time.
    units: patterns of modules to be units; others are found (`units.find_units`).

    A layer that is read where no unit has it merged (a tied embedding in functional.linear, a parameter of a module that has
    blocks of its own) is merged at that moment, and lives until its backward. A unit must give the same result when it runs
    again: a model that keeps state between calls (a cache of keys and values) is called without it.
    """

    def __init__(
        self,
        module: nn.Module,
        packed: PackedWeights,
        places: Places,
        dtype: torch.dtype | None,
        store: Store,
        units: Sequence[str] = (),
    ):
        self.packed, self.store = packed, store
        self.device, self.dtype = store.device, dtype or packed.base.dtype
        self._block_layer = packed.layout.block_layer.to(self.device)
        self._merges = 0
        self._source: Source | None = None
        self._at = packed.coefficients(0.0).to(self.device).requires_grad_()  # [T, L]
        self.use_components(Components.none(packed))
        index = {name: layer for layer, name in enumerate(packed.layout.names)}
        packed_places = [
            (owner, leaf, index[name]) for name in places if packed.layout.offsets[index[name]] is not None
            for owner, leaf in places[name]
        ]  # fmt: skip
        self._alone = {
            layer: Unit.of(packed.layout.names[layer], [layer], packed.layout, store.piece) for _, _, layer in packed_places
        }
        self._hold_places(packed_places)
        self.units = []
        for name, part in find_units(module, units).items():
            below = {id(m) for m in part.modules()}
            own = [place for place in packed_places if id(place[0]) in below]
            if own:
                unit = Unit.of(name, {layer for _, _, layer in own}, packed.layout, store.piece)
                self.units.append(unit)
                part.forward = _Forward(self, part, unit, own, part.forward)

    def use_components(self, components: Components) -> None:
        """From the next `merge` on; gradients are forgotten."""
        self.components = components
        self._deviations: dict[str, Tensor] = {}
        shape = (self.packed.num_tasks, self.packed.layout.num_layers + components.columns)
        self._gradient = torch.zeros(shape, dtype=self.packed.coefficient_dtype, device=self.device)  # [T, L + C]
        self._gradients_of_components = components.split(self._gradient)

    def merge(self, coefficients: Tensor) -> None:
        """From now on units merge at ``coefficients``, [T, L], or with the components' deviations behind them, [T, L + C]."""
        self._source = None
        coefficients = coefficients.detach().to(self.device, copy=True)
        self._deviations = self.components.split(coefficients)
        self._at = coefficients[:, : self.packed.layout.num_layers].requires_grad_()
        self._merges += 1
        self.store.begin_pass()

    def rows_of(self, layer: int, coefficients: Tensor | None = None) -> StreamedRows | None:
        """A matrix whose rows are merged when they are asked for, at ``coefficients`` [T, L] or those of the last `merge`. None
        where that cannot be: it has coefficients of components too, weights are those of one model now, or pieces of the store
        are too small for a block's rows."""
        has_components = self.packed.layout.names[layer] in self._gradients_of_components
        if coefficients is None and (self._source is not None or has_components):
            return None
        at = self._at if coefficients is None else coefficients.to(self.device)
        found = StreamedRows(self, layer, at)
        return found if found.fits else None

    def layer(self, layer: int, coefficients: Tensor) -> Tensor:
        """One layer merged at ``coefficients`` [T, L], outside of autograd."""
        unit, shape = self._alone[layer], self.packed.layout.shapes[layer]
        merged = torch.empty(unit.numel, dtype=self.dtype, device=self.device)
        self._fill(merged, unit, coefficients.to(self.device))
        return merged[: shape.numel()].view(shape)

    def read(self, source: Source) -> None:
        """Until the next `merge`, units take their weights from one model."""
        self._source = source
        self._merges += 1

    def zero_gradients(self) -> None:
        self._gradient.zero_()

    def coefficient_gradient(self) -> Tensor:
        """∂loss/∂λ [T, L], with components [T, L + C], contracted while the backward passes ran."""
        return self._gradient.clone()

    def unbind_gradients(self) -> None:
        """Nothing: no weight gradient outlives its backward."""

    def _hold_places(self, places: list[tuple[nn.Module, str, int]]) -> None:
        """Takes the parameters out of the module: what stands for one has its shape, NaN values and no memory."""
        nan = torch.full((), torch.nan, dtype=self.dtype, device=self.device)
        for owner, leaf, layer in places:
            if not isinstance(owner._parameters, _Parameters):
                owner._parameters = _Parameters(owner._parameters, owner.register_state_dict_pre_hook(_refuse))
            absent = nn.Parameter(nan.expand(self.packed.layout.shapes[layer]), requires_grad=False)
            set_parameter(owner, leaf, absent)
            owner._parameters.absent[leaf] = _Absent(absent, self, layer)

    def run(self, streamed: _Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A unit's own forward, with its weights in their places."""
        merges, unit = self._merges, streamed.unit

        def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if merges != self._merges:
                raise RuntimeError(f"the weights of '{unit.name}' were merged again between its forward and its backward")
            with _in_place(streamed.places, self._merged(unit)):
                return streamed.own(*args, **kwargs)

        if not torch.is_grad_enabled():
            return run(args, kwargs)
        kept = lambda: (nullcontext(), _buffers_kept(streamed.part))
        return checkpoint(run, args, kwargs, use_reentrant=False, context_fn=kept)

    def merged_alone(self, layer: int) -> Tensor:
        return self._merged(self._alone[layer])[layer]

    def _merged(self, unit: Unit) -> dict[int, Tensor]:
        """The unit's layers at the λ of the last `merge`, as leaves of autograd whose gradient is contracted."""
        merged = torch.empty(unit.numel, dtype=self.dtype, device=self.device)
        views = {}
        for layer in unit.layers:
            shape, place = self.packed.layout.shapes[layer], unit.places[layer]
            views[layer] = merged[place : place + shape.numel()].view(shape)
        with torch.no_grad():
            if self._source is not None:
                for layer, view in views.items():
                    view.copy_(self._source.read_shaped(self.packed.layout.names[layer], view.shape))
                return views
            self._fill(merged, unit, self._at)
            for layer, view in views.items():
                name = self.packed.layout.names[layer]
                if name in self._deviations:
                    self.components.add(name, self._deviations[name], view)
        layers = {}
        for layer, view in views.items():
            layers[layer] = _Contracted.apply(self._at, view, self, unit, layer)
            if layers[layer].grad_fn is not None:
                # Otherwise autograd would keep the gradients of all of the unit's layers until the last one is there.
                layers[layer].grad_fn._set_sequence_nr(FIRST)
        return layers

    def _fill(self, merged: Tensor, unit: Unit, coefficients: Tensor) -> None:
        for start, length, place in unit.pieces:
            base, task_vectors = self.store.fetch(start, length)
            weighted_sum(base, task_vectors, coefficients, self.blocks(start, length), out=merged[place : place + length])

    @torch.no_grad()
    def contract(self, gradient: Tensor, unit: Unit, layer: int) -> None:
        """Adds ⟨gradient, τ_t⟩ to ∂loss/∂λ of one layer, and what its components give; gradient has the layer's shape."""
        name = self.packed.layout.names[layer]
        if name in self._gradients_of_components:
            self._gradients_of_components[name] += self.components.gradient(name, gradient)
        first, length = self.packed.layout.extent(layer)
        flat = gradient.reshape(-1)
        flat = pad(flat, (0, length - flat.numel())) if flat.numel() < length else flat  # [length]
        blocks = torch.zeros(length // BLOCK, dtype=torch.int32, device=self.device)
        for start, count, _ in unit.pieces:
            begin, end = max(start, first), min(start + count, first + length)
            if begin < end:
                _, task_vectors = self.store.fetch(start, count)
                task_vectors = narrow(task_vectors, begin - start, end - begin)
                part = flat[begin - first : end - first]
                self._gradient[:, layer] += coefficient_grad(part, task_vectors, blocks[: part.numel() // BLOCK], 1)[:, 0]

    def add_gradient(self, gradient: Tensor, layer: int) -> None:
        """gradient: [T], of the coefficients of one layer."""
        self._gradient[:, layer] += gradient

    def blocks(self, start: int, length: int) -> Tensor:
        return self._block_layer[start // BLOCK : (start + length) // BLOCK]


class _Contracted(torch.autograd.Function):
    """A merged layer: its gradient goes into that of the coefficients, which is kept outside of autograd."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, merged: Tensor, weights: StreamedWeights, unit: Unit, layer: int) -> Tensor:
        ctx.weights, ctx.unit, ctx.layer = weights, unit, layer
        return merged.view_as(merged)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        ctx.weights.contract(gradient, ctx.unit, ctx.layer)
        return None, None, None, None, None


@dataclass
class _Forward:
    """What is called in the place of a unit's own forward."""

    weights: StreamedWeights
    part: nn.Module
    unit: Unit
    places: list[tuple[nn.Module, str, int]]
    own: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.weights.run(self, args, kwargs)


class _Parameters(dict[str, Any]):
    """A module's own parameters. One that is absent, since no running unit holds it, is merged when it is read."""

    def __init__(self, parameters: dict[str, nn.Parameter | None], refusal: RemovableHandle):
        super().__init__(parameters)
        self.refusal = refusal
        self.absent: dict[str, _Absent] = {}

    def __getitem__(self, leaf: str) -> Tensor | None:
        value = super().__getitem__(leaf)
        if leaf in self.absent and value is self.absent[leaf].stand_in:
            return self.absent[leaf].merged()
        return value


def _refuse(owner: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Before a module's state dict: what would be saved has no numbers."""
    name = prefix.removesuffix(".") or type(owner).__name__
    raise RuntimeError(
        f"the weights of '{name}' are merged when they are needed, and no state dict has them; the Result of "
        "the merge has: save_pretrained(path) writes them one by one, state_dict() makes them all"
    )


class _Absent(NamedTuple):
    """A parameter that is absent, and what stands for it."""

    stand_in: nn.Parameter
    weights: StreamedWeights
    layer: int

    def merged(self) -> Tensor:
        return self.weights.merged_alone(self.layer)


@contextmanager
def _in_place(places: list[tuple[nn.Module, str, int]], merged: dict[int, Tensor]) -> Iterator[None]:
    """Merged layers in their places, until the block ends."""
    before = [dict.__getitem__(owner._parameters, leaf) for owner, leaf, _ in places]
    for owner, leaf, layer in places:
        set_parameter(owner, leaf, merged[layer])
    try:
        yield
    finally:
        for (owner, leaf, _), value in zip(places, before, strict=True):
            set_parameter(owner, leaf, value)


@contextmanager
def _buffers_kept(part: nn.Module) -> Iterator[None]:
    """Running a unit again does not update its running statistics again."""
    buffers = [(owner, leaf, b) for owner in part.modules() for leaf, b in owner._buffers.items() if b is not None]
    for owner, leaf, buffer in buffers if part.training else ():
        owner._buffers[leaf] = buffer.clone()
    try:
        yield
    finally:
        for owner, leaf, buffer in buffers:
            owner._buffers[leaf] = buffer


def weights_of(module: nn.Module) -> set[StreamedWeights]:
    """Those that merge the module's units as it runs, where it is streamed."""
    held = (part._parameters.absent.values() for part in module.modules() if isinstance(part._parameters, _Parameters))
    return {absent.weights for of_part in held for absent in of_part}


def let_go(module: nn.Module) -> None:
    """Makes a streamed module an ordinary one, of parameters that have no numbers."""
    for part in module.modules():
        if isinstance(streamed := part.__dict__.get("forward"), _Forward):
            del part.forward
            if part.forward != streamed.own:  # which was not the class's
                part.forward = streamed.own
        if isinstance(part._parameters, _Parameters):
            part._parameters.refusal.remove()
            part._parameters = dict(part._parameters.items())


def rows_of(owner: nn.Module, leaf: str) -> StreamedRows | None:
    """The rows of a matrix of a streamed model where they can be merged when they are asked for; None else."""
    parameters = owner._parameters
    absent = parameters.absent.get(leaf) if isinstance(parameters, _Parameters) else None
    if absent is None or dict.__getitem__(parameters, leaf) is not absent.stand_in:
        return None
    return absent.weights.rows_of(absent.layer)
