"""Learning the merging coefficients: the loop that the learned methods share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from samerge_ext.learning.calibration import Calibration
from samerge_ext.learning.config import LearningConfig
from samerge_ext.learning.graphed import GraphedPasses, Passes, check_fixed_shapes
from samerge_ext.learning.passes import Logits, Objective, losses_and_gradient
from samerge_ext.learning.prefetch import Inputs, inputs_of_steps
from samerge_ext.learning.run_state import RunState
from samerge_ext.learning.sam import sam_gradient
from samerge_ext.learning.step_log import StepLog
from samerge_ext.merged.model import MergedModel
from samerge_ext.packing.packed_weights import PackedWeights
from samerge_ext.packing.stores import check_device


class FreeCoefficients(nn.Module):
    """Coefficients that are learned themselves: one per task and layer [T, L], or one per task [T, 1]."""

    def __init__(self, start: Tensor, granularity: str):  # [T, L]
        super().__init__()
        self.values = nn.Parameter((start if granularity == "layer" else start[:, :1]).detach().clone())

    def forward(self) -> Tensor:
        return self.values


def calibration_set(
    batches: Mapping[str, Iterable[Any]], packed: PackedWeights, config: LearningConfig
) -> Calibration:
    """The calibration set of a run; raises ValueError where it does not fit the tasks or the configuration."""
    calibration = Calibration(batches, packed.tasks, shuffle=config.shuffle, seed=config.seed)
    config.weights(packed.tasks)
    check_device(config.device)
    if config.cuda_graph and (config.streamed or config.memory_budget is not None):
        raise ValueError("cuda_graph=True needs weights that stay where they are; leave out streamed and memory_budget")
    if config.cuda_graph:
        check_fixed_shapes(calibration, packed.base.device)
    return calibration


def learn(
    model: MergedModel,
    calibration: Calibration,
    logits: Logits,
    objective: Objective,
    config: LearningConfig,
    method: str,
    *,
    targets: Mapping[str, Sequence[Tensor]] | None = None,
    learner: nn.Module | None = None,
) -> list[dict]:
    """Minimises the tasks' weighted loss over λ; leaves ``model`` merged at the result.

    targets: task -> what the objective compares the logits of each of its batches with.
    learner: predicts λ [T, L] or [T, 1] without arguments, and its parameters are what is learned; by default λ itself. SAM
        perturbs λ either way, and the gradient at λ + ε is pulled back through the learner at λ.

    Returns the history: per step the loss, each task's loss and the gradient norm.
    Raises FloatingPointError, naming task and step, when a loss or the gradient is NaN or Inf.
    """
    device = model.device
    learner = learner or FreeCoefficients(model.coefficients, config.granularity)
    optimizer = make_optimizer(learner, config)
    total = config.steps or config.epochs * calibration.steps_per_epoch
    history: list[dict] = []
    run = RunState(config, method, model, calibration)
    run.load(learner, optimizer, history)
    if len(history) > total:
        raise ValueError(f"{run.path} is {len(history)} steps in, past the {total} asked for; choose another checkpoint_dir")

    passes = make_passes(model, logits, objective, config)
    if config.cuda_graph:
        passes = GraphedPasses(passes, device)
    log = StepLog(history, model.packed.tasks, config.weights(model.packed.tasks), device, config.log_every)
    steps = range(len(history), total)
    try:
        with tqdm(total=total, initial=len(history), desc=method, disable=not config.progress, unit="step") as bar:
            for step, inputs in zip(steps, inputs_of_steps(calibration, targets, device, steps), strict=True):
                coefficients = learner()
                gradient, measured = passes(coefficients.detach(), inputs)
                log.add(measured)
                optimizer.zero_grad()
                coefficients.backward(gradient)
                for group in optimizer.param_groups:
                    group["lr"] = config.learning_rate_at(step, total)
                optimizer.step()
                run.finished(step + 1, learner, optimizer)
                if (step + 1) % config.checkpoint_every == 0 or step + 1 == total:
                    log.flush()
                    run.save(history)
                if history:
                    bar.set_postfix(loss=f"{history[-1]['loss']:.4f}", grad=f"{history[-1]['gradient_norm']:.3g}", refresh=False)
                bar.update()
    except KeyboardInterrupt:
        log.flush()
        run.save(history)
        raise
    with torch.no_grad():
        model.coefficients.copy_(learner().expand_as(model.coefficients))
    model.merge()
    return history


def make_passes(model: MergedModel, logits: Logits, objective: Objective, config: LearningConfig) -> Passes:
    """What a step runs on the device: two passes with SAM, else one."""
    weights = config.weights(model.packed.tasks)

    def passes(coefficients: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The gradient [T, L] or [T, 1] to step with, and each pass's losses and gradient norms [P, 2, T]."""
        measured = []

        def gradient_at(at: Tensor) -> tuple[Tensor, Tensor]:
            losses, gradient = losses_and_gradient(
                model,
                at.expand(model.coefficients.shape),
                inputs,
                logits,
                objective,
                task_weights=weights,
                tasks_per_batch=config.tasks_per_batch,
                precision=config.precision,
            )
            gradient = gradient.sum_to_size(at.shape)
            measured.append(torch.stack([losses.to(gradient), gradient.norm(dim=1)]))
            return losses, gradient

        if config.sam == "paper":
            _, _, gradient = sam_gradient(gradient_at, coefficients, config.rho, config.adaptive)
        else:
            _, gradient = gradient_at(coefficients)
        return gradient, torch.stack(measured)

    return passes


def make_optimizer(learner: nn.Module, config: LearningConfig) -> torch.optim.Optimizer:
    """torch's Adam, or SGD with momentum, on what is learned."""
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "adam":
        return torch.optim.Adam(learner.parameters(), lr=rate, weight_decay=decay)
    return torch.optim.SGD(learner.parameters(), lr=rate, weight_decay=decay, momentum=config.momentum)
