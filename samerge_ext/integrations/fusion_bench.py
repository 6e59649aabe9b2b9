"""FusionBench's LayerWiseMergedModel and TaskWiseMergedModel on our operators.

    from samerge_ext.integrations import fusion_bench

    with fusion_bench.accelerate():
        merged = algorithm.run(modelpool)  # any of FusionBench's that wraps its models in one of these classes

or, in the place of its command `fusion_bench`, with the same arguments:

    python -m samerge_ext.integrations.fusion_bench method=adamerging/clip modelpool=…

The classes have the constructors, attributes and methods of those of FusionBench 0.2.33, and give the same numbers but for
rounding. They do not need it; `accelerate` does.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from copy import deepcopy
from types import ModuleType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from samerge_ext.integrations.made_again import MadeAgain
from samerge_ext.integrations.module_task_vectors import ModuleTaskVectors, layers_to_merge

Model = TypeVar("Model", bound=nn.Module)


class _MergedModel(nn.Module, Generic[Model]):
    """A pretrained model at θ₀ + Σ_t λ_t τ_t, with λ made of the parameter ``merge_weight``; what both classes share.

    `merge_weights` makes the merged weights as functions of ``merge_weight``. Any number of forward and backward passes may
    follow, each adding to ``merge_weight.grad``, and the next `merge_weights` leaves graphs of earlier ones as they are: they do
    not hold the merged weights but make them again.

    pretrained_model: frozen. Its parameters that require grad are merged, one layer each; the others stay as they are.
    finetuned_models: made task vectors in place, without the parameters that are not merged.
    clamp_weights: merge at merge_weight's values within 0 … 1.
    tie_weights, strict: of `torch.func.functional_call`. Where parameters are tied, ``tie_weights`` merges them as one, which
        FusionBench refuses; without it only the first of them is merged in a forward, as there.
    """

    _merged_state_dict: dict[str, Any] | None = None

    def __init__(
        self,
        merge_weight: Tensor,
        pretrained_model: Model,
        finetuned_models: list[Model],
        clamp_weights: bool,
        tie_weights: bool,
        strict: bool,
        task_vector_dtype: torch.dtype | None = None,
        sparsity_ratio: float | None = None,
    ):
        super().__init__()
        task_vector_dtype = task_vector_dtype or next(iter(_task_vector_dtype), None)
        layers = layers_to_merge(pretrained_model, finetuned_models, task_vector_dtype)
        shape = self._shape_of_weights(len(finetuned_models), len(layers))
        if merge_weight.shape != shape:
            raise ValueError(
                f"the merging weights have shape {list(merge_weight.shape)}; with {len(finetuned_models)} finetuned_models and "
                f"{len(layers)} parameters that require grad they must have {list(shape)}"
            )
        if sparsity_ratio is not None and not 0 <= sparsity_ratio <= 1:
            raise ValueError(f"sparsity_ratio={sparsity_ratio}; it must lie in 0 … 1")
        self.clamp_weights = clamp_weights
        self.tie_weights = tie_weights
        self.strict = strict
        self.merge_weight = nn.Parameter(merge_weight, requires_grad=True)
        for name, _ in pretrained_model.named_parameters():
            for expert in finetuned_models if name not in layers else ():
                path, _, leaf = name.rpartition(".")
                delattr(expert.get_submodule(path), leaf)
        self.task_vectors = nn.ModuleList(finetuned_models)
        self._made_again = MadeAgain()
        self._held = ModuleTaskVectors(layers, self.task_vectors, task_vector_dtype, sparsity_ratio)
        stored_as = {id(parameter): name for name, parameter in layers.items()}
        every_name = pretrained_model.named_parameters(remove_duplicate=False)
        self._tied = {name: stored_as[id(p)] for name, p in every_name if id(p) in stored_as and name not in layers}
        self.pretrained_model = pretrained_model.requires_grad_(False)
        self.task_vectors.requires_grad_(False)

    def merge_weights(self, task_vector_mask: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """Merges at ``merge_weight`` as it is now; call it after every step of an optimiser.

        task_vector_mask: layer -> what its task vectors are multiplied by before they are merged, differentiable too.
        Returns the merged model's state dict, which the next forward passes run with.
        Raises ValueError for a mask that lacks a layer.
        """
        layout = self._held.layout
        if task_vector_mask is not None and (missing := [name for name in layout.names if name not in task_vector_mask]):
            raise ValueError(f"task_vector_mask has nothing for '{missing[0]}'; it must have a mask for every layer")
        self._held.refresh()
        self._merged_state_dict = None  # what nobody else holds is free before as much is needed again
        self._made_again.clear()
        merged = self.pretrained_model.state_dict(keep_vars=True)
        coefficients = self._coefficients().to(self._held.flat.device, self._held.coefficient_dtype)
        for layer, (name, of_layer) in enumerate(zip(layout.names, coefficients.split(1, dim=1), strict=True)):
            if task_vector_mask is None:
                base = merged[name]
                merged[name] = self._held.merged(layer, base, of_layer)
                self._made_again.add(merged[name], self._held.merged_again(layer, base, of_layer))
            else:
                change = self._held.merged(layer, torch.zeros_like(merged[name]), of_layer)
                merged[name] = merged[name] + task_vector_mask[name] * change
        if self.tie_weights:
            merged.update({name: merged[stored] for name, stored in self._tied.items()})
        self._merged_state_dict = merged
        return merged

    def merge_and_unload(self, task_vector_mask: Mapping[str, Tensor] | None = None, copy: bool = False) -> Model:
        """The pretrained model with the merged weights loaded into it, or with ``copy`` into a copy of it."""
        merged = self.merge_weights(task_vector_mask=task_vector_mask)
        model = deepcopy(self.pretrained_model) if copy else self.pretrained_model
        model.load_state_dict(merged)
        return model

    @property
    def forward_model(self) -> functools.partial[Any]:
        """The pretrained model's forward, of ``args`` and ``kwargs``, at the weights merged last; merges where none are."""
        state = self.merge_weights() if self._merged_state_dict is None else self._merged_state_dict
        return functools.partial(functional_call, self.pretrained_model, state, tie_weights=self.tie_weights, strict=self.strict)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        forward_model = self.forward_model
        with self._made_again.context:
            return forward_model(args=args, kwargs=kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> _MergedModel[Model]:
        if recurse:
            self._held.apply(fn)
        return super()._apply(fn, recurse)

    def _shape_of_weights(self, tasks: int, layers: int) -> tuple[int, ...]:
        raise NotImplementedError

    def _coefficients(self) -> Tensor:  # [T, L]
        raise NotImplementedError


class LayerWiseMergedModel(_MergedModel[Model]):
    """A weight for every task and layer (arXiv 2310.02575, layer-wise).

    layer_wise_weight: [T, L], the start of ``merge_weight``.
    sparsity_ratio: share of each row of a task vector's matrices that is set to 0, the smallest magnitudes. The numbers are
        FusionBench's; they are kept as they are without it, not as sparse tensors.
    normalized_merging_weights: merge at the softmax over the tasks of ``merge_weight``, after any clamping.
    All else, and errors, as of `_MergedModel`.
    """

    def __init__(
        self,
        layer_wise_weight: Tensor,
        pretrained_model: Model,
        finetuned_models: list[Model],
        clamp_weights: bool = True,
        tie_weights: bool = False,
        strict: bool = True,
        sparsity_ratio: float | None = None,
        normalized_merging_weights: bool = False,
    ):
        options = (clamp_weights, tie_weights, strict)
        super().__init__(layer_wise_weight, pretrained_model, finetuned_models, *options, sparsity_ratio=sparsity_ratio)
        self.sparsity_ratio = sparsity_ratio
        self.nromalized_merging_weights = normalized_merging_weights  # as FusionBench spells it

    def _shape_of_weights(self, tasks: int, layers: int) -> tuple[int, ...]:
        return tasks, layers

    def _coefficients(self) -> Tensor:
        coefficients = self.merge_weight.clamp(0, 1) if self.clamp_weights else self.merge_weight
        return coefficients.softmax(dim=0) if self.nromalized_merging_weights else coefficients


class TaskWiseMergedModel(_MergedModel[Model]):
    """A weight for every task (arXiv 2310.02575, task-wise).

    task_wise_weight: [T], the start of ``merge_weight``.
    task_vector_dtype: of the task vectors, the models' by default.
    All else, and errors, as of `_MergedModel`.
    """

    def __init__(
        self,
        task_wise_weight: Tensor,
        pretrained_model: Model,
        finetuned_models: list[Model],
        clamp_weights: bool = True,
        tie_weights: bool = False,
        strict: bool = True,
        task_vector_dtype: torch.dtype | None = None,
    ):
        options = (clamp_weights, tie_weights, strict)
        super().__init__(task_wise_weight, pretrained_model, finetuned_models, *options, task_vector_dtype=task_vector_dtype)
        self.task_vector_dtype = task_vector_dtype

    def _shape_of_weights(self, tasks: int, layers: int) -> tuple[int, ...]:
        return (tasks,)

    def _coefficients(self) -> Tensor:
        coefficients = self.merge_weight.clamp(0, 1) if self.clamp_weights else self.merge_weight
        return coefficients[:, None].expand(-1, self._held.layout.num_layers)


_DEFINED_IN = {  # module of FusionBench -> what takes the place of its class of that name
    "fusion_bench.models.wrappers.layer_wise_fusion": LayerWiseMergedModel,
    "fusion_bench.models.wrappers.task_wise_fusion": TaskWiseMergedModel,
}
_originals: dict[type, type] = {}  # ours -> FusionBench's, while ours is in its place
_task_vector_dtype: list[torch.dtype] = []  # of what is wrapped while ours are in place, where `accelerate` was given one
_places: list[tuple[ModuleType, str, type]] = []  # what has which of ours under which name


def accelerate(task_vector_dtype: torch.dtype | None = None) -> AbstractContextManager[Any]:
    """Puts our classes in the place of FusionBench's, in all modules that have imported them and those that will.

    Until `restore()`, or as a context manager until its block ends; what was wrapped meanwhile is to be used meanwhile, as
    FusionBench's functions ask for the class. Within another `accelerate` it does nothing. FusionBench's variant for DOGE-TA,
    which learns on other task vectors, is a class of its own and stays.

    task_vector_dtype: of the task vectors of what is wrapped meanwhile, where the constructor is not given one; by default the
        models'. With torch.bfloat16 those of fp32 models take half the memory, and are rounded to 8 bits.

    Raises ValueError for another one within another `accelerate`; ImportError where fusion-bench is not installed, or its
        classes are made from other arguments than these.
    """
    if _originals:
        if task_vector_dtype not in (None, *_task_vector_dtype):
            raise ValueError(f"task_vector_dtype={task_vector_dtype} within another accelerate(); call restore() before")
        return ExitStack()
    found = {ours: _class_of_fusion_bench(ours, module) for module, ours in _DEFINED_IN.items()}
    _originals.update(found)
    _task_vector_dtype.extend([task_vector_dtype] if task_vector_dtype else [])
    for ours, theirs in _originals.items():
        _places.extend((module, name, ours) for module in list(sys.modules.values()) for name in _names_of(theirs, module))
    for module, name, ours in _places:
        setattr(module, name, ours)
    stack = ExitStack()
    stack.callback(restore)
    return stack


def restore() -> None:
    """Puts FusionBench's classes back where they were, and into its modules that were imported since.

    A module outside of FusionBench that imported a class meanwhile keeps ours. Does nothing where no class was replaced.
    """
    own = [module for name, module in sys.modules.items() if name.partition(".")[0] == "fusion_bench"]
    since = [(module, name, ours) for ours in _originals for module in own for name in _names_of(ours, module)]
    for module, name, ours in (*_places, *since):
        if vars(module).get(name) is ours:
            setattr(module, name, _originals[ours])
    _originals.clear()
    _task_vector_dtype.clear()
    _places.clear()


def _class_of_fusion_bench(ours: type, module: str) -> type:
    try:
        theirs = getattr(importlib.import_module(module), ours.__name__)
    except ImportError as error:
        raise ImportError(
            f"accelerate() takes the place of FusionBench's classes, and {module} cannot be imported ({error}); "
            "pip install fusion-bench==0.2.33"
        ) from error
    here, there = (", ".join(inspect.signature(found).parameters) for found in (ours, theirs))
    if here != there:
        raise ImportError(
            f"{module}.{ours.__name__} is made from ({there}), and ours from ({here}); pip install fusion-bench==0.2.33"
        )
    return theirs


def _names_of(cls: type, module: ModuleType) -> list[str]:
    return [name for name, value in list(getattr(module, "__dict__", {}).items()) if value is cls]


def main() -> None:
    """FusionBench's command line, with our classes in place."""
    accelerate()
    importlib.import_module("fusion_bench.scripts.cli")._hydra_main()


if __name__ == "__main__":
    importlib.import_module("samerge_ext.integrations.fusion_bench").main()  # and not this script, whose classes are others
