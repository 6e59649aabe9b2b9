"""Learning the merging coefficients: the loop that samerging and adamerging share."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from samerge_ext.calibration import Calibration
from samerge_ext.checkpoints import atomic_write
from samerge_ext.merged import MergedModel
from samerge_ext.passes import PRECISIONS, Logits, Objective, losses_and_gradient
from samerge_ext.sam import sam_gradient

STATE_FILE = "state.pt"  # in a run's checkpoint_dir
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

    def __post_init__(self):
        for key, choices in CHOICES.items():
            if getattr(self, key) not in choices:
                raise ValueError(f"{key}={getattr(self, key)!r}; choose one of {', '.join(map(repr, choices))}")
        for key in ("rho", "learning_rate", "momentum", "weight_decay"):
            value = getattr(self, key)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{key}={value!r}; expected a finite number ≥ 0")
        for key in ("steps", "epochs", "tasks_per_batch", "checkpoint_every"):
            value = getattr(self, key)
            if value is not None and (int(value) != value or value < 1):
                raise ValueError(f"{key}={value!r}; expected a whole number ≥ 1")

    def weights(self, tasks: tuple[str, ...]) -> dict[str, float]:
        """α_t of every task."""
        given = dict(self.task_weights or {})
        unknown = set(given) - set(tasks)
        if unknown:
            raise ValueError(f"task_weights names {sorted(unknown)}; the tasks are {list(tasks)}")
        return {task: float(given.get(task, 1.0)) for task in tasks}


def learn(
    model: MergedModel, calibration: Calibration, logits: Logits, objective: Objective, config: LearningConfig, method: str
) -> list[dict]:
    """Minimises the tasks' weighted loss over ``model.coefficients``; leaves the model merged at the result.

    Returns the history: per step the loss, each task's loss and the gradient norm.
    Raises FloatingPointError, naming task and step, as soon as a loss or the gradient is NaN or Inf.
    """
    tasks = model.packed.tasks
    weights = config.weights(tasks)
    alpha = torch.tensor([weights[t] for t in tasks], dtype=model.coefficients.dtype, device=model.coefficients.device)
    shape = model.coefficients.shape
    learned = model.coefficients.detach() if config.granularity == "layer" else model.coefficients.detach()[:, :1]
    learned = learned.clone().requires_grad_()
    optimizer = make_optimizer(learned, config)
    total = config.steps or config.epochs * calibration.steps_per_epoch
    history: list[dict] = []
    run = _Checkpoint(config, method, model, calibration)
    run.load(learned, optimizer, history)
    if len(history) > total:
        raise ValueError(f"{run.path} is {len(history)} steps in, past the {total} asked for; choose another checkpoint_dir")

    def gradient_at(coefficients: Tensor) -> tuple[Tensor, Tensor]:
        losses, gradient = losses_and_gradient(
            model,
            coefficients.detach().expand(shape),
            batches,
            logits,
            objective,
            task_weights=weights,
            tasks_per_batch=config.tasks_per_batch,
            precision=config.precision,
        )
        _check_finite(losses, gradient, tasks, step)
        return losses, gradient if config.granularity == "layer" else gradient.sum(1, keepdim=True)

    bar = tqdm(total=total, initial=len(history), desc=method, disable=not config.progress, unit="step")
    try:
        for step in range(len(history), total):
            batches = {t: (i, calibration.batches[t][i]) for t, i in calibration.at(step).items()}
            if config.sam == "paper":
                losses, gradient, step_gradient = sam_gradient(gradient_at, learned.detach(), config.rho, config.adaptive)
            else:
                losses, gradient = gradient_at(learned)
                step_gradient = gradient
            learned.grad = step_gradient
            optimizer.step()
            record = {
                "step": step,
                "loss": float((alpha * losses).sum()),
                "losses": dict(zip(tasks, losses.tolist(), strict=True)),
                "gradient_norm": float(gradient.norm()),
            }
            history.append(record)
            bar.set_postfix(loss=f"{record['loss']:.4f}", grad=f"{record['gradient_norm']:.3g}", refresh=False)
            bar.update()
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == total:
                run.save(learned, optimizer, history)
    finally:
        bar.close()
    with torch.no_grad():
        model.coefficients.copy_(learned.expand(shape))
    model.merge()
    return history


def make_optimizer(learned: Tensor, config: LearningConfig) -> torch.optim.Optimizer:
    """torch's Adam, or SGD with momentum, on the coefficients."""
    if config.optimizer == "adam":
        return torch.optim.Adam([learned], lr=config.learning_rate, weight_decay=config.weight_decay)
    return torch.optim.SGD([learned], lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay)


def _check_finite(losses: Tensor, gradient: Tensor, tasks: tuple[str, ...], step: int) -> None:
    for task, loss in zip(tasks, losses.tolist(), strict=True):
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss of task '{task}' is {loss} at step {step}; try a smaller learning_rate or rho, or precision='fp32'"
            )
    if not torch.isfinite(gradient).all():
        task = tasks[int((~torch.isfinite(gradient)).any(1).nonzero()[0])]
        raise FloatingPointError(f"the gradient of task '{task}''s coefficients is not finite at step {step}")


class _Checkpoint:
    """The state of a run in ``checkpoint_dir``: coefficients, optimiser, history and torch's random state."""

    # What may differ between a run and its continuation.
    FREE = ("steps", "epochs", "checkpoint_dir", "checkpoint_every", "progress")

    def __init__(self, config: LearningConfig, method: str, model: MergedModel, calibration: Calibration):
        self.path = Path(config.checkpoint_dir) / STATE_FILE if config.checkpoint_dir else None
        settings = {key: value for key, value in asdict(config).items() if key not in self.FREE}
        self.identity = {
            "method": method,
            **settings,
            "tasks": list(model.packed.tasks),
            "layers": list(model.packed.layout.names),
            "batches": {task: len(held) for task, held in calibration.batches.items()},
        }

    def load(self, learned: Tensor, optimizer: torch.optim.Optimizer, history: list[dict]) -> None:
        if self.path is None or not self.path.exists():
            return
        state = torch.load(self.path, weights_only=True)
        saved, own = json.loads(state["identity"]), json.loads(json.dumps(self.identity))
        differs = sorted(key for key in saved.keys() | own.keys() if saved.get(key) != own.get(key))
        if differs:
            raise ValueError(f"{self.path} is of another run: {', '.join(differs)} differ; choose another checkpoint_dir")
        with torch.no_grad():
            learned.copy_(state["coefficients"])
        optimizer.load_state_dict(state["optimizer"])
        history.extend(state["history"])
        torch.set_rng_state(state["random_state"])

    def save(self, learned: Tensor, optimizer: torch.optim.Optimizer, history: list[dict]) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "identity": json.dumps(self.identity),
            "coefficients": learned.detach(),
            "optimizer": optimizer.state_dict(),
            "history": history,
            "random_state": torch.get_rng_state(),
        }
        with atomic_write(self.path) as file:
            torch.save(state, file)
