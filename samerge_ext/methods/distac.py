"""DisTaC (arXiv 2508.01148): task vectors of one length, of experts that are certain, before any other method merges them.

A long task vector outvotes the others, and experts that are not certain of their predictions merge badly. So every τ_t is scaled
to one norm, and what that costs its expert is learned back from the expert itself, on unlabelled batches:

    min_θ  τ_s τ_e KL(softmax(z_expert / τ_e) ‖ softmax(z_θ / τ_s)) + β ‖θ − θ_t‖²   from  θ_t = θ₀ + κ_t τ_t,  ‖κ_t τ_t‖ = norm

Logits that fit are z_θ = z_expert · τ_s / τ_e: a student's temperature above the expert's makes it more certain.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from samerge_ext.learning.calibration import Calibration
from samerge_ext.learning.config import check_least
from samerge_ext.learning.nested import to_device
from samerge_ext.learning.passes import Logits, call_logits
from samerge_ext.learning.teachers import teacher_logits
from samerge_ext.merged.model import MergedModel
from samerge_ext.methods.distillation import DescentConfig, descend
from samerge_ext.ops.softmax_kl import softmax_kl
from samerge_ext.packing.kept_experts import experts_of
from samerge_ext.packing.packed_weights import PackedWeights


@dataclass(frozen=True, kw_only=True)
class DisTaCConfig(DescentConfig):
    """How task vectors are conditioned: DescentConfig with the published code's steps, rate and weight decay, and:

    student_temperature, expert_temperature: τ_s and τ_e. penalty: β.
    """

    steps: int | None = 500
    learning_rate: float = 1e-5
    weight_decay: float = 0.0
    student_temperature: float = 10.0
    expert_temperature: float = 10.0
    penalty: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 0, "student_temperature", "expert_temperature", above=True)
        check_least(self, 0, "penalty")


def distac(
    module: nn.Module,
    packed: PackedWeights,
    calibration: Mapping[str, Iterable[Any]],
    logits: Logits,
    *,
    norm: float | Literal["smallest", "own"] = "smallest",
    config: DisTaCConfig | None = None,
) -> PackedWeights:
    """The same base with every τ_t scaled to one norm and distilled from its expert, as above.

    module: of the experts' architecture; taken over, runs in eval mode, and has the base's weights afterwards.
    calibration: task -> unlabelled batches. logits(module, batch, task) -> [B, V], or a SharedEncoder.
    norm: that all task vectors are scaled to, by default that of the shortest; "own" leaves each as long as it is, where
        experts are to become more certain and no more. After the steps it is as near to that as β keeps it.

    A student keeps its expert's head and float buffers. Teachers are the experts as they were packed, which stay held. Beside
    both it takes the weights, their gradient, Adam's two moments and θ_t, in fp32 at least.

    Raises, before any step, ValueError for a calibration set that does not fit the tasks, a task vector of no length and for
    quantised ones, TypeError where they lie in a file or are factors; FloatingPointError for a loss that is not finite.
    """
    config = config or DisTaCConfig()
    task_vectors = packed.exact_task_vectors("DisTaC").clone()
    factors = _factors(packed, norm)
    held = Calibration(calibration, packed.tasks, shuffle=True, seed=config.seed)
    wide = torch.promote_types(packed.base.dtype, torch.float32)
    model = MergedModel(module, packed, 0.0, dtype=wide)
    teachers = teacher_logits(model, held, logits, "fp32")
    for row, (task, factor) in enumerate(zip(packed.tasks, factors, strict=True)):
        with model.teacher(task), torch.enable_grad():  # whose buffers and head stay while its weights are the student's
            model.merge(packed.one_hot(task) * factor)
            _distil(model, held, teachers[task], logits, task, config)
            assert model.merged is not None
            task_vectors[row] = model.merged - packed.base
    return replace(packed, task_vectors=task_vectors, experts=experts_of(packed))


def _distil(
    model: MergedModel, calibration: Calibration, teachers: list[Tensor], logits: Logits, task: str, config: DisTaCConfig
) -> None:
    """Trains the weights that are merged now."""
    trained = [parameter for parameter in model.module.parameters() if parameter.requires_grad]
    start = [parameter.detach().clone() for parameter in trained]
    student_temperature, expert_temperature = config.student_temperature, config.expert_temperature

    def loss_at(step: int) -> Tensor:
        index = calibration.at(step)[task]
        batch = to_device(calibration.batches[task][index], model.device)
        divergence = softmax_kl(
            call_logits(logits, model.module, batch, task),
            teachers[index],
            student_temperature=student_temperature,
            teacher_temperature=expert_temperature,
        )
        way = torch.stack([(now - then).square().sum() for now, then in zip(trained, start, strict=True)]).sum()
        return student_temperature * expert_temperature * divergence + config.penalty * way

    steps = config.steps or config.epochs * calibration.steps_per_epoch
    descend(trained, loss_at, steps, config, f"distac '{task}'")


def _factors(packed: PackedWeights, norm: float | str) -> list[float]:
    """κ_t of every task. Raises ValueError for a norm that is none, and a task vector that cannot be scaled."""
    squares = _squares(packed.exact_task_vectors("DisTaC"))
    smallest = shortening(squares, packed.tasks)
    if norm == "smallest":
        return smallest
    if norm == "own":
        return [1.0] * packed.num_tasks
    if isinstance(norm, str) or not 0 < norm < torch.inf:
        raise ValueError(f"norm={norm!r}; give 'smallest', 'own' or a positive number")
    return [norm / square**0.5 for square in squares]


def align_norms(packed: PackedWeights) -> PackedWeights:
    """The same base with every τ_t shortened to the smallest ‖τ_t‖: a long one would outvote the others.

    It needs no data: `distac` has the distillation that the paper lets follow. Raises ValueError where a task vector is zero,
    NaN or Inf, or quantised.
    """
    stored = packed.exact_task_vectors("aligning norms")
    task_vectors = stored.clone()
    for row, factor in zip(task_vectors, shortening(_squares(stored), packed.tasks), strict=True):
        row.mul_(factor)
    return replace(packed, task_vectors=task_vectors)


def shortening(squares: Sequence[float], tasks: Sequence[str]) -> list[float]:
    """The factor of every task vector, from the squares of their norms; fp32 numbers."""
    for square, task in zip(squares, tasks, strict=True):
        if not 0 < square < torch.inf:
            raise ValueError(f"the task vector of '{task}' has the norm {square**0.5:g}; it cannot be aligned, leave it out")
    return torch.tensor([(min(squares) / square) ** 0.5 for square in squares], dtype=torch.float32).tolist()


def _squares(task_vectors: Tensor) -> list[float]:  # [T, N] -> [T]
    return [sum(float(piece.double().square().sum()) for piece in row.split(1 << 20)) for row in task_vectors]
