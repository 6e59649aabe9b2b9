"""A merged model distilled from its experts: all of its weights learn what they answer on their own unlabelled batches.

    L(θ) = Σ_t mean over x of task t of KL(softmax(z_t(x)/τ) ‖ softmax(z_θ(x)/τ))      from a merge's θ

It is `samerging`'s loss, of the weights in place of λ: a few steps from a good merge go on where coefficients end, many overfit.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from samerge_ext.learning.calibration import Calibration
from samerge_ext.learning.config import check_least, check_share
from samerge_ext.learning.losses import Divergence, divergence_from
from samerge_ext.learning.nested import to_device
from samerge_ext.learning.passes import Logits, answering, answers_to
from samerge_ext.learning.teachers import teacher_answers
from samerge_ext.merged.result import Result
from samerge_ext.methods.after_merging import MergedAgain
from samerge_ext.methods.distillation import DescentConfig, descend


@dataclass(frozen=True, kw_only=True)
class MergedDistillationConfig(DescentConfig):
    """How a merged model is distilled: DescentConfig, a step being one batch of every task, and:

    temperature: τ. beta: which divergence, as of `SAMergingConfig`.
    """

    learning_rate: float = 3e-5
    weight_decay: float = 0.0
    temperature: float = 2.0
    beta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 0, "temperature", above=True)
        check_share(self, "beta")


def distill_merged(
    result: Result,
    calibration: Mapping[str, Iterable[Any]],
    logits: Logits,
    *,
    config: MergedDistillationConfig | None = None,
) -> Result:
    """The result with its weights trained as above; no coefficients make them any more.

    result: of any method, with its module, which is taken over. Heads stay as they are: `refit_heads` after it fits them.
    calibration, logits: as of `samerging`.

    Beside the packed weights it takes the model, its gradient and Adam's two moments, in fp32 at least, and what one batch of
    every task leaves for its backward. A LanguageModel has no logits here either (`samerging`).

    Raises ValueError for a result without a module and a calibration set that does not fit the tasks, FloatingPointError for a
    loss that is not finite.
    """
    config = config or MergedDistillationConfig()
    started = time.perf_counter()
    packed, divergence = result.packed, Divergence(config.temperature, config.temperature, config.beta)
    held = Calibration(calibration, packed.tasks, shuffle=True, seed=config.seed)
    again = MergedAgain(result, torch.promote_types(packed.base.dtype, torch.float32))
    model = again.model
    logits = answering(logits, model.module, to_device(held.batches[packed.tasks[0]][0], model.device))
    teachers = teacher_answers(model, held, logits, "fp32")
    merged = again.restore()

    def loss_at(step: int) -> Tensor:
        losses = []
        for task, index in held.at(step).items():
            model.select_head(task)
            student = answers_to(logits, model.module, to_device(held.batches[task][index], model.device), task)
            losses.append(divergence_from(teachers[task][index], student, divergence))
        return torch.stack(losses).sum()

    trained = [parameter for parameter in model.module.parameters() if parameter.requires_grad]
    descend(trained, loss_at, config.steps or config.epochs * held.steps_per_epoch, config, "distill the merged model")
    model.unbind_gradients()
    return replace(
        result,
        merged=merged.to(packed.base.dtype),
        coefficients=None,
        component_coefficients={},
        config=config,
        module=model.module,
        method=f"{result.method}, distilled",
        seconds=result.seconds + time.perf_counter() - started,
    )
