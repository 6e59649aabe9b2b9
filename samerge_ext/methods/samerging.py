"""SAMerging: coefficients by multi-teacher distillation with Sharpness-Aware Minimisation (arXiv 2512.21288)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from samerge_ext.budget.holding import make_model, within_budget
from samerge_ext.learning import losses
from samerge_ext.learning.loop import calibration_set, learn
from samerge_ext.learning.losses import Answers, Gradient
from samerge_ext.learning.passes import Logits, Objective
from samerge_ext.learning.teaching import Lesson, lessons
from samerge_ext.merged.result import Result
from samerge_ext.methods.configs import SAMergingConfig
from samerge_ext.packing.packed_weights import PackedWeights


@within_budget
def samerging(
    module: nn.Module,
    packed: PackedWeights,
    calibration: Mapping[str, Iterable[Any]],
    logits: Logits,
    *,
    config: SAMergingConfig | None = None,
    heads: Mapping[str, nn.Module] | None = None,
) -> Result:
    """Learns λ so that the merged model imitates every expert on that expert's own unlabelled calibration batches.

        loss(λ) = Σ_t α_t · mean over task t's batch of KL(softmax(z_t/τ) ‖ softmax(z_λ/τ))

    minimised by SAM: the step at λ follows the gradient at λ + ε, where the loss is worst nearby. config.beta chooses another
    divergence.

    module: of the experts' architecture; taken over, and given back merged as ``result.module``.
    calibration: task -> unlabelled batches. logits(module, batch, task) -> [B, V], a SharedEncoder or a LanguageModel.
    heads: task -> a module of its own that ``logits`` calls, where its parameters are to be learned too, as config.train_heads
        says (task layers, as in SyMerge, arXiv 2412.19098); they are trained in place. Packed heads need no mention.
    Raises ValueError for a calibration set that does not fit the tasks, FloatingPointError for a loss that diverges.
    """
    config = config or SAMergingConfig()
    started = time.perf_counter()
    held = calibration_set(calibration, packed, config)
    model, logits = make_model(module, packed, config, held, logits, teachers=True, heads=heads)
    held, taught = lessons(model, held, logits, config, _divergence(config).teacher_temperature)
    history = learn(model, held, logits, distillation(config), config, "samerging", targets=taught)
    return Result.of_model(model, "samerging", config, history, time.perf_counter() - started)


def distillation(config: SAMergingConfig) -> Objective:
    """The loss of a batch and its gradient by the model's answers."""
    divergence = _divergence(config)
    scale = divergence.student_temperature * divergence.teacher_temperature if config.scale_by_temperature else 1.0

    def objective(student: Answers, lesson: Lesson) -> tuple[Tensor, Gradient]:
        teacher, row_weights = lesson
        loss, gradient = losses.distillation(student, teacher, divergence, row_weights)
        return loss * scale, losses.scaled(gradient, scale)

    return objective


def _divergence(config: SAMergingConfig) -> losses.Divergence:
    return losses.Divergence(config.temperature, config.teacher_temperature or config.temperature, config.beta)
