"""Task vectors that stay modules: the parameters of all of them are views of one buffer [T, N]."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from samerge_ext.checkpoints.advice import some
from samerge_ext.memory import trim_heap
from samerge_ext.merged.streamed import FIRST
from samerge_ext.ops._common import accumulator
from samerge_ext.ops.coefficient_grad import coefficient_grad
from samerge_ext.ops.weighted_sum import weighted_sum
from samerge_ext.packing.layout import BLOCK, Layout
from samerge_ext.packing.validation import STORAGE_DTYPES, is_finite

Layers = dict[str, nn.Parameter]


class ModuleTaskVectors:
    """Experts minus their base, in place: the experts' parameters become views of one buffer.

    base: name -> parameter of the layers that are merged, as `layers_to_merge` gives them; not changed.
    experts: modules with these layers; made task vectors one by one, so that no two copies of all of them exist.
    dtype: of the task vectors, the base's by default.
    sparsity_ratio: share of each row of a matrix, the smallest magnitudes, that is set to 0; of equal ones the first.
    """

    def __init__(self, base: Layers, experts: nn.ModuleList, dtype: torch.dtype | None, sparsity_ratio: float | None):
        first = next(iter(base.values()))
        shapes, dtypes = [parameter.shape for parameter in base.values()], [parameter.dtype for parameter in base.values()]
        self.layout = Layout.build(list(base), shapes, dtypes, [True] * len(base), first.device)
        self.modules = experts
        self.flat = torch.empty(len(experts), self.layout.numel, dtype=dtype or first.dtype, device=first.device)  # [T, N]
        for task, row in enumerate(self.flat):
            row.zero_()  # what lies between layers; memory is taken row by row
            own = self._parameters(task)
            for name, view in self.layout.views(row).items():
                torch.sub(own[name].detach(), base[name].detach(), out=view)
                if sparsity_ratio is not None and view.dim() == 2:
                    smallest = view.abs().sort(dim=1, stable=True).indices[:, : int(view.shape[1] * sparsity_ratio)]
                    view.scatter_(1, smallest, 0.0)
                own[name].data = view
            trim_heap()  # of the expert's own weights

    @property
    def coefficient_dtype(self) -> torch.dtype:
        """fp32, or fp64 for models in fp64."""
        return accumulator(self.flat)

    def merged(self, layer: int, base: Tensor, coefficients: Tensor) -> Tensor:
        """base + Σ_t coefficients[t] τ_t of one layer, [shape of the layer], differentiable by coefficients [T, 1] of
        ``coefficient_dtype``.

        A gradient of the layer is contracted as soon as it is there, and then free: autograd would otherwise keep those of all
        layers until the backward of the whole module is done.
        """
        start, length = self.layout.extent(layer)
        merged = _MergedLayer.apply(coefficients, base, self.flat[:, start : start + length])
        if merged.grad_fn is not None:
            merged.grad_fn._set_sequence_nr(FIRST)
        return merged

    def merged_again(self, layer: int, base: Tensor, coefficients: Tensor) -> Callable[[], Tensor]:
        """Makes what `merged` gives now, whenever it is called, without its gradient.

        It raises RuntimeError where the base has been changed in place since, as autograd does.
        """
        start, length = self.layout.extent(layer)
        base, task_vectors, coefficients = base.detach(), self.flat[:, start : start + length], coefficients.detach().clone()
        name, version = self.layout.names[layer], base._version

        def make() -> Tensor:
            if base._version != version:
                raise RuntimeError(
                    f"'{name}' of the base was changed in place since this forward pass; go backward through it before that"
                )
            return _merged_layer(base, task_vectors, coefficients)

        return make

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """`nn.Module._apply` for all task vectors at once: they stay views of one buffer."""
        self._bind(function(self.flat))

    def refresh(self) -> None:
        """Takes on task vectors that were moved one by one, or replaced, since they were bound."""
        parameters = [list(self._parameters(task).values()) for task in range(len(self.modules))]
        if not all(_is_view(p, view) for own, views in zip(parameters, self._views()) for p, view in zip(own, views.values())):
            flat = torch.zeros(self.flat.shape, dtype=parameters[0][0].dtype, device=parameters[0][0].device)
            for own, row in zip(parameters, flat, strict=True):
                for parameter, view in zip(own, self.layout.views(row).values(), strict=True):
                    view.copy_(parameter.detach())
            self._bind(flat)

    def _bind(self, flat: Tensor) -> None:
        self.flat = flat
        for task, views in enumerate(self._views()):
            own = self._parameters(task)
            for name, view in views.items():
                own[name].data = view

    def _views(self) -> list[dict[str, Tensor]]:
        return [self.layout.views(row) for row in self.flat]

    def _parameters(self, task: int) -> Layers:
        return {name: self.modules[task].get_parameter(name) for name in self.layout.names}


class _MergedLayer(torch.autograd.Function):
    """One layer of weighted_sum, whose gradient is coefficient_grad's."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, base: Tensor, task_vectors: Tensor) -> Tensor:  # [T, 1], [shape], [T, n]
        ctx.save_for_backward(task_vectors)
        return _merged_layer(base, task_vectors, coefficients)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (task_vectors,) = ctx.saved_tensors
        whole = _whole_blocks(gradient, task_vectors)
        return coefficient_grad(whole, task_vectors, _one_layer(task_vectors), 1), None, None


def _merged_layer(base: Tensor, task_vectors: Tensor, coefficients: Tensor) -> Tensor:  # [shape], [T, n], [T, 1] -> [shape]
    whole = _whole_blocks(base.detach(), task_vectors)
    return weighted_sum(whole, task_vectors, coefficients, _one_layer(task_vectors))[: base.numel()].view(base.shape)


def _one_layer(task_vectors: Tensor) -> Tensor:  # [T, n] -> [n // 1024]
    return torch.zeros(task_vectors.shape[1] // BLOCK, dtype=torch.int32, device=task_vectors.device)


def _whole_blocks(layer: Tensor, task_vectors: Tensor) -> Tensor:  # [shape], [T, n] -> [n]
    flat = layer.reshape(-1)
    return pad(flat, (0, task_vectors.shape[1] - flat.numel())) if flat.numel() < task_vectors.shape[1] else flat


def _is_view(parameter: Tensor, view: Tensor) -> bool:
    return parameter.data_ptr() == view.data_ptr() and parameter.dtype == view.dtype and parameter.device == view.device


def layers_to_merge(pretrained: nn.Module, finetuned: Sequence[nn.Module], task_vector_dtype: torch.dtype | None) -> Layers:
    """The parameters of the pretrained model that require grad: these are merged, as FusionBench has it.

    Raises ValueError, before anything is changed, where there are none, where an expert's parameters have other names, shapes,
    dtypes or devices, and where one of a layer's numbers is NaN or Inf.
    """
    parameters = dict(pretrained.named_parameters())
    layers = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    if not layers:
        raise ValueError(
            "no parameter of pretrained_model requires grad, so none would be merged; call requires_grad_(True) on it"
        )
    if not finetuned:
        raise ValueError("finetuned_models is empty; pass the experts")
    first_name, first = next(iter(layers.items()))
    for name, parameter in layers.items():
        if (parameter.dtype, parameter.device) != (first.dtype, first.device):
            raise ValueError(
                f"'{name}' of pretrained_model is {parameter.dtype} on {parameter.device}, '{first_name}' is {first.dtype} on "
                f"{first.device}; layers that are merged must agree: convert the models with .to()"
            )
    stored = task_vector_dtype or first.dtype
    for what, dtype in (("pretrained_model", first.dtype), ("task_vector_dtype", stored)):
        if dtype not in STORAGE_DTYPES or (dtype == torch.float64) != (stored == torch.float64):
            raise ValueError(
                f"{what} is {dtype}, which cannot be merged with task vectors of {stored}; use float32, bfloat16 or float16, or "
                "float64 for both"
            )
    for name, parameter in layers.items():
        _check_finite("pretrained_model", name, parameter)
    for number, expert in enumerate(finetuned):
        _check_expert(f"finetuned_models[{number}]", parameters, layers, dict(expert.named_parameters()))
        if expert is pretrained or any(expert is other for other in finetuned[:number]):
            raise ValueError(f"finetuned_models[{number}] is a model that was given already; pass a copy of its own")
    return layers


def _check_expert(label: str, parameters: Mapping[str, Tensor], layers: Layers, own: Mapping[str, Tensor]) -> None:
    if differ := set(parameters) ^ set(own):
        which = "lacks" if differ & set(parameters) else "has beyond pretrained_model"
        raise ValueError(f"{label} {which} {some(sorted(differ & set(parameters) or differ))}; pass experts of its architecture")
    for name, parameter in layers.items():
        for what in ("shape", "dtype", "device"):
            ours, theirs = getattr(parameter, what), getattr(own[name], what)
            if ours != theirs:
                raise ValueError(f"'{name}' of {label} has {what} {theirs}, of pretrained_model {ours}; make them agree")
        _check_finite(label, name, own[name])


def _check_finite(label: str, name: str, parameter: Tensor) -> None:
    if not is_finite(parameter.detach()):
        raise ValueError(f"{label}: '{name}' holds NaN or Inf; repair or leave out this model")
