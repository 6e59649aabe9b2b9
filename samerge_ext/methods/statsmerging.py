"""StatsMerging: coefficients predicted from statistics of the experts' weights (arXiv 2506.04567)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from samerge_ext.budget.holding import make_model, within_budget
from samerge_ext.learning.calibration import teacher_logits
from samerge_ext.learning.config import LearningConfig
from samerge_ext.learning.loop import calibration_set, learn
from samerge_ext.learning.passes import Logits
from samerge_ext.merged.result import Result
from samerge_ext.methods.arithmetic import task_arithmetic
from samerge_ext.ops.softmax_kl import argmax_cross_entropy_with_grad, softmax_kl_with_grad
from samerge_ext.packing.packed_weights import PackedWeights
from samerge_ext.statistics.features import FEATURES_FILE, Features
from samerge_ext.statistics.learner import LearnerSettings, PredictedCoefficients, StatsMergeLearner

CHOICES = {"loss": ("cross_entropy", "kl"), "of": ("experts", "task_vectors")}
DECAYS = 5  # equal parts of a run; the learning rate falls between them


@dataclass(frozen=True, kw_only=True)
class StatsMergingConfig(LearningConfig):
    """LearningConfig with the published epochs and no weight decay, and:

    loss: "cross_entropy" against the experts' most likely classes, or the "kl" divergence from their predictions.
    temperature: τ of both soft-maxes of "kl".
    of: the statistics are those of the "experts"' weights, or of the "task_vectors".
    singular_values: how many of the largest ones are features beside mean, variance and norm.
    per_layer: a network for every layer, as the published code has it, in place of one for all.
    hidden: units of the network's hidden layer.
    learning_rate_decay: factor on the learning rate after every fifth of the run (published: ×0.1 every 100 of 500 epochs).
    features: file that keeps the statistics; by default in checkpoint_dir, where one is given.

    sam: perturbs λ, and pulls the gradient found at λ + ε back through the network at λ.
    """

    WITHOUT_EFFECT: ClassVar[tuple[str, ...]] = (*LearningConfig.WITHOUT_EFFECT, "features")
    # Steps and epochs may not: the learning rate depends on how long the run is.
    MAY_CHANGE: ClassVar[tuple[str, ...]] = (
        *(key for key in LearningConfig.MAY_CHANGE if key not in ("steps", "epochs")), "features"
    )  # fmt: skip

    weight_decay: float = 0.0
    epochs: int = 500
    loss: str = "cross_entropy"
    temperature: float = 2.0
    of: str = "experts"
    singular_values: int = 3
    per_layer: bool = False
    hidden: int = 64
    learning_rate_decay: float = 0.1
    features: str | Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, choices in CHOICES.items():
            if getattr(self, key) not in choices:
                raise ValueError(f"{key}={getattr(self, key)!r}; choose one of {', '.join(map(repr, choices))}")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature!r}; expected a number > 0")
        if not 0 < self.learning_rate_decay <= 1:
            raise ValueError(f"learning_rate_decay={self.learning_rate_decay!r}; expected a number in (0, 1]")
        if int(self.singular_values) != self.singular_values or self.singular_values < 0:
            raise ValueError(f"singular_values={self.singular_values!r}; expected a whole number ≥ 0")
        if int(self.hidden) != self.hidden or self.hidden < 2 or self.hidden % 2:
            raise ValueError(f"hidden={self.hidden!r}; expected an even number ≥ 2")
        if self.per_layer and self.granularity == "task":
            raise ValueError("per_layer=True needs granularity='layer': task-wise, there is one coefficient for all layers")

    def learning_rate_at(self, step: int, steps: int) -> float:
        return self.learning_rate * self.learning_rate_decay ** (DECAYS * step // steps)

    def learner_settings(self, layers: tuple[str, ...]) -> LearnerSettings:
        return LearnerSettings(
            of=self.of,
            singular_values=self.singular_values,
            granularity=self.granularity,
            hidden=self.hidden,
            layers=layers if self.per_layer else None,
        )


@within_budget
def statsmerging(
    module: nn.Module,
    packed: PackedWeights,
    calibration: Mapping[str, Iterable[Any]],
    logits: Logits,
    *,
    config: StatsMergingConfig | None = None,
) -> Result:
    """Learns a network that predicts λ from statistics of the experts' weights, so that the merged model names the class
    that every expert names on that expert's own unlabelled calibration batches.

        S_{t,l} = [mean, variance, ‖·‖_F, σ₁, σ₂, σ₃] of W_{t,l}
        λ_{t,l} = learner(S_{t,l})
        loss    = Σ_t α_t · mean over task t's batch of −log softmax(z_λ)[argmax z_t]

    The merge is θ₀ + Σ_t λ_t τ_t, as in the published code; the paper's Σ_t λ_t θ_t, equal to it where Σ_t λ_t = 1, would
    scale the base layer by layer, which no other method here does, and is not offered.

    Arguments and errors as `samerging`; ValueError, too, for a ``features`` file of other experts. The result's ``learner``
    can be saved, and applied to other experts with `apply_learner`.
    """
    config = config or StatsMergingConfig()
    started = time.perf_counter()
    held = calibration_set(calibration, packed, config)
    features = Features.of_packed(packed, of=config.of, singular_values=config.singular_values, path=_features_path(config))
    model = make_model(module, packed, config, held, logits, teachers=True)
    teachers = teacher_logits(model, held, logits, config.precision)

    def imitation(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        if config.loss == "cross_entropy":
            return argmax_cross_entropy_with_grad(student, teacher)
        tau = config.temperature
        return softmax_kl_with_grad(student, teacher, student_temperature=tau, teacher_temperature=tau)

    statistics = features.of_granularity(config.granularity)
    learner = StatsMergeLearner.made_for(
        statistics,
        config.learner_settings(packed.layout.names),
        start=config.initial_coefficient,
        seed=config.seed,
        dtype=packed.coefficient_dtype,
    )
    predicted = PredictedCoefficients(learner, statistics)
    history = learn(model, held, logits, imitation, config, "statsmerging", targets=teachers, learner=predicted)
    result = Result.of_model(model, "statsmerging", config, history, time.perf_counter() - started)
    result.learner, result.features = learner, features
    return result


def apply_learner(
    learner: StatsMergeLearner,
    packed: PackedWeights,
    *,
    module: nn.Module | None = None,
    features: str | Path | None = None,
) -> Result:
    """Merges experts, also such as the learner was not trained with, at the λ that it predicts for them: no data, no steps.

    Their statistics are standardised with the mean and deviation of those it was trained with.
    features: a file that keeps the statistics, as in StatsMergingConfig.
    Raises ValueError where a learner with a network per layer meets other layers.
    """
    started = time.perf_counter()
    result = task_arithmetic(packed, learner.coefficients(packed, features=features), module=module)
    result.method, result.learner, result.seconds = "statsmerging", learner, time.perf_counter() - started
    return result


def _features_path(config: StatsMergingConfig) -> Path | None:
    if config.features is not None:
        return Path(config.features)
    return Path(config.checkpoint_dir) / FEATURES_FILE if config.checkpoint_dir is not None else None
