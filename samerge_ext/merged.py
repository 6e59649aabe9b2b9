"""The merged model: the user's module, its parameters views into one buffer of merged weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from samerge_ext.ops.coefficient_grad import coefficient_grad
from samerge_ext.packing import PackedWeights


class MergedModel(nn.Module):
    """A module whose weights are θ₀ + Σ_t λ_t τ_t and can be merged again at any λ.

    One `merge()` writes all weights; forward and backward passes run on the module as usual and add up in one
    gradient buffer; one `contract()` turns it into the gradient of λ:

        model.merge()
        model.zero_gradients()
        loss(model(inputs)).backward()
        model.contract()                    # adds to model.coefficients.grad, [T, L]

    The module is taken over: its parameters become views of `merged`, its buffers the average of the experts'.
    It stays the user's own object (`.module`), with its hooks, and runs under autocast and torch.compile.

    module: of the experts' architecture; its weights are replaced, so they may be random.
    packed: the base and the task vectors.
    coefficients: a number, [T] or [T, L]; kept as the parameter `.coefficients` [T, L].
    dtype: of the merged weights and their gradient, [N] each; the packed base's by default.
    train: leave the module's training mode as it is; otherwise it is put into eval mode.
    """

    def __init__(
        self,
        module: nn.Module,
        packed: PackedWeights,
        coefficients: float | Sequence[float] | Tensor = 0.3,
        *,
        dtype: torch.dtype | None = None,
        train: bool = False,
    ):
        super().__init__()
        module = getattr(module, "_orig_mod", module)  # torch.compile's wrapper renames every parameter
        self.packed = packed
        self.coefficients = nn.Parameter(packed.coefficients(coefficients))
        self._owners = _owners(module, packed)
        self.merged = torch.empty_like(packed.base, dtype=dtype)
        self.gradient = torch.zeros_like(self.merged)
        self.module = module if train else module.eval()
        self._parameters_of_layers = self._bind_layers()
        self._move_buffers()
        self._gradient_views = packed.layout.views(self.gradient)
        self._buffers_of = {None: packed.merged_buffers(), **{t: packed.expert_buffers.get(t, {}) for t in packed.tasks}}
        self._heads = {
            task: {n: x.to(self.merged) if x.is_floating_point() else x.to(self.merged.device) for n, x in head.items()}
            for task, head in packed.heads.items()
        }
        self._set_buffers(None)
        self.merge()

    def forward(self, *args, **kwargs):
        """The module's own forward, at the weights of the last `merge()`."""
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def merge(self, coefficients: Tensor | None = None) -> None:
        """Writes the weights at ``coefficients`` [T, L], the parameter's value by default."""
        self.packed.merge(self.coefficients.detach() if coefficients is None else coefficients, out=self.merged)
        # Autocast keeps casts of the weights it has seen; they would outlive this merge.
        torch.clear_autocast_cache()

    @torch.no_grad()
    def zero_gradients(self) -> None:
        """Zeroes the gradient buffer and binds every parameter's ``.grad`` to its place in it."""
        self.gradient.zero_()
        for name, parameter in self._parameters_of_layers.items():
            parameter.grad = self._gradient_views[name]

    def coefficient_gradient(self) -> Tensor:
        """∂loss/∂λ [T, L] from what backward passes have added to the gradient buffer since `zero_gradients()`."""
        for name, parameter in self._parameters_of_layers.items():
            if parameter.grad is None or parameter.grad.data_ptr() != self._gradient_views[name].data_ptr():
                raise RuntimeError(
                    f"'{name}'.grad was replaced between zero_gradients() and contract(): do not call zero_grad() on "
                    "the module or on an optimiser of its parameters there"
                )
        layout = self.packed.layout
        return coefficient_grad(self.gradient, self.packed.task_vectors, layout.block_layer, layout.num_layers)

    def contract(self) -> None:
        """Adds ∂loss/∂λ to ``coefficients.grad``."""
        gradient = self.coefficient_gradient()
        self.coefficients.grad = gradient if self.coefficients.grad is None else self.coefficients.grad + gradient

    def unbind_gradients(self) -> None:
        """Takes the parameters' ``.grad`` away, so that the gradient buffer is freed with this object."""
        for parameter in self._parameters_of_layers.values():
            parameter.grad = None

    @contextmanager
    def teacher(self, task: str) -> Iterator[nn.Module]:
        """The module as expert ``task``: its weights before any quantising, its own BatchNorm statistics and head."""
        training = self.module.training
        self.module.eval()
        self._set_buffers(task)
        self.select_head(task)
        self.packed.expert(task, out=self.merged)
        torch.clear_autocast_cache()
        try:
            with torch.no_grad():
                yield self.module
        finally:
            self.module.train(training)
            self._set_buffers(None)
            self.merge()

    def select_head(self, task: str) -> None:
        """Puts the task's own head tensors, in the merged weights' dtype, into the module where it has a place for them."""
        for name, tensor in self._heads.get(task, {}).items():
            owner, leaf = _find(self.module, name)
            if owner is not None and leaf in owner._parameters:
                owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
            elif owner is not None and leaf in owner._buffers:
                owner._buffers[leaf] = tensor

    def _bind_layers(self) -> dict[str, nn.Parameter]:
        """Registers a view of `merged` as every layer's parameter (not through .data: autograd must see a re-merge)."""
        views = self.packed.layout.views(self.merged)
        bound = {}
        for name, places in self._owners.items():
            if name in views:
                bound[name] = parameter = nn.Parameter(views[name])
            else:
                unchanged = self.packed.unchanged[name].to(self.merged.dtype)
                parameter = nn.Parameter(unchanged, requires_grad=False)
            for owner, leaf in places:
                owner._parameters[leaf] = parameter
        for parameter in self.module.parameters():
            if not any(parameter is p for p in bound.values()):
                parameter.requires_grad_(False)
        return bound

    def _move_buffers(self) -> None:
        """Brings the module's own buffers to where its weights now are."""
        for owner in self.module.modules():
            for leaf, buffer in owner._buffers.items():
                if buffer is not None:
                    owner._buffers[leaf] = buffer.to(self.merged.device)

    def _set_buffers(self, task: str | None) -> None:
        for name, value in self._buffers_of[task].items():
            owner, leaf = _find(self.module, name)
            if owner is not None and owner._buffers.get(leaf) is not None:
                owner._buffers[leaf].copy_(value)


def _find(module: nn.Module, name: str) -> tuple[nn.Module | None, str]:
    """The submodule that holds tensor ``name`` and its own name for it."""
    path, _, leaf = name.rpartition(".")
    try:
        return module.get_submodule(path), leaf
    except AttributeError:
        return None, leaf


def _owners(module: nn.Module, packed: PackedWeights) -> dict[str, list[tuple[nn.Module, str]]]:
    """Where every layer stands in the module: one place, or several when its tensor is tied."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    stored_as = {id(p): name for name, p in parameters.items() if name in packed.layout.names}
    owners: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in packed.layout.names}
    heads = {name for head in packed.heads.values() for name in head}
    for name, parameter in parameters.items():
        layer = packed.aliases.get(name, stored_as.get(id(parameter)))
        if layer is not None:
            owners[layer].append(_find(module, name))
        elif name not in heads:
            raise ValueError(
                f"the module's parameter '{name}' {list(parameter.shape)} is not among the packed layers; pass a module of "
                "the experts' architecture (if it is a task's head, pack it with heads=)"
            )
    for name, shape in zip(packed.layout.names, packed.layout.shapes, strict=True):
        if not owners[name]:
            raise ValueError(f"packed layer '{name}' {list(shape)} has no parameter of that name in the module")
        if parameters[name].shape != shape:
            raise ValueError(
                f"the module's parameter '{name}' is {list(parameters[name].shape)}, the packed layer is {list(shape)}; "
                "pass a module of the experts' architecture"
            )
    return owners
