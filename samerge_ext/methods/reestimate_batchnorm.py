"""BatchNorm's running statistics of a merged model, estimated anew: by default they are the average of the experts'.

Merged weights give other activations than any expert's do, of less variance above all, and the average knows nothing of that
("REPAIR: REnormalizing Permuted Activations for Interpolation Repair", arXiv 2211.08403). Here layer after layer gets the mean
and variance of what it is given while the model runs as it will, in eval mode, on the tasks' unlabelled batches:

    μ = mean_t E_t[x],    σ² = mean_t E_t[x²] − μ²

of each channel, every task t counted alike. A layer is given something else once those before it are changed, so that each takes
a pass of its own, which ends where it has come to the layer. A single pass in training mode would be cheaper and wrong: it
normalises every batch by its own statistics, which the merged model does not when it is used.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from samerge_ext.checkpoints.advice import some
from samerge_ext.learning.calibration import Calibration
from samerge_ext.learning.nested import to_device
from samerge_ext.learning.passes import Logits, call_logits
from samerge_ext.merged.model import MergedModel
from samerge_ext.merged.result import Result
from samerge_ext.methods.after_merging import MergedAgain
from samerge_ext.packing.packed_weights import PackedWeights

STATISTICS = ("running_mean", "running_var")


def reestimate_batchnorm(result: Result, calibration: Mapping[str, Iterable[Any]], logits: Logits) -> Result:
    """The result with the running statistics of its BatchNorm layers as above, whatever method merged it.

    result: with its module; weights and heads stay as they are. Layers among the tasks' heads keep their expert's statistics,
        and those that no batch runs through the average of the experts', with a warning.
    calibration, logits: as of `samerging`. There are as many passes over all batches as there are layers, half of a pass each on
        average; nothing but the running pass is held.

    Experts that were fine-tuned with frozen statistics expect those of the base, and a merge of them is better left with them:
    they get a warning.

    Raises ValueError for a result without a module, one without BatchNorm, and a calibration set that does not fit the tasks;
    FloatingPointError for a layer that is given NaN or Inf.
    """
    started = time.perf_counter()
    held = Calibration(calibration, result.packed.tasks)
    again = MergedAgain(result)
    model, merged = again.model, again.restore()
    layers = _layers(model)
    if not layers:
        raise ValueError(
            f"{type(model.module).__name__} has no BatchNorm with running statistics outside of the tasks' heads: there is "
            "nothing to estimate anew"
        )
    if _frozen(result.packed, layers):
        warnings.warn(
            "all experts have the base's BatchNorm statistics, which were frozen while they were fine-tuned: they expect these, "
            "and the merged model, too, may be far better with them than with those of the batches",
            stacklevel=2,
        )
    calls = _calls(model, held, logits, layers)
    if missed := [name for name, layer in layers.items() if layer not in calls]:
        warnings.warn(f"no batch runs through {some(missed)}; the average of the experts' statistics stays there", stacklevel=2)
    names = {layer: name for name, layer in layers.items()}
    for layer, most in calls.items():
        mean, variance = _moments(model, held, logits, layer, stop=most == 1)
        if not (mean.isfinite().all() and variance.isfinite().all()):
            raise FloatingPointError(f"'{names[layer]}' is given NaN or Inf; its statistics cannot be estimated")
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(variance)
    model.unbind_gradients()
    buffers = {
        f"{name}.{leaf}": getattr(layer, leaf).to(result.packed.buffers[f"{name}.{leaf}"].dtype, copy=True)
        for name, layer in layers.items()
        for leaf in STATISTICS
    }
    return replace(
        result,
        merged=merged,
        buffers=buffers,
        module=model.module,
        method=f"{result.method}, BatchNorm re-estimated",
        seconds=result.seconds + time.perf_counter() - started,
    )


class _Reached(Exception):
    """A pass has come to the layer that it was for."""


def _layers(model: MergedModel) -> dict[str, Any]:
    """Name -> module of every layer whose running statistics are merged: BatchNorm, frozen ones too, whatever the class."""
    return {
        name: part
        for name, part in model.module.named_modules()
        if all(f"{name}.{leaf}" in model.packed.buffers and getattr(part, leaf, None) is not None for leaf in STATISTICS)
    }


def _frozen(packed: PackedWeights, layers: Iterable[str]) -> bool:
    """Whether no expert has statistics of its own."""
    of_base = {name: packed.buffers[name] for layer in layers for name in (f"{layer}.{leaf}" for leaf in STATISTICS)}
    experts = [packed.expert_buffers.get(task, {}) for task in packed.tasks]
    return all(torch.equal(own.get(name, base).to(base), base) for own in experts for name, base in of_base.items())


def _calls(model: MergedModel, held: Calibration, logits: Logits, layers: Mapping[str, nn.Module]) -> dict[Any, int]:
    """Layer -> how often a batch runs through it at most, in the order in which layers are reached."""
    most: dict[Any, int] = {}
    for task, batch in _batches(model, held):
        now: dict[Any, int] = {}

        def count(layer: nn.Module, inputs: Tensor, now: dict[Any, int] = now) -> None:
            now[layer] = now.get(layer, 0) + 1

        with _looking(layers.values(), count):
            call_logits(logits, model.module, batch, task)
        most = {layer: max(most.get(layer, 0), now.get(layer, 0)) for layer in (*most, *now)}
    return most


def _moments(model: MergedModel, held: Calibration, logits: Logits, layer: Any, *, stop: bool) -> tuple[Tensor, Tensor]:
    """μ and σ² [channels] in fp64 of what a layer is given. stop: at its first call, since there is no other."""
    sums: dict[str, Any] = {}  # task -> numbers, Σ x and Σ x² of each channel

    for task, batch in _batches(model, held):

        def add(layer: nn.Module, inputs: Tensor, task: str = task) -> None:
            rows = inputs.detach().transpose(0, 1).flatten(1).double()  # [channels, numbers]
            found = (rows.shape[1], rows.sum(1), rows.square().sum(1))
            sums[task] = tuple(a + b for a, b in zip(sums[task], found, strict=True)) if task in sums else found
            if stop:
                raise _Reached

        with _looking([layer], add):
            try:
                call_logits(logits, model.module, batch, task)
            except _Reached:
                pass
    mean = torch.stack([total / count for count, total, _ in sums.values()]).mean(0)
    square = torch.stack([total / count for count, _, total in sums.values()]).mean(0)
    return mean, (square - mean.square()).clamp(min=0)


@contextmanager
def _looking(layers: Iterable[nn.Module], look: Callable[[nn.Module, Tensor], None]) -> Iterator[None]:
    """look(layer, its input) whenever one of the layers is called; nothing is kept for a backward."""
    handles = [layer.register_forward_pre_hook(lambda part, given: look(part, given[0])) for layer in layers]
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


def _batches(model: MergedModel, held: Calibration) -> Iterator[tuple[str, Any]]:
    """Every task's batches, on the model's device, with the task's head in the module."""
    for task, batches in held.batches.items():
        model.select_head(task)
        for batch in batches:
            yield task, to_device(batch, model.device)
