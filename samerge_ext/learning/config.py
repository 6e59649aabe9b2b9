"""How coefficients are learned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from samerge_ext.memory import parse_bytes

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}  # name -> the dtype of autocast
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

    # What has no part in the result; and what may differ between a run and its continuation from a checkpoint.
    WITHOUT_EFFECT: ClassVar[tuple[str, ...]] = ("checkpoint_dir", "checkpoint_every", "progress", "log_every")
    MAY_CHANGE: ClassVar[tuple[str, ...]] = ("steps", "epochs", *WITHOUT_EFFECT, "cuda_graph")

    def __post_init__(self) -> None:
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


def check_device(device: str | None) -> None:
    """Raises ValueError where torch knows no such device, or finds none here."""
    try:
        wanted = torch.device(device or "cpu")
    except RuntimeError as error:
        raise ValueError(f"device={device!r}: torch knows no such device; cpu and cuda are some") from error
    if wanted.type == "cuda" and (wanted.index or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(f"device={device!r}: torch finds {count} GPUs here; leave device out to run on the CPU")
