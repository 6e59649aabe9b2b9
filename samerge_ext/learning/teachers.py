"""What every expert says to its own task's calibration batches, from the merged model at one-hot coefficients."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from samerge_ext.learning.calibration import Calibration
from samerge_ext.learning.language_model import LanguageModel, OfExpert, Weight, output_head
from samerge_ext.learning.losses import most_likely
from samerge_ext.learning.nested import map_tensors, to_device
from samerge_ext.learning.passes import Logits, answers_to, call_logits, running
from samerge_ext.learning.teacher_cache import Given, TeacherCache
from samerge_ext.learning.turns import turns_of_batches
from samerge_ext.merged.model import MergedModel
from samerge_ext.ops.most_likely_kl import MostLikely


def teacher_logits(
    model: MergedModel, calibration: Calibration, logits: Logits, precision: str, folder: str | Path | None = None
) -> dict[str, list[Tensor]]:
    """Every expert's logits [B, V].

    folder: where they are kept (`TeacherCache`).
    """

    def run(module: nn.Module, batch: Any, task: str) -> Tensor:
        return call_logits(logits, module, batch, task, precision)

    cached = _of_teachers(model, calibration, run, folder, f"logits, {precision}")
    for task in cached:
        if cached[task][0].shape[1] == 1:
            warnings.warn(
                f"expert '{task}' has one class, whose soft-max is 1 whatever the weights; nothing is learned from its batches",
                stacklevel=3,
            )
    return cached


def teacher_answers(
    model: MergedModel, calibration: Calibration, logits: Logits, precision: str, folder: str | Path | None = None
) -> dict[str, list[Tensor]] | dict[str, list[OfExpert]]:
    """`teacher_logits`; of a LanguageModel every expert's last hidden states [R, H], beside the way to its head."""
    if not isinstance(logits, LanguageModel):
        return teacher_logits(model, calibration, logits, precision, folder)

    def run(module: nn.Module, batch: Any, task: str) -> Tensor:
        with running(module, precision, f"the batch of task '{task}'"):
            return logits.hidden_states(module, batch)

    hidden = _of_teachers(model, calibration, run, folder, f"last hidden states, {precision}")
    return {task: [OfExpert(states, partial(expert_head, model, task)) for states in held] for task, held in hidden.items()}


def most_likely_answers(
    model: MergedModel,
    calibration: Calibration,
    logits: Logits,
    precision: str,
    folder: str | Path | None,
    k: int,
    temperature: float,
) -> dict[str, list[MostLikely]]:
    """Of every expert's answers the k most likely classes of every row, each batch's as soon as it has run."""

    def run(module: nn.Module, batch: Any, task: str) -> MostLikely:
        return most_likely(answers_to(logits, module, batch, task, precision), k, temperature)

    return _of_teachers(model, calibration, run, folder, f"the {k} most likely at temperature {temperature}, {precision}")


def expert_head(model: MergedModel, task: str) -> tuple[Weight, Tensor | None]:
    """The output embeddings of expert ``task``: weight [V, H] and bias [V]."""
    head = output_head(model.module)
    bias: Any = None if head.bias is None else model.expert_parameter(task, head, "bias")
    return model.expert_parameter(task, head, "weight", by_rows=True), bias


def _of_teachers(
    model: MergedModel,
    calibration: Calibration,
    run: Callable[[nn.Module, Any, str], Given],
    folder: str | Path | None,
    kept: str,
) -> dict[str, list[Given]]:
    """What every expert gives to its own task's batches, kept in a folder where one is given; where a model is spread over ranks,
    the experts of this rank's tasks."""
    cached: dict[str, list[Given]] = {}
    counts = {task: len(batches) for task, batches in calibration.batches.items()}
    for task, indices in turns_of_batches(counts, model.packed.ranks):
        batches = calibration.batches[task]
        with model.teacher(task) as module:
            answer = partial(_answer, run, module, model.device, task)
            if folder is None:
                answers = {index: answer(batches[index]) for index, _ in indices}
                cached.setdefault(task, list(answers.values()))
            else:
                cached[task] = TeacherCache(folder, kept).answers(task, batches, answer)
        for index, values in enumerate(cached[task]):
            if any(torch.isnan(tensor).any() for tensor in ([values] if isinstance(values, Tensor) else values)):
                raise FloatingPointError(f"expert '{task}' gives NaN logits on its calibration batch {index}")
    return cached


def _answer(run: Callable[[nn.Module, Any, str], Given], module: nn.Module, device: torch.device, task: str, batch: Any) -> Given:
    return map_tensors(Tensor.detach, run(module, to_device(batch, device), task))
