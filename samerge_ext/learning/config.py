"""How coefficients are learned."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

from samerge_ext.sizes import parse_bytes

# What a setting may be, by the type of its field.
KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    Path: "a path",
    Mapping: "a finite number for every name",
    Sequence: "texts",
    NoneType: "none",
}
ABSTRACT: dict[Any, Any] = {int: Integral, float: Real, Path: os.PathLike}
SEEDS = range(-(2**63), 2**63)  # that torch's generators take


@dataclass(frozen=True, kw_only=True)
class LearningConfig:
    """How coefficients are learned.

    granularity: one coefficient per task and "layer", or per "task"; or, beside those of layers, one per singular component of a
        task vector's matrix, "rank" (the space of AdaRank, arXiv 2503.22178; see `packing.components`).
    rank: how many leading components of each have one; weight decay draws theirs to that of the layer.
    sam: "paper" merges the weights again at λ + ε for the second gradient; "published" behaves as the published
        code, whose second gradient is taken at unperturbed weights and so equals the first: one pass, like "off".
    rho, adaptive: radius and kind of the SAM perturbation.
    optimizer, learning_rate, momentum (sgd), weight_decay: of the step on λ.
    train_heads: shell-style patterns of head tensors ("classifier.*") that are learned beside λ: of those packed with heads=, and
        of the modules that the method is given as heads=. SAM perturbs λ and them together, within one radius.
    head_learning_rate: of the step on them, by the same optimizer without weight decay.
    held_back: the share of every task's batches that is not learned from, by default a quarter where heads are trained and else
        none. Its loss is measured before every ``measure_every``-th step and after the last one; what is learned where it was
        least is the result, and a run ends where it was no less for ``patience`` measurements in a row.
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
        Of several ranks it is for each; they plan alike.
    host_memory_budget: beside a GPU, the most that the process may take on the host; by default what the machine has, of which
        ranks on one machine have equal parts.
    device: where the model runs; where the packed weights are by default.
    cuda_graph: launch both passes of a step as one CUDA graph; needs batches of one shape per task and a model that
        never waits for the device.
    """

    granularity: str = "layer"
    rank: int = 16
    sam: str = "off"
    rho: float = 0.07
    adaptive: bool = False
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 5e-4
    train_heads: str | Sequence[str] = ()
    head_learning_rate: float = 3e-4
    held_back: float | None = None
    measure_every: int = 10
    patience: int = 5
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

    CHOICES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "granularity": ("layer", "task", "rank"),
        "sam": ("paper", "published", "off"),
        "optimizer": ("adam", "sgd"),
        "precision": ("fp32", "bf16"),
    }
    # What has no part in the result; and what may differ between a run and its continuation from a checkpoint.
    WITHOUT_EFFECT: ClassVar[tuple[str, ...]] = ("checkpoint_dir", "checkpoint_every", "progress", "log_every")
    MAY_CHANGE: ClassVar[tuple[str, ...]] = ("steps", "epochs", *WITHOUT_EFFECT, "cuda_graph")

    def __post_init__(self) -> None:
        check_settings(self)
        check_least(self, 0, "rho", "learning_rate", "momentum", "weight_decay", "head_learning_rate", "held_back")
        check_least(self, 1, "rank", "steps", "epochs", "tasks_per_batch", "checkpoint_every", "log_every")
        check_least(self, 1, "measure_every", "patience")
        if self.share_held_back >= 1:
            raise ValueError(f"held_back={self.held_back!r}; expected a share < 1")
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

    @property
    def share_held_back(self) -> float:
        """Of every task's batches."""
        if self.held_back is None:
            return 0.25 if self.train_heads else 0.0
        return self.held_back

    def decay_at(self, step: int, steps: int) -> float:
        """Factor on the learning rates at a step of a run of so many."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class TaughtConfig(LearningConfig):
    """LearningConfig of methods that have teachers, and:

    confidence_weights: weigh every row of a task's batch by how certain its own expert is beside the others,
        1 − H(p_t) / Σ_k H(p_k). Every expert reads every task's batches for that, once.
    samples: learn from so many examples of every task, chosen among those given so that they are as hard for its expert as all of
        them are: from the easiest to the hardest, by 1 − max_c p_t(c | x), one of each of as many strata.
    teacher_top_k: keep of every teacher's soft-max the so many most likely classes, and the mass of the rest as one: less to hold
        than logits, and of a language model nothing of a teacher's head is computed again (`ops.most_likely_kl` says what is
        missed).
    teacher_cache: folder that keeps the teachers' answers, mapped from there: of a later run with the same batches every expert
        answers its first one alone, which tells whether it is the same, and the rest is read.
    """

    WITHOUT_EFFECT: ClassVar[tuple[str, ...]] = (*LearningConfig.WITHOUT_EFFECT, "teacher_cache")
    MAY_CHANGE: ClassVar[tuple[str, ...]] = (*LearningConfig.MAY_CHANGE, "teacher_cache")

    confidence_weights: bool = False
    samples: int | None = None
    teacher_top_k: int | None = None
    teacher_cache: str | Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 1, "samples", "teacher_top_k")
        if self.teacher_top_k is not None and (self.confidence_weights or self.samples is not None):
            raise ValueError(
                f"teacher_top_k={self.teacher_top_k}: confidence_weights and samples read all classes of the teachers; drop one"
            )
        if self.cuda_graph and self.samples is not None:
            raise ValueError(f"samples={self.samples}: examples of any lengths are joined anew, which cuda_graph=True refuses")


def check_settings(config: Any) -> None:
    """Raises ValueError, naming the setting, where one of a dataclass is not of its field's type, not finite, or none of its
    CHOICES."""
    hints, choices = get_type_hints(type(config)), getattr(config, "CHOICES", {})
    for key in (field.name for field in fields(config)):
        value, kinds = getattr(config, key), get_args(hints[key]) or (hints[key],)
        if get_origin(hints[key]) is Mapping:
            kinds = (hints[key],)
        if not any(_fits(value, get_origin(kind) or kind) for kind in kinds):
            wanted = " or ".join(KINDS[get_origin(kind) or kind] for kind in kinds)
            raise ValueError(f"{key}={value!r:.200}; expected {wanted}")
        if key in choices and value not in choices[key]:
            raise ValueError(f"{key}={value!r:.200}; choose one of {', '.join(map(repr, choices[key]))}")
        if key == "seed" and value not in SEEDS:
            raise ValueError(f"{key}={value!r:.200}; expected a whole number of 64 bits")


def check_least(config: Any, least: int, *keys: str, above: bool = False) -> None:
    """Raises ValueError where a setting that is not None is less than it may be; above: it may not be that number either."""
    for key in keys:
        value = getattr(config, key)
        if value is not None and (value < least or (above and value == least)):
            raise ValueError(f"{key}={value!r:.200}; expected a number {'>' if above else '≥'} {least}")


def check_share(config: Any, *keys: str) -> None:
    """Raises ValueError where a setting is no number from 0 to 1."""
    for key in keys:
        if not 0 <= getattr(config, key) <= 1:
            raise ValueError(f"{key}={getattr(config, key)!r:.200}; expected a number in [0, 1]")


def _fits(value: Any, kind: Any) -> bool:
    if kind is Mapping:
        return isinstance(value, Mapping) and all(_fits(k, str) and _fits(v, float) for k, v in value.items())
    if kind is Sequence:
        return isinstance(value, tuple | list) and all(_fits(item, str) for item in value)
    if kind in (int, float) and isinstance(value, bool):
        return False
    try:
        return isinstance(value, ABSTRACT.get(kind, kind)) and (kind is not float or math.isfinite(value))
    except OverflowError:  # a whole number larger than any float
        return False
