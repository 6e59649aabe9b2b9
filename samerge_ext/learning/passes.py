"""One pass of all tasks' batches through the merged model: losses and the gradient of the coefficients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from samerge_ext.learning.language_model import LanguageModel
from samerge_ext.learning.losses import Answers, number_of_rows, scaled
from samerge_ext.learning.prefetch import Input, Inputs
from samerge_ext.learning.shared_encoder import SharedEncoder
from samerge_ext.learning.turns import turns
from samerge_ext.merged.model import MergedModel
from samerge_ext.packing.ranks import Ranks

# logits(module, batch, task) -> [B, V]: the user's forward on the user's module.
Logits = Callable[[nn.Module, Any, str], Tensor]
# objective(answers, target) -> loss [], its gradient by the answers: `learning.losses`; the target is what the batch came with.
Objective = Callable[[Any, Any], tuple[Tensor, Any]]


def call_logits(logits: Logits, module: nn.Module, batch: Any, task: str, precision: str = "fp32") -> Tensor:
    """The user's forward on one task's batch, under autocast where asked; checks what comes back."""
    with running(module, precision, f"the batch of task '{task}'"):
        values = logits(module, batch, task)
    return _checked(task, values)


def answers_to(logits: Logits, module: nn.Module, batch: Any, task: str, precision: str = "fp32") -> Answers:
    """What the model gives to one task's batch: of a LanguageModel no logits, but what they are the product of."""
    if not isinstance(logits, LanguageModel):
        return call_logits(logits, module, batch, task, precision)
    with running(module, precision, f"the batch of task '{task}'"):
        return logits.projected(module, batch)


def answering(logits: Logits, module: nn.Module, batch: Any, samples: int | None = None) -> Logits:
    """A LanguageModel where its logits need not be computed, else the function that computes them: a pass over a batch decides.

    samples: of a TaughtConfig; they are chosen by logits.
    """
    if not isinstance(logits, LanguageModel):
        return logits
    with running(module, "fp32", "its first batch"):
        return logits if samples is None and logits.is_exact(module, batch) else logits.logits


def losses_and_gradient(
    model: MergedModel,
    coefficients: Tensor,
    inputs: Inputs,
    logits: Logits,
    objective: Objective,
    *,
    task_weights: Mapping[str, float],
    tasks_per_batch: int | None = None,
    precision: str = "fp32",
) -> tuple[Tensor, Tensor]:
    """Each task's loss [T] and ∂(Σ_t α_t loss_t)/∂λ [T, L] at ``coefficients`` [T, L].

    One merge, the forward and backward passes of ``tasks_per_batch`` tasks at a time, one contraction.
    inputs: of all tasks; where a model is spread over ranks, of this rank's (`turns.tasks_of`).
    """
    model.merge(coefficients)
    model.zero_gradients()
    ranks = model.packed.ranks
    tasks = tuple(inputs) if model.packed.shards is None else model.packed.tasks
    losses: dict[str, Tensor] = {}
    for group in _groups(tasks, ranks, logits, tasks_per_batch):
        outputs = _forward(model, {task: inputs[task].batch for task in group}, logits, precision)
        rows = {task: number_of_rows(outputs[task]) for task in group if group[task] and inputs[task].counts}
        shares = shares_of_batches(rows, tasks, ranks, model.device)
        tensors, gradients = [], []
        for task, answers in outputs.items():
            if not any(part.requires_grad for part in _parts(answers) if part is not None):
                raise RuntimeError(
                    f"logits of task '{task}' carry no gradient; compute them from the module without no_grad or detach"
                )
            loss, gradient = objective(answers.detach() if isinstance(answers, Tensor) else answers, inputs[task].target)
            if task in shares:
                losses[task] = loss * shares[task]
            gradient = scaled(gradient, task_weights[task] * shares.get(task, 0.0))
            by_part = [gradient] if isinstance(gradient, Tensor) else gradient
            for part, of_part in zip(_parts(answers), by_part, strict=True):
                if part is not None and of_part is not None:
                    tensors.append(part)
                    gradients.append(of_part.to(part.dtype))
        torch.autograd.backward(tensors, gradients)
    found = model.coefficient_gradient()
    zero = found.new_zeros(())
    return ranks.sum(torch.stack([losses.get(task, zero).to(zero) for task in tasks])), found


@torch.no_grad()
def mean_loss(
    model: MergedModel,
    coefficients: Tensor,
    inputs: Iterable[tuple[str, Input]],
    logits: Logits,
    objective: Objective,
    *,
    task_weights: Mapping[str, float],
    precision: str = "fp32",
) -> float:
    """Σ_t α_t × the mean of the loss over all rows of task t's batches, at ``coefficients`` [T, L].

    inputs: with their tasks; of a model that is spread over ranks, this rank's.
    """
    model.merge(coefficients)
    found = torch.zeros(2, model.packed.num_tasks, dtype=torch.float64, device=model.device)  # losses of all rows, and rows
    for task, given in inputs:
        model.select_head(task)
        answers = answers_to(logits, model.module, given.batch, task, precision)
        loss = objective(answers, given.target)[0].double()
        if given.counts:
            rows = number_of_rows(answers)
            found[:, model.packed.tasks.index(task)] += torch.stack([loss * rows, loss.new_tensor(rows)])
    losses, rows = model.packed.ranks.sum(found)
    weights = torch.tensor([task_weights[task] for task in model.packed.tasks], dtype=torch.float64, device=model.device)
    return (weights * losses / rows).sum().item()


def _groups(tasks: Sequence[str], ranks: Ranks, logits: Logits, tasks_per_batch: int | None) -> Iterator[dict[str, bool]]:
    """The tasks that run as one batch, group after group, each with whether it counts: several where they share an encoder."""
    found = turns(tasks, ranks)
    at_once = tasks_per_batch or len(found) if isinstance(logits, SharedEncoder) else 1
    for first in range(0, len(found), at_once):
        group = found[first : first + at_once]
        yield {task: (task, True) in group for task, _ in group}


def shares_of_batches(rows: Mapping[str, int], tasks: Sequence[str], ranks: Ranks, device: torch.device) -> dict[str, Any]:
    """Of each task whose rows count here, how much of its batch they are. rows: task -> how many."""
    if ranks.size <= len(tasks):
        return dict.fromkeys(rows, 1.0)
    here = torch.tensor([rows.get(task, 0) for task in tasks], dtype=torch.float64, device=device)
    shares = here / ranks.sum(here.clone()).clamp_(min=1)  # of a batch without rows there is nothing to share
    return {task: shares[place] for place, task in enumerate(tasks) if task in rows}


def _forward(model: MergedModel, batches: Mapping[str, Any], logits: Logits, precision: str) -> dict[str, Answers]:
    """Answers to one group of tasks."""
    if isinstance(logits, SharedEncoder):
        with running(model.module, precision, f"the batches of tasks {list(batches)}"):
            together = logits.together(model.module, batches)
        return {task: _checked(task, values) for task, values in together.items()}
    ((task, batch),) = batches.items()
    model.select_head(task)
    return {task: answers_to(logits, model.module, batch, task, precision)}


def _parts(answers: Answers) -> list[Tensor | None]:
    return [answers] if isinstance(answers, Tensor) else answers.parts()


@contextmanager
def running(module: nn.Module, precision: str, what: str) -> Iterator[None]:
    """Autocast as asked; an error of the user's code leaves with a note that says what ran."""
    device = next(module.parameters()).device.type
    try:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16"):
            yield
    except Exception as error:
        error.add_note(f"raised while the model ran {what}; logits(module, batch, task) must take the calibration batches")
        raise


def _checked(task: str, values: Tensor) -> Tensor:
    if not isinstance(values, Tensor) or values.dim() != 2:
        got = f"a tensor {list(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
        raise TypeError(
            f"logits of task '{task}' are {got}; expected a tensor [batch, classes] (for transformers, return outputs.logits)"
        )
    return values
