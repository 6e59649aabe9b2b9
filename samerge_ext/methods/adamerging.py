"""AdaMerging: coefficients that minimise the entropy of the merged model's predictions (arXiv 2310.02575)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from samerge_ext.budget.holding import make_model, within_budget
from samerge_ext.learning.loop import calibration_set, learn
from samerge_ext.learning.losses import Answers, Gradient, uncertainty
from samerge_ext.learning.passes import Logits
from samerge_ext.merged.result import Result
from samerge_ext.methods.configs import AdaMergingConfig
from samerge_ext.packing.packed_weights import PackedWeights


@within_budget
def adamerging(
    module: nn.Module,
    packed: PackedWeights,
    calibration: Mapping[str, Iterable[Any]],
    logits: Logits,
    *,
    config: AdaMergingConfig | None = None,
) -> Result:
    """Learns λ so that the merged model is certain of its predictions, right or wrong: it has no teachers.

        loss(λ) = Σ_t α_t · mean over task t's batch of H(softmax(z_λ))

    Arguments, result and errors as `samerging`.
    """
    config = config or AdaMergingConfig()
    started = time.perf_counter()
    held = calibration_set(calibration, packed, config)
    model, logits = make_model(module, packed, config, held, logits, teachers=False)

    def loss_of(student: Answers, target: None) -> tuple[Tensor, Gradient]:
        return uncertainty(student)

    history = learn(model, held, logits, loss_of, config, "adamerging")
    return Result.of_model(model, "adamerging", config, history, time.perf_counter() - started)
