"""The settings of the learned methods. Without torch, so that a recipe is checked before it is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from samerge_ext.learning.config import LearningConfig, TaughtConfig, check_least, check_share

DECAYS = 5  # equal parts of a run; the learning rate falls between them


@dataclass(frozen=True, kw_only=True)
class SAMergingConfig(TaughtConfig):
    """TaughtConfig, and:

    temperature: τ of the student's soft-max, and of the teachers' unless ``teacher_temperature`` is given.
    scale_by_temperature: multiply the loss by the two temperatures' product (τ², as in Hinton's distillation).
    beta: which divergence of the merged model from its teachers is minimised: 0 the paper's KL(teacher ‖ merged), 1 the reverse,
        between them the generalised Jensen–Shannon divergence, as of `softmax_kl`.
    """

    sam: str = "paper"
    temperature: float = 2.0
    teacher_temperature: float | None = None
    scale_by_temperature: bool = False
    beta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 0, "temperature", "teacher_temperature", above=True)
        check_share(self, "beta")
        if self.teacher_top_k is not None and self.beta:
            raise ValueError(f"teacher_top_k={self.teacher_top_k} is for the divergence of beta=0, and beta={self.beta!r}")


@dataclass(frozen=True, kw_only=True)
class AdaMergingConfig(LearningConfig):
    """LearningConfig with the published defaults: no SAM, no weight decay. Heads cannot be trained."""

    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_heads:
            raise ValueError(
                f"train_heads={self.train_heads!r}; adamerging has no teachers, and a head whose entropy is least says one class "
                "whatever it is given: learn heads with samerging or statsmerging"
            )


@dataclass(frozen=True, kw_only=True)
class StatsMergingConfig(TaughtConfig):
    """TaughtConfig with the published epochs and no weight decay, and:

    loss: "cross_entropy" against the experts' most likely classes, or the "kl" divergence from their predictions.
    temperature: τ of both soft-maxes of "kl".
    of: the statistics are those of the "experts"' weights, or of the "task_vectors".
    singular_values: how many of the largest ones are features beside mean, variance and norm.
    whole_model: layer-wise, the network reads the statistics of the whole expert beside those of each layer. By the latter
        alone it hardly tells experts of one base apart, and λ is nearly the same for all tasks.
    per_layer: a network for every layer, as the published code has it, in place of one for all.
    hidden: units of the network's hidden layer.
    learning_rate_decay: factor on the learning rate after every fifth of the run (published: ×0.1 every 100 of 500 epochs).
    features: file that keeps the statistics; by default in checkpoint_dir, where one is given.

    sam: perturbs λ, and pulls the gradient found at λ + ε back through the network at λ.
    """

    CHOICES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **LearningConfig.CHOICES,
        "granularity": ("layer", "task"),
        "loss": ("cross_entropy", "kl"),
        "of": ("experts", "task_vectors"),
    }
    WITHOUT_EFFECT: ClassVar[tuple[str, ...]] = (*TaughtConfig.WITHOUT_EFFECT, "features")
    # Steps and epochs may not: the learning rate depends on how long the run is.
    MAY_CHANGE: ClassVar[tuple[str, ...]] = (
        *(key for key in TaughtConfig.MAY_CHANGE if key not in ("steps", "epochs")), "features"
    )  # fmt: skip

    weight_decay: float = 0.0
    epochs: int = 500
    loss: str = "cross_entropy"
    temperature: float = 2.0
    of: str = "experts"
    singular_values: int = 3
    whole_model: bool = False
    per_layer: bool = False
    hidden: int = 64
    learning_rate_decay: float = 0.1
    features: str | Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 0, "temperature", above=True)
        check_least(self, 0, "singular_values")
        if not 0 < self.learning_rate_decay <= 1:
            raise ValueError(f"learning_rate_decay={self.learning_rate_decay!r}; expected a number in (0, 1]")
        if self.teacher_top_k is not None and self.loss != "kl":
            raise ValueError(f"teacher_top_k={self.teacher_top_k} is for loss='kl', and loss={self.loss!r}")
        if self.hidden < 2 or self.hidden % 2:
            raise ValueError(f"hidden={self.hidden!r}; expected an even number ≥ 2")
        if self.whole_model and self.granularity == "task":
            raise ValueError("whole_model=True needs granularity='layer': task-wise, nothing but the whole expert's is read")
        if self.per_layer and self.granularity == "task":
            raise ValueError("per_layer=True needs granularity='layer': task-wise, there is one coefficient for all layers")

    def decay_at(self, step: int, steps: int) -> float:
        return self.learning_rate_decay ** (DECAYS * step // steps)
