"""Learning the merging coefficients: the loop that the learned methods share."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from samerge_ext.learning.calibration import Calibration
from samerge_ext.learning.config import LearningConfig
from samerge_ext.learning.early_stopping import EarlyStopping
from samerge_ext.learning.graphed import GraphedPasses, Passes, check_fixed_shapes
from samerge_ext.learning.nested import to_device
from samerge_ext.learning.passes import Logits, Objective, losses_and_gradient, mean_loss
from samerge_ext.learning.prefetch import Input, Inputs, inputs_of_steps
from samerge_ext.learning.run_state import RunState, Stateful
from samerge_ext.learning.sam import sam_gradient
from samerge_ext.learning.step_log import StepLog
from samerge_ext.learning.turns import tasks_of, turns_of_batches
from samerge_ext.merged.model import MergedModel
from samerge_ext.packing.packed_weights import PackedWeights
from samerge_ext.packing.stores import check_device


class FreeCoefficients(nn.Module):
    """Coefficients that are learned themselves: one per task [T, 1], or all that the model has [T, L] or [T, L + C]."""

    def __init__(self, start: Tensor, granularity: str):  # [T, L] or [T, L + C]
        super().__init__()
        self.values = nn.Parameter((start[:, :1] if granularity == "task" else start).detach().clone())

    def forward(self) -> Tensor:
        return self.values


class Learned(nn.Module):
    """All that is learned, as one vector [P]: the coefficients that ``learner`` gives, and behind them the heads [H]."""

    def __init__(self, learner: nn.Module, heads: Tensor):
        super().__init__()
        self.learner, self.heads = learner, nn.Parameter(heads.clone())

    def forward(self) -> Tensor:
        return torch.cat([self.learner().flatten(), self.heads])


def calibration_set(batches: Mapping[str, Iterable[Any]], packed: PackedWeights, config: LearningConfig) -> Calibration:
    """The calibration set of a run; raises ValueError where it does not fit the tasks or the configuration."""
    calibration = Calibration(
        batches, packed.tasks, shuffle=config.shuffle, seed=config.seed, held_back=config.share_held_back, ranks=packed.ranks
    )
    config.weights(packed.tasks)
    check_device(config.device)
    if config.cuda_graph and (config.streamed or config.memory_budget is not None):
        raise ValueError("cuda_graph=True needs weights that stay where they are; leave out streamed and memory_budget")
    if packed.shards is not None:
        check_spread(config)
        _require_equal(packed, calibration, config)
    if config.cuda_graph:
        check_fixed_shapes(calibration, packed.base.device)
    return calibration


def check_spread(config: LearningConfig) -> None:
    """Raises ValueError for what is not learned from weights that are spread over ranks."""
    asked = {
        "cuda_graph": config.cuda_graph,
        "granularity='rank'": config.granularity == "rank",
        "samples": getattr(config, "samples", None) is not None,
        "confidence_weights": getattr(config, "confidence_weights", False),
        "teacher_cache": getattr(config, "teacher_cache", None) is not None,
    }
    if refused := ", ".join(name for name, is_asked in asked.items() if is_asked):
        raise ValueError(f"{refused}: not with weights that are spread over ranks; leave that out, or merge without shard()")


def _require_equal(packed: PackedWeights, calibration: Calibration, config: LearningConfig) -> None:
    """Raises ValueError where ranks do not learn by the same settings or from as many batches: they would wait for each other."""
    alike = {key: value for key, value in asdict(config).items() if key not in ("device", "progress")}  # each has its own GPU
    counts = {task: len(held) for task, held in calibration.batches.items()}
    known = zlib.crc32(repr((alike, counts)).encode())
    packed.ranks.require_equal(known, "settings, or how many batches tasks have, are others", packed.layout.block_layer.device)


def learn(
    model: MergedModel,
    calibration: Calibration,
    logits: Logits,
    objective: Objective,
    config: LearningConfig,
    method: str,
    *,
    targets: Mapping[str, Sequence[Any]] | None = None,
    learner: nn.Module | None = None,
) -> list[dict]:
    """Minimises the tasks' weighted loss over λ, and over ``model.trained_heads``; leaves ``model`` at the result.

    targets: task -> what the objective compares the logits of each of its batches with.
    learner: predicts λ [T, L] or [T, 1] without arguments, and its parameters are what is learned; by default λ itself. SAM
        perturbs λ either way, and the gradient at λ + ε is pulled back through the learner at λ.

    Returns the history: per step the loss, each task's loss and the gradient norm, and where it was measured the loss of what is
    held back. Raises FloatingPointError, naming task and step, when a loss or the gradient is NaN or Inf.
    """
    device, heads = model.device, model.trained_heads
    learned = Learned(learner or FreeCoefficients(model.coefficients, config.granularity), heads.start)
    optimizer = make_optimizer(learned, config)
    total = config.steps or config.epochs * calibration.steps_per_epoch
    history: list[dict] = []
    run = RunState(config, method, model, calibration)
    loss = held_back_loss(model, learned, calibration, logits, objective, config, targets)
    stopping = EarlyStopping(learned, loss, config.patience)
    parts: dict[str, Stateful] = {"learned": learned, "optimizer": optimizer, "stopping": stopping}
    run.load(parts, history)
    model.packed.ranks.require_equal(len(history), f"finished steps in {run.path} are others", device)
    if len(history) > total:
        raise ValueError(f"{run.path} is {len(history)} steps in, past the {total} asked for; choose another checkpoint_dir")

    passes = make_passes(model, logits, objective, config)
    if config.cuda_graph:
        passes = GraphedPasses(passes, device)
    log = StepLog(history, model.packed.tasks, config.weights(model.packed.tasks), device, config.log_every)
    steps = range(len(history), total)
    fetched = inputs_of_steps(calibration, targets, device, steps, tasks_of(model.packed.tasks, model.packed.ranks))
    silent = not (config.progress and model.packed.ranks.is_first)
    try:
        with tqdm(total=total, initial=len(history), desc=method, disable=silent, unit="step") as bar:
            for step, inputs in zip(steps, fetched, strict=True):
                beside = {}
                if config.share_held_back and step % config.measure_every == 0:
                    log.flush()
                    beside["held_back_loss"] = stopping.measure(step)
                    if stopping.has_ended:
                        break
                point = learned()
                gradient, measured = passes(point.detach(), inputs)
                log.add(measured, **beside)
                optimizer.zero_grad()
                point.backward(gradient)
                for group in optimizer.param_groups:
                    group["lr"] = group["rate"] * config.decay_at(step, total)
                optimizer.step()
                run.finished(step + 1, parts)
                if (step + 1) % config.checkpoint_every == 0:
                    log.flush()
                    run.save(history)
                if history:
                    bar.set_postfix(loss=f"{history[-1]['loss']:.4f}", grad=f"{history[-1]['gradient_norm']:.3g}", refresh=False)
                bar.update()
        log.flush()
        run.save(history)
        if config.share_held_back:
            if not stopping.has_ended:
                stopping.measure(total)
            stopping.take_best()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            log.flush()
            run.save(history)
        heads.put(heads.start)  # what the caller gave is as it was
        raise
    with torch.no_grad():
        coefficients, values = split(model, learned())
        model.coefficients.copy_(coefficients.expand_as(model.coefficients))
    heads.put(values)
    model.merge()
    return history


def split(model: MergedModel, point: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients [T, L] or [T, 1] and heads [H] of what is learned, [P]."""
    heads = model.trained_heads.numel
    coefficients, values = point.split([point.numel() - heads, heads])
    return coefficients.view(model.packed.num_tasks, -1), values


def held_back_loss(
    model: MergedModel,
    learned: nn.Module,
    calibration: Calibration,
    logits: Logits,
    objective: Objective,
    config: LearningConfig,
    targets: Mapping[str, Sequence[Any]] | None,
) -> Callable[[], float]:
    """A function that gives the loss, at what is learned so far, of the batches that are held back."""

    def inputs() -> Iterator[tuple[str, Input]]:
        numbers = {task: len(held) for task, held in calibration.held_back.items()}
        for task, indices in turns_of_batches(numbers, model.packed.ranks):
            for place, is_own in indices:
                i = calibration.held_back[task][place]
                counts = is_own and calibration.counts[task][i]
                given = Input(calibration.batches[task][i], targets[task][i] if targets else None, counts)
                yield task, to_device(given, model.device)

    def loss() -> float:
        coefficients, values = split(model, learned().detach())
        model.trained_heads.put(values)
        return mean_loss(
            model,
            coefficients.expand(model.coefficients.shape),
            inputs(),
            logits,
            objective,
            task_weights=config.weights(model.packed.tasks),
            precision=config.precision,
        )

    return loss


def make_passes(model: MergedModel, logits: Logits, objective: Objective, config: LearningConfig) -> Passes:
    """What a step runs on the device: two passes with SAM, else one."""
    weights, heads, ranks = config.weights(model.packed.tasks), model.trained_heads, model.packed.ranks

    def passes(point: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The gradient [P] to step with, and each pass's losses and gradient norms [passes, 2, T]."""
        measured = []

        def gradient_at(at: Tensor) -> tuple[Tensor, Tensor]:
            coefficients, values = split(model, at)
            heads.put(values)
            losses, gradient = losses_and_gradient(
                model,
                coefficients.expand(model.coefficients.shape),
                inputs,
                logits,
                objective,
                task_weights=weights,
                tasks_per_batch=config.tasks_per_batch,
                precision=config.precision,
            )
            gradient, of_heads = gradient.sum_to_size(coefficients.shape), ranks.sum(heads.gradient(inputs))
            norms = torch.hypot(gradient.norm(dim=1), heads.norms(of_heads))
            measured.append(torch.stack([losses.to(gradient), norms]))
            return losses, torch.cat([gradient.flatten(), of_heads])

        if config.sam == "paper":
            _, _, gradient = sam_gradient(gradient_at, point, config.rho, config.adaptive)
        else:
            _, gradient = gradient_at(point)
        return gradient, torch.stack(measured)

    return passes


def make_optimizer(learned: Learned, config: LearningConfig) -> torch.optim.Optimizer:
    """torch's Adam, or SGD with momentum, on what is learned: each group at its own ``rate``. Heads are not drawn to zero."""
    groups = [{"params": list(learned.learner.parameters()), "rate": config.learning_rate, "weight_decay": config.weight_decay}]
    if learned.heads.numel():
        groups.append({"params": [learned.heads], "rate": config.head_learning_rate, "weight_decay": 0.0})
    if config.optimizer == "adam":
        return torch.optim.Adam(groups)
    return torch.optim.SGD(groups, momentum=config.momentum)
