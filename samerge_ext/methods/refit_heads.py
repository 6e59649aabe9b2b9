"""Heads refitted in closed form: each task's last linear layer answers the merged encoder's features as its expert does its own.

With H [n, d] what the head W [c, d] of task t is given where the merged model runs on the task's unlabelled batches, and Z [n, c]
what it gives where expert t runs on them,

    min_V ‖H Vᵀ − Z‖² + μ ‖V − W‖²   ⇒   V = W + (Z − H Wᵀ)ᵀ H (HᵀH + μ I)⁻¹

H and Z less their means where the head has a bias, which then makes up for these. μ is the power of two times the mean of
HᵀH's diagonal that answers those rows best that it was not fitted to: rows are left out one at a time, without another fit, for
what a row is missed by is then what it was missed by before over 1 − its leverage (Allen's PRESS, Technometrics 16, 1974). No
label is read, and no rate chosen.

Task layers that are learned on unlabelled batches are SyMerge's (arXiv 2412.19098); there, as in `samerging`, by gradient steps.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from samerge_ext.learning.calibration import Calibration
from samerge_ext.learning.nested import to_device
from samerge_ext.learning.passes import Logits, call_logits
from samerge_ext.merged.model import MergedModel
from samerge_ext.merged.result import Result
from samerge_ext.methods.after_merging import MergedAgain

RIDGES = tuple(2.0**power for power in range(-12, 15))  # μ, over the mean of HᵀH's diagonal


def refit_heads(
    result: Result,
    calibration: Mapping[str, Iterable[Any]],
    logits: Logits,
    heads: str | Mapping[str, nn.Linear],
) -> Result:
    """The result with every task's head as above, whatever method merged its encoder.

    result: with its module; the encoder stays as it is.
    calibration, logits: as of `samerging`; one pass of every expert, and of the merged model, over all batches.
    heads: the name of the nn.Linear in the module whose tensors were packed as heads ("classifier"), or task -> the nn.Linear of
        its own that ``logits`` calls, which is refitted in place. All rows it is given count: padding too, where there is one
        for each token.

    Takes some 16 n d bytes for one task's n rows.

    Raises ValueError for a result without a module, a calibration set that does not fit the tasks, a head that is no nn.Linear or
    that no batch runs through; FloatingPointError for features and answers that are NaN or Inf.
    """
    started = time.perf_counter()
    packed, held = result.packed, Calibration(calibration, result.packed.tasks)
    again = MergedAgain(result)
    model = again.model
    modules = {task: _head(model, heads, task) for task in packed.tasks}

    def run(task: str) -> tuple[list[Tensor], list[Tensor]]:
        with _rows_of(modules[task]) as rows, torch.no_grad():
            for batch in held.batches[task]:
                call_logits(logits, model.module, to_device(batch, model.device), task)
        return rows

    found = {}
    for task in packed.tasks:
        again.restore()
        model.select_head(task)
        inputs, _ = run(task)
        with model.teacher(task):
            _, answers = run(task)
        if not inputs:
            raise ValueError(f"no batch of task '{task}' runs through its head; logits(module, batch, task) must call it")
        model.select_head(task)
        found[task] = _refitted(modules[task], torch.cat(inputs), torch.cat(answers), task)
    merged = again.restore()
    model.unbind_gradients()
    refitted = {task: {**result.heads.get(task, {}), **_named(heads, head)} for task, head in found.items()}
    for task, head in found.items() if not isinstance(heads, str) else ():
        for leaf, tensor in head.items():
            getattr(modules[task], leaf).data.copy_(tensor)
    seconds = result.seconds + time.perf_counter() - started
    method = f"{result.method}, heads refitted"
    return replace(result, merged=merged, heads=refitted, method=method, module=model.module, seconds=seconds)


def _head(model: MergedModel, heads: str | Mapping[str, nn.Linear], task: str) -> nn.Linear:
    if isinstance(heads, str):
        names = [name for name in (f"{heads}.weight", f"{heads}.bias") if name in model.packed.heads.get(task, {})]
        if not names:
            raise ValueError(f"'{heads}.weight' is no head of task '{task}'; pack it with heads=, or give a module of each task")
        part: Any = dict(model.module.named_modules()).get(heads)
    elif set(heads) != set(model.packed.tasks):
        raise ValueError(f"heads= has modules of {sorted(heads)}; the tasks are {list(model.packed.tasks)}")
    else:
        part = heads[task]
    if not isinstance(part, nn.Linear):
        raise ValueError(f"the head of task '{task}' is {type(part).__name__}; only an nn.Linear is refitted")
    return part


@contextmanager
def _rows_of(head: nn.Linear) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """What the head is given [rows, d] and what it gives [rows, c], call by call."""
    inputs: list[Tensor] = []
    answers: list[Tensor] = []

    def look(part: nn.Module, args: tuple[Tensor, ...], answer: Tensor) -> None:
        inputs.append(args[0].detach().flatten(0, -2))
        answers.append(answer.detach().flatten(0, -2))

    handle = head.register_forward_hook(look)
    try:
        yield inputs, answers
    finally:
        handle.remove()


def _refitted(head: nn.Linear, features: Tensor, answers: Tensor, task: str) -> dict[str, Tensor]:
    """V [c, d], and the bias where there is one, in the head's type."""
    features, answers, weight = features.double(), answers.double(), head.weight.detach().double()
    if not (features.isfinite().all() and answers.isfinite().all()):
        raise FloatingPointError(f"the features or answers of task '{task}' are NaN or Inf")
    missed = answers - features @ weight.mT
    has_bias = head.bias is not None
    means = 1.0 if has_bias else 0.0
    centre, offset = means * features.mean(0), means * missed.mean(0)
    change = _ridge(features - centre, missed - offset, means / len(features))
    found = {"weight": (weight + change).to(head.weight)}
    if has_bias:
        found["bias"] = (offset - change @ centre).to(head.bias)
    return found


def _ridge(features: Tensor, missed: Tensor, leverage: float) -> Tensor:
    """The change [c, d] that gives most of what is missed [n, c] for features [n, d], at the ridge that leaving out chooses.

    leverage: that every row has before, of a mean that was taken off. Nothing changes where nothing can be told from the rest.
    """
    left, sizes, right = torch.linalg.svd(features, full_matrices=False)
    squares = sizes.square()
    unit = squares.sum() / features.shape[1]
    if unit == 0 or len(features) < 2:
        return missed.new_zeros(missed.shape[1], features.shape[1])
    along = left.mT @ missed
    errors = []
    for ridge in RIDGES:
        kept = squares / (squares + ridge * unit)
        free = 1 - leverage - left.square() @ kept
        errors.append(((missed - left @ (along * kept[:, None])) / free[:, None]).square().mean().nan_to_num(nan=torch.inf))
    best = RIDGES[int(torch.stack(errors).argmin())]
    return (along * (sizes / (squares + best * unit))[:, None]).mT @ right


def _named(heads: str | Mapping[str, nn.Linear], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{heads}.{leaf}" if isinstance(heads, str) else leaf: tensor for leaf, tensor in found.items()}
