"""StatsMerging: coefficients predicted from statistics of the experts' weights (arXiv 2506.04567)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from samerge_ext.budget.holding import make_model, within_budget
from samerge_ext.learning.loop import calibration_set, learn
from samerge_ext.learning.losses import Answers, Divergence, Gradient, distillation, imitation
from samerge_ext.learning.passes import Logits
from samerge_ext.learning.teaching import Lesson, lessons
from samerge_ext.merged.result import Result
from samerge_ext.methods.arithmetic import task_arithmetic
from samerge_ext.methods.configs import StatsMergingConfig
from samerge_ext.packing.packed_weights import PackedWeights
from samerge_ext.statistics.features import FEATURES_FILE, Features
from samerge_ext.statistics.learner import LearnerSettings, PredictedCoefficients, StatsMergeLearner


@within_budget
def statsmerging(
    module: nn.Module,
    packed: PackedWeights,
    calibration: Mapping[str, Iterable[Any]],
    logits: Logits,
    *,
    config: StatsMergingConfig | None = None,
    heads: Mapping[str, nn.Module] | None = None,
) -> Result:
    """Learns a network that predicts λ from statistics of the experts' weights, so that the merged model names the class
    that every expert names on that expert's own unlabelled calibration batches.

        S_{t,l} = [mean, variance, ‖·‖_F, σ₁, σ₂, σ₃] of W_{t,l}, and with ``whole_model`` of expert t
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
    model, logits = make_model(module, packed, config, held, logits, teachers=True, heads=heads)
    held, taught = lessons(model, held, logits, config, config.temperature)

    def loss_of(student: Answers, lesson: Lesson) -> tuple[Tensor, Gradient]:
        if config.loss == "cross_entropy":
            return imitation(student, *lesson)
        teacher, row_weights = lesson
        return distillation(student, teacher, Divergence(config.temperature, config.temperature), row_weights)

    statistics = features.of_granularity(config.granularity, config.whole_model)
    learner = StatsMergeLearner.made_for(
        statistics,
        learner_settings(config, packed.layout.names),
        start=config.initial_coefficient,
        seed=config.seed,
        dtype=packed.coefficient_dtype,
    )
    predicted = PredictedCoefficients(learner, statistics)
    history = learn(model, held, logits, loss_of, config, "statsmerging", targets=taught, learner=predicted)
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


def learner_settings(config: StatsMergingConfig, layers: tuple[str, ...]) -> LearnerSettings:
    """What the learner of a run on these layers reads, and how large it is."""
    return LearnerSettings(
        of=config.of,
        singular_values=config.singular_values,
        granularity=config.granularity,
        whole_model=config.whole_model,
        hidden=config.hidden,
        layers=layers if config.per_layer else None,
    )


def _features_path(config: StatsMergingConfig) -> Path | None:
    if config.features is not None:
        return Path(config.features)
    return Path(config.checkpoint_dir) / FEATURES_FILE if config.checkpoint_dir is not None else None
