"""RegMean (arXiv 2212.09849): a linear layer that is nearest to every expert's on the inputs of that expert's task.

With X_t the rows that a layer W [m, n] is given where expert t runs on its own unlabelled batches, and W_t = W₀ + τ_t,

    min_W Σ_t ‖X_t (W − W_t)ᵀ‖² / rows   ⇒   W = W₀ + (Σ_t τ_t G_t)(Σ_t G_t)⁻¹,   G_t = X_tᵀX_t / rows

Off its diagonal G_t is multiplied by α < 1, so that the sum is regular. RegMean++ (arXiv 2508.03121) takes one unit after the
other, a transformer block say: X_t is what expert t's unit is given behind the units that are merged already.

All that is no linear layer is averaged. So are, of linear layers, weights that an embedding shares, inputs that are 0 in all
batches, and layers that no batch runs through, with a warning.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from samerge_ext.learning.calibration import Calibration
from samerge_ext.learning.layer_inputs import input_grams, layers_by_module, linear_layers
from samerge_ext.learning.nested import to_device
from samerge_ext.learning.passes import Logits, call_logits
from samerge_ext.merged.model import MergedModel
from samerge_ext.merged.result import Result
from samerge_ext.merged.units import find_units
from samerge_ext.packing.matrices import Patterns, fitting, oriented
from samerge_ext.packing.packed_weights import PackedWeights


@dataclass
class Group:
    """Linear layers that are solved together. linear: their modules -> layer. unit: all that is the expert's meanwhile."""

    linear: dict[nn.Module, str] = field(default_factory=dict)
    unit: set[str] = field(default_factory=set)


def regmean(
    module: nn.Module,
    packed: PackedWeights,
    calibration: Mapping[str, Iterable[Any]],
    logits: Logits,
    *,
    alpha: float = 0.9,
    inputs: Literal["experts", "merged"] = "experts",
    units: Sequence[str] = (),
    transposed: Patterns = (),
) -> Result:
    """The merge above; the module is taken over, and given back merged as ``result.module``.

    module, calibration, logits: as of `samerging`. All rows of a batch count, padding too.
    alpha: α, from 0, where mean squares of inputs are the weights of an average, to below 1.
    inputs: "experts", one pass of every expert over its batches, or "merged", RegMean++, one for each unit.
    units: of RegMean++, shell-style patterns of modules in place of those that `merged.units.find_units` finds.
    transposed: of weights [inputs, outputs] that another module than nn.Linear multiplies its inputs with: GPT-2's Conv1D.

    Experts run one after the other. Beside the model and its gradient it takes 16 n² + 8 m n bytes for every linear layer [m, n]
    at once, or for those of a unit, and some 40 n² more for the one that is solved.

    Raises ValueError for a setting out of range, a calibration set that does not fit the tasks, a module without linear layers,
    Grams that are singular, and where task vectors are quantised; TypeError where they lie in a file or are factors;
    FloatingPointError for inputs that are NaN or Inf.
    """
    started = time.perf_counter()
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha={alpha}; it must be from 0 to below 1")
    if inputs not in ("experts", "merged"):
        raise ValueError(f"inputs={inputs!r}; choose 'experts' or 'merged'")
    stored, turned = packed.exact_task_vectors("regmean"), fitting(packed.layout, transposed)
    held = Calibration(calibration, packed.tasks)
    model = MergedModel(module, packed, 1 / packed.num_tasks)
    layers = layers_by_module(model)
    linear = linear_layers(layers, turned)
    if not linear:
        raise ValueError("the module has no nn.Linear that the experts changed; name the weights of other modules in transposed")
    groups = [Group(linear)]
    if inputs == "merged":
        groups = _as_they_run(model, _by_unit(layers, linear, find_units(model.module, units)), held, logits)
    merged = packed.merge(model.coefficients.detach())  # the average, layer by layer replaced
    views, base = packed.layout.views(merged), packed.layout.views(packed.base)
    unseen = set(linear.values())
    for group in groups:
        sums: dict[str, tuple[Tensor, Tensor]] = {}
        for task, row in zip(packed.tasks, stored, strict=True):
            changes = packed.layout.views(row)
            with model.teacher(task), input_grams(group.linear) as grams:
                if inputs == "merged":
                    current = packed.layout.views(model.take_on(merged))
                    for layer in group.unit:
                        current[layer].copy_(base[layer] + changes[layer])
                for batch in held.batches[task]:
                    call_logits(logits, model.module, to_device(batch, model.device), task)
            for layer in list(grams):
                gram = grams.pop(layer)
                if not gram.isfinite().all():
                    raise FloatingPointError(f"expert '{task}' gives '{layer}' inputs that are NaN or Inf")
                squares = gram.diagonal().clone()
                gram.mul_(alpha).diagonal().copy_(squares)
                product = oriented(changes[layer], layer in turned).double() @ gram
                sums[layer] = (sums[layer][0].add_(gram), sums[layer][1].add_(product)) if layer in sums else (gram, product)
        unseen -= sums.keys()
        for layer in list(sums):
            mean = torch.stack([oriented(packed.layout.views(row)[layer], layer in turned).double() for row in stored]).mean(0)
            change = _solution(*sums.pop(layer), mean, f"alpha={alpha}: the Grams of '{layer}'")
            oriented(views[layer], layer in turned).copy_(oriented(base[layer], layer in turned) + change)
    if unseen:
        warnings.warn(f"no batch runs through the linear layers {sorted(unseen)}, which are averaged", stacklevel=2)
    merged = model.take_on(merged)
    model.unbind_gradients()
    method = "regmean" if inputs == "experts" else "regmean++"
    return Result(packed, None, merged, method, seconds=time.perf_counter() - started, module=model.module)


def _solution(gram: Tensor, product: Tensor, mean: Tensor, what: str) -> Tensor:
    """product [m, n] · gram [n, n]⁻¹, and the mean [m, n] where an input is never other than 0."""
    never = gram.diagonal() == 0
    gram.diagonal()[never] = 1
    factor, info = torch.linalg.cholesky_ex(gram)
    if info.any():
        raise ValueError(f"{what} are singular; lower alpha, or give more batches")
    return torch.where(never, mean, torch.cholesky_solve(product.mT, factor).mT)


def _by_unit(
    layers: Mapping[nn.Module, Mapping[str, str]], linear: Mapping[nn.Module, str], units: Mapping[str, nn.Module]
) -> list[Group]:
    """A group for every unit that has linear layers, and for every one outside of units. A layer belongs to its first group."""
    unit_of = {part: unit for unit in units.values() for part in unit.modules()}
    groups: dict[nn.Module, Group] = {}
    first: dict[str, nn.Module] = {}
    for part, layer in linear.items():
        unit = first.setdefault(layer, unit_of.get(part, part))
        group = groups.setdefault(unit, Group())
        group.linear[part] = layer
        group.unit.update(name for below in unit.modules() for name in layers[below].values())
    return list(groups.values())


def _as_they_run(model: MergedModel, groups: list[Group], held: Calibration, logits: Logits) -> list[Group]:
    """The groups in the order in which the first batch runs through them; then those that it does not reach."""
    order: dict[int, None] = {}
    handles = [
        part.register_forward_pre_hook(lambda *_, place=place: order.setdefault(place))
        for place, group in enumerate(groups)
        for part in group.linear
    ]
    try:
        task = next(iter(held.batches))
        with model.teacher(task) as teacher:
            call_logits(logits, teacher, to_device(held.batches[task][0], model.device), task)
    finally:
        for handle in handles:
            handle.remove()
    return [groups[place] for place in dict.fromkeys([*order, *range(len(groups))])]
