"""Learning the merging coefficients: the loop that the learned methods share."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from samerge_ext.budget.plan import parse_bytes, planned_way
from samerge_ext.learning.calibration import Calibration
from samerge_ext.learning.graphed import GraphedPasses, Passes, check_fixed_shapes
from samerge_ext.learning.passes import PRECISIONS, Logits, Objective, losses_and_gradient
from samerge_ext.learning.prefetch import Inputs, inputs_of_steps
from samerge_ext.learning.run_state import RunState
from samerge_ext.learning.sam import sam_gradient
from samerge_ext.learning.step_log import StepLog
from samerge_ext.memory import large_tensors_mapped, trim_heap
from samerge_ext.merged.model import MergedModel
from samerge_ext.packing.packed_weights import PackedWeights
from samerge_ext.packing.stores import indexed

CHOICES = {
    "granularity": ("layer", "task"),
    "sam": ("paper", "published", "off"),
    "optimizer": ("adam", "sgd"),
    "precision": tuple(PRECISIONS),
}


@dataclass(frozen=True, kw_only=True)
class LearningConfig:
    """How coefficients are learned.

    granularity: one coefficient per task and layer, or per task.
    sam: "paper" merges the weights again at λ + ε for the second gradient; "published" behaves as the published
        code, whose second gradient is taken at unperturbed weights and so equals the first: one pass, like "off".
    rho, adaptive: radius and kind of the SAM perturbation.
    optimizer, learning_rate, momentum (sgd), weight_decay: of the step on λ.
    initial_coefficient: λ at the start.
    steps: SAM steps; otherwise ``epochs`` over the calibration set.
    seed, shuffle: order of the calibration batches; as given unless shuffled.
    task_weights: α_t, 1 by default.
    precision: "bf16" runs the model under autocast.
    tasks_per_batch: how many tasks of a SharedEncoder run as one batch, all by default; bounds activation memory.
    checkpoint_dir, checkpoint_every: where and how often (in steps) the state is kept; a run that finds its own
        checkpoint continues from it to the same numbers.
    progress: show a progress bar with loss, gradient norm and time left.
    log_every: on a GPU, how many steps' losses are read back at once; NaN and Inf are noticed up to twice as many steps
        late there, before anything is saved. The history has every step.
    streamed: merge the weights unit by unit while the model runs (MergedModel): less memory, one more forward per pass.
    memory_budget: the most memory to take, in bytes or as "16GB": of the GPU, or of the whole process where the model runs on
        the CPU. The fastest way that fits is planned before anything starts (`budget.plan`), in place of ``streamed``.
    host_memory_budget: beside a GPU, the most that the process may take on the host; by default what the machine has.
    device: where the model runs; where the packed weights are by default.
    cuda_graph: launch both passes of a step as one CUDA graph; needs batches of one shape per task and a model that
        never waits for the device.
    """

    granularity: str = "layer"
    sam: str = "off"
    rho: float = 0.07
    adaptive: bool = False
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 5e-4
    initial_coefficient: float = 0.3
    steps: int | None = None
    epochs: int = 10
    seed: int = 0
    shuffle: bool = False
    task_weights: Mapping[str, float] | None = None
    precision: str = "fp32"
    tasks_per_batch: int | None = None
    checkpoint_dir: str | Path | None = None
    checkpoint_every: int = 50
    progress: bool = True
    log_every: int = 10
    streamed: bool = False
    memory_budget: int | str | None = None
    host_memory_budget: int | str | None = None
    device: str | None = None
    cuda_graph: bool = False

    # What may differ between a run and its continuation from a checkpoint.
    MAY_CHANGE: ClassVar[tuple[str, ...]] = (
        "steps", "epochs", "checkpoint_dir", "checkpoint_every", "progress", "log_every", "cuda_graph"
    )  # fmt: skip

    def __post_init__(self):
        for key, choices in CHOICES.items():
            if getattr(self, key) not in choices:
                raise ValueError(f"{key}={getattr(self, key)!r}; choose one of {', '.join(map(repr, choices))}")
        for key in ("rho", "learning_rate", "momentum", "weight_decay"):
            value = getattr(self, key)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{key}={value!r}; expected a finite number ≥ 0")
        for key in ("steps", "epochs", "tasks_per_batch", "checkpoint_every", "log_every"):
            value = getattr(self, key)
            if value is not None and (int(value) != value or value < 1):
                raise ValueError(f"{key}={value!r}; expected a whole number ≥ 1")

        if self.memory_budget is not None:
            parse_bytes(self.memory_budget)
        if self.host_memory_budget is not None:
            parse_bytes(self.host_memory_budget, "host_memory_budget")
            if self.memory_budget is None:
                raise ValueError("host_memory_budget goes with a memory_budget, for the GPU beside that host")

    def weights(self, tasks: tuple[str, ...]) -> dict[str, float]:
        """α_t of every task."""
        given = dict(self.task_weights or {})
        unknown = set(given) - set(tasks)
        if unknown:
            raise ValueError(f"task_weights names {sorted(unknown)}; the tasks are {list(tasks)}")
        return {task: float(given.get(task, 1.0)) for task in tasks}

    def learning_rate_at(self, step: int, steps: int) -> float:
        """The learning rate of a step of a run of so many."""
        return self.learning_rate


class FreeCoefficients(nn.Module):
    """Coefficients that are learned themselves: one per task and layer [T, L], or one per task [T, 1]."""

    def __init__(self, start: Tensor, granularity: str):  # [T, L]
        super().__init__()
        self.values = nn.Parameter((start if granularity == "layer" else start[:, :1]).detach().clone())

    def forward(self) -> Tensor:
        return self.values


def within_budget(method: Callable) -> Callable:
    """A learning method; where its configuration has a memory budget, large CPU tensors leave nothing behind when freed."""

    @functools.wraps(method)
    def run(*args: Any, config: LearningConfig | None = None, **others: Any):
        with large_tensors_mapped() if config and config.memory_budget is not None else nullcontext():
            return method(*args, config=config, **others)

    return run


def make_model(
    module: nn.Module, packed: PackedWeights, config: LearningConfig, calibration: Calibration, logits: Logits, *, teachers: bool
) -> MergedModel:
    """The model that coefficients are learned on, held as the configuration says or as a plan for its memory budget does.

    teachers: the experts' logits will be kept too. Raises MemoryBudgetError where nothing fits the budget.
    """
    device = indexed(config.device or packed.base.device)
    if config.memory_budget is not None:
        on_cpu = device.type == "cpu"
        if on_cpu:
            trim_heap()  # it would count
        way = planned_way(module, packed, calibration.batches, logits, config, teachers=teachers)
        model = way.make(module, packed, config.initial_coefficient, device)
        if on_cpu:
            trim_heap()  # the weights that the module came with
        return model
    if config.streamed:
        store = packed.store(device=device)
        return MergedModel(module, packed, config.initial_coefficient, streamed=True, store=store)
    return MergedModel(module, packed.in_memory(device), config.initial_coefficient)


def calibration_set(
    batches: Mapping[str, Iterable[Any]], packed: PackedWeights, config: LearningConfig
) -> Calibration:
    """The calibration set of a run; raises ValueError where it does not fit the tasks or the configuration."""
    calibration = Calibration(batches, packed.tasks, shuffle=config.shuffle, seed=config.seed)
    config.weights(packed.tasks)
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
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == total:
                log.flush()
                run.save(learner, optimizer, history)
            if history:
                bar.set_postfix(loss=f"{history[-1]['loss']:.4f}", grad=f"{history[-1]['gradient_norm']:.3g}", refresh=False)
            bar.update()
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
    options = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adam":
        return torch.optim.Adam(learner.parameters(), **options)
    return torch.optim.SGD(learner.parameters(), momentum=config.momentum, **options)
