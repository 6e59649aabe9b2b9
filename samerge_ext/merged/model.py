"""The merged model: the user's module at θ₀ + Σ_t λ_t τ_t, its weights held whole or merged unit by unit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from samerge_ext.checkpoints.naming import correspondence
from samerge_ext.checkpoints.sources import matches
from samerge_ext.merged.heads import TrainedHeads, find_trained
from samerge_ext.merged.resident import Places, ResidentWeights, set_parameter
from samerge_ext.merged.spread import SpreadWeights
from samerge_ext.merged.streamed import StreamedWeights, let_go
from samerge_ext.merged.streamed_rows import StreamedRows
from samerge_ext.packing.components import Components
from samerge_ext.packing.packed_weights import Buffers, PackedWeights
from samerge_ext.packing.stores import Store


class MergedModel(nn.Module):
    """A module whose weights are θ₀ + Σ_t λ_t τ_t and can be merged again at any λ.

    One `merge()` writes all weights; forward and backward passes run on the module as usual and add up in one
    gradient buffer; one `contract()` turns it into the gradient of λ:

        model.merge()
        model.zero_gradients()
        loss(model(inputs)).backward()
        model.contract()                    # adds to model.coefficients.grad, [T, L]

    The module is taken over: its parameters become views of `merged`, its buffers the average of the experts'.
    That of an earlier merge is taken over from it, and has these weights from then on.
    It stays the user's own object (`.module`), with its hooks, and runs under autocast and torch.compile.

    Streamed, a unit's weights exist only while it runs: they are merged just before, freed after, and merged again in its
    backward, where activations are computed again; a layer's gradient is contracted and freed as it appears. All else is
    the same, but that there is no `merged`, no torch.compile, and no module.state_dict(), which is an error: save a Result.

    module: of the experts' architecture; its weights are replaced, so they may be random, or on `meta` if streamed.
    packed: the base and the task vectors.
    coefficients: a number, [T] or [T, L]; kept as the parameter `.coefficients` [T, L].
    dtype: of the merged weights and their gradient; the packed base's by default.
    train: leave the module's training mode as it is; otherwise it is put into eval mode.
    streamed: merge unit by unit. store: where base and task vectors are streamed from, the packed tensors by default.
    units: shell-style patterns of modules to be units, in place of those that are found (`units.find_units`).
    """

    planned_bytes: int | None = None  # the peak that a plan foresaw, where one was made

    def __init__(
        self,
        module: nn.Module,
        packed: PackedWeights,
        coefficients: float | Sequence[float] | Tensor = 0.3,
        *,
        dtype: torch.dtype | None = None,
        train: bool = False,
        streamed: bool = False,
        store: Store | None = None,
        units: Sequence[str] = (),
    ):
        super().__init__()
        module = getattr(module, "_orig_mod", module)  # torch.compile's wrapper renames every parameter
        self.packed = packed
        let_go(module)  # which an earlier merge may have streamed
        places = _places(module, packed)
        self.module = module if train else module.eval()
        if streamed:
            store = store or packed.store()
            way = StreamedWeights if packed.shards is None else SpreadWeights
            self.weights: ResidentWeights | StreamedWeights = way(module, packed, places, dtype, store, units)
        else:
            self.packed = packed = packed.in_memory()
            self.weights = ResidentWeights(packed, places, dtype)
        self.device, dtype = self.weights.device, self.weights.dtype
        self.coefficients = nn.Parameter(packed.coefficients(coefficients).to(self.device))
        for name, tensor in packed.unchanged.items():
            unchanged = nn.Parameter(tensor.to(self.device, dtype), requires_grad=False)
            for owner, leaf in places[name]:
                set_parameter(owner, leaf, unchanged)
        self._freeze_others(places)
        self._layer_at = {(id(owner), leaf): layer for layer, of_layer in places.items() for owner, leaf in of_layer}
        self._buffers_of: dict[str | None, Buffers] = {None: packed.merged_buffers()}
        self._buffers_of.update((task, packed.expert_buffers.get(task, {})) for task in packed.tasks)
        self._move_buffers()
        self._heads = {
            task: {n: _as_parameter(x.to(self.device, dtype if x.is_floating_point() else x.dtype)) for n, x in head.items()}
            for task, head in packed.heads.items()
        }
        self._given_heads: Mapping[str, nn.Module] = {}
        self.trained_heads = TrainedHeads(packed.tasks, (), packed.coefficient_dtype, self.device)
        self._set_buffers(None)
        self.merge()

    @property
    def merged(self) -> Tensor | None:
        """The merged weights [N]; None where the model is streamed."""
        return getattr(self.weights, "merged", None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, at the weights of the last `merge()`."""
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def merge(self, coefficients: Tensor | None = None) -> None:
        """Merges the weights at ``coefficients`` [T, L], the parameter's value by default."""
        self.weights.merge(self.coefficients.detach() if coefficients is None else coefficients)

    @torch.no_grad()
    def take_on(self, merged: Tensor) -> Tensor:
        """Weights [N] that no coefficients make, until the next `merge()`; returns the buffer that they are in."""
        if self.merged is None:
            raise RuntimeError("a streamed model has no buffer for merged weights")
        self.merged.copy_(merged)
        torch.clear_autocast_cache()
        return self.merged

    @torch.no_grad()
    def zero_gradients(self) -> None:
        """Forgets the gradients of earlier backward passes; call it before those that `contract` is to add up."""
        self.weights.zero_gradients()

    def coefficient_gradient(self) -> Tensor:
        """∂loss/∂coefficients from the backward passes since `zero_gradients()`."""
        return self.weights.coefficient_gradient()

    def contract(self) -> None:
        """Adds ∂loss/∂λ to ``coefficients.grad``."""
        gradient = self.coefficient_gradient()
        self.coefficients.grad = gradient if self.coefficients.grad is None else self.coefficients.grad + gradient

    def unbind_gradients(self) -> None:
        """Takes the parameters' ``.grad`` away, so that a gradient buffer is freed with this object."""
        self.weights.unbind_gradients()
        self.trained_heads.forget_gradients()

    def use_components(self, components: Components) -> None:
        """From now on ``coefficients`` is [T, L + C]: behind λ a deviation from it for each of the leading singular components of
        every matrix of a task vector, 0 at first. components: on the model's device, as `Components.of` finds them."""
        self.weights.use_components(components)
        deviations = self.coefficients.new_zeros(self.packed.num_tasks, components.columns)
        layers = self.packed.layout.num_layers
        self.coefficients = nn.Parameter(torch.cat([self.coefficients.detach()[:, :layers], deviations], 1))

    def component_coefficients(self) -> dict[str, Tensor]:
        """c = λ + deviation of every component, layer -> [T, k]; empty without components."""
        coefficients, names = self.coefficients.detach(), self.packed.layout.names
        deviations = self.weights.components.split(coefficients)
        return {name: coefficients[:, [names.index(name)]] + of_layer for name, of_layer in deviations.items()}

    def train_heads(self, patterns: str | Sequence[str], given: Mapping[str, nn.Module] | None = None) -> None:
        """Makes ``trained_heads`` of the head tensors that shell-style patterns name.

        given: task -> a module of its own that the user's logits function calls, on the model's device; trained in place, and
            its other parameters frozen.
        Raises ValueError for a pattern that fits nothing, a task that is not packed, and a tensor that cannot be learned.
        """
        self._given_heads = dict(given or {})
        if unknown := set(self._given_heads) - set(self.packed.tasks):
            raise ValueError(f"heads= names {sorted(unknown)}; the tasks are {list(self.packed.tasks)}")
        for head in self._given_heads.values():
            head.requires_grad_(False)
        patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
        for own in self._heads.values():
            trained = {name: tensor for name, tensor in own.items() if matches(name, patterns)}
            own.update((name, _as_parameter(tensor.detach().clone())) for name, tensor in trained.items())  # not the packed ones
        places = list(find_trained(patterns, self._heads, self._given_heads, self.module))
        self.trained_heads = TrainedHeads(self.packed.tasks, places, self.packed.coefficient_dtype, self.device)

    def heads(self) -> dict[str, dict[str, Tensor]]:
        """Every task's head tensors: those that are learned as they are now, the others as they were packed."""
        found = {task: dict(head) for task, head in self.packed.heads.items()}
        for task, given in self._given_heads.items():
            found.setdefault(task, {}).update({n: x.detach().clone() for n, x in given.state_dict().items()})
        for task, name, parameter in self.trained_heads.places:
            found[task][name] = parameter.detach().to(found[task][name].dtype, copy=True)
        return found

    @contextmanager
    def teacher(self, task: str) -> Iterator[nn.Module]:
        """The module as expert ``task``: its weights before any quantising, its own BatchNorm statistics and head."""
        training = self.module.training
        self.module.eval()
        self._set_buffers(task)
        self.select_head(task)
        try:
            with self.packed.expert_source(task) as source, torch.no_grad():
                if source is None:
                    self.merge(self.packed.one_hot(task))
                else:
                    self.weights.read(source)
                yield self.module
        finally:
            self.module.train(training)
            self._set_buffers(None)
            self.merge()

    @torch.no_grad()
    def expert_parameter(self, task: str, owner: nn.Module, leaf: str, by_rows: bool = False) -> Tensor | StreamedRows:
        """A parameter of a part of the module as expert ``task`` has it: alone, while the module stays as it is merged. As in
        `teacher`, before any quantising.

        by_rows: of a streamed model, where it can be, rows that are merged when they are asked for.
        """
        parameter = owner._parameters[leaf] if (id(owner), leaf) not in self._layer_at else None
        if parameter is not None:  # a head's, or another that is not merged
            own = (x for n, x in self.packed.heads.get(task, {}).items() if _find(self.module, n) == (owner, leaf))
            return next(own, parameter).detach().to(parameter)
        name = self._layer_at[id(owner), leaf]
        if name in self.packed.unchanged:
            return getattr(owner, leaf).detach()
        with self.packed.expert_source(task) as source:
            layer = self.packed.layout.names.index(name)
            if source is not None:
                return source.read_shaped(name, self.packed.layout.shapes[layer]).to(self.device, self.weights.dtype)
            at = self.packed.one_hot(task)
            rows = self.weights.rows_of(layer, at) if by_rows and isinstance(self.weights, StreamedWeights) else None
            return self.weights.layer(layer, at) if rows is None else rows

    def select_head(self, task: str) -> None:
        """Puts the task's own head tensors, in the merged weights' dtype, into the module where it has a place for them."""
        for name, tensor in self._heads.get(task, {}).items():
            owner, leaf = _find(self.module, name)
            if owner is not None and leaf in owner._parameters:
                owner._parameters[leaf] = tensor
            elif owner is not None and leaf in owner._buffers:
                owner._buffers[leaf] = tensor.detach()

    def _freeze_others(self, places: Places) -> None:
        """Heads, and whatever else is no layer, need no gradient."""
        held = {(id(owner), leaf) for layer in places.values() for owner, leaf in layer}
        for owner in self.module.modules():
            for leaf, parameter in owner._parameters.items():
                if parameter is not None and (id(owner), leaf) not in held:
                    parameter.requires_grad_(False)

    def _move_buffers(self) -> None:
        """Brings the module's own buffers to the device; those on `meta` are there to be filled with the packed ones."""
        for prefix, owner in self.module.named_modules(remove_duplicate=False):
            for leaf, buffer in owner._buffers.items():
                if buffer is None:
                    continue
                name = f"{prefix}.{leaf}" if prefix else leaf
                if buffer.is_meta and name not in self._buffers_of[None]:
                    raise ValueError(
                        f"the module's buffer '{name}' is on meta and not among the packed ones; make the module under "
                        "samerge_ext.models.parameters_on_meta(), which leaves buffers where they are"
                    )
                owner._buffers[leaf] = torch.empty_like(buffer, device=self.device) if buffer.is_meta else buffer.to(self.device)

    def _set_buffers(self, task: str | None) -> None:
        for name, value in self._buffers_of[task].items():
            owner, leaf = _find(self.module, name)
            if owner is not None and (buffer := owner._buffers.get(leaf)) is not None:
                buffer.copy_(value)


def _as_parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _find(module: nn.Module, name: str) -> tuple[nn.Module | None, str]:
    """The submodule that holds tensor ``name`` and its own name for it."""
    path, _, leaf = name.rpartition(".")
    try:
        return module.get_submodule(path), leaf
    except AttributeError:
        return None, leaf


def _places(module: nn.Module, packed: PackedWeights) -> Places:
    """Where every layer stands in the module: one place, or several when its tensor is tied. The module may call it otherwise,
    as a model with a head does a backbone's layers, or a new version old ones."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    shapes = dict(zip(packed.layout.names, packed.layout.shapes, strict=True))
    found = correspondence(shapes, {name: parameter.shape for name, parameter in parameters.items()})
    layers = {name: layer for layer, name in found.items()}
    stored_as = {id(parameters[name]): layer for name, layer in layers.items()}
    places: Places = {name: [] for name in shapes}
    heads = {name for head in packed.heads.values() for name in head}
    for name, parameter in parameters.items():
        layer = layers.get(name, packed.aliases.get(name, stored_as.get(id(parameter))))
        if layer is not None:
            path, _, leaf = name.rpartition(".")
            places[layer].append((module.get_submodule(path), leaf))
        elif name not in heads:
            raise ValueError(
                f"the module's parameter '{name}' {list(parameter.shape)} is not among the packed layers; pass a module of "
                "the experts' architecture (if it is a task's head, pack it with heads=)"
            )
    for name, shape in shapes.items():
        if not places[name]:
            if name in packed.unchanged:  # a head or tower of the base that this module does without
                continue
            raise ValueError(f"packed layer '{name}' {list(shape)} has no parameter of that name in the module")
        own = parameters[found[name]].shape
        if own != shape:
            raise ValueError(
                f"the module's parameter '{found[name]}' is {list(own)}, the packed layer is {list(shape)}; "
                "pass a module of the experts' architecture"
            )
    return places
