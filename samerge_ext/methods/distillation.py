"""Experts of another architecture: distilled into the target architecture first, then merged like any other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from samerge_ext.learning.calibration import Calibration
from samerge_ext.learning.config import check_least, check_settings, check_share
from samerge_ext.learning.nested import to_device
from samerge_ext.ops.softmax_kl import softmax_kl

# The forward of one of the two models: (module, batch) -> logits [B, V].
Forward = Callable[[nn.Module, Any], Tensor]
Target = TypeVar("Target", bound=nn.Module)
WARM_UP = 0.1  # of the steps, in which the learning rate rises from 0; then it falls back to 0


@dataclass(frozen=True, kw_only=True)
class DescentConfig:
    """How a model's weights are trained.

    steps: of one batch each; otherwise ``epochs`` over the data.
    learning_rate, weight_decay: AdamW's; the rate rises to it over a tenth of the steps, then falls linearly to 0.
    gradient_norm: gradients longer than this are scaled down to it.
    seed: of the order of the batches, new in every epoch, and of the student's dropout.
    """

    steps: int | None = None
    epochs: int = 3
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    gradient_norm: float = 1.0
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        check_settings(self)
        check_least(self, 0, "gradient_norm", above=True)
        check_least(self, 0, "learning_rate", "weight_decay")
        check_least(self, 1, "steps", "epochs")


@dataclass(frozen=True, kw_only=True)
class DistillationConfig(DescentConfig):
    """How an expert is distilled: DescentConfig, and:

    temperature: τ of the KL divergence. label_share: a, the share of the cross-entropy in the loss.
    """

    temperature: float = 4.0
    label_share: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 0, "temperature", above=True)
        check_share(self, "label_share")


def distill_expert(
    teacher: nn.Module,
    target: Target,
    data: Iterable[Any],
    teacher_logits: Forward,
    student_logits: Forward,
    *,
    labels: Iterable[Tensor] | None = None,
    config: DistillationConfig | None = None,
) -> Target:
    """Trains ``target``, which starts as the base of a merge, to be the expert that ``teacher`` is (arXiv 2506.04567).

        L = a · cross-entropy(y, z) + (1 − a) · τ² · KL(softmax(z_teacher/τ) ‖ softmax(z/τ))

    The two need share nothing but the task's classes.

    teacher: any module; runs in eval mode, once over the data, and is left as it was.
    target: of the experts' architecture, with the base's weights; trained in place, in the mode (train or eval) it comes in.
        Parameters that do not require a gradient stay as they are.
    data: batches that both functions take: pairs, or dicts, where the two models read different inputs.
    teacher_logits, student_logits: (module, batch) -> [B, V], over the same V classes.
    labels: [B] int64 of every batch; without them y is the teacher's most likely class.

    Returns ``target``. Equal seeds give equal weights.
    Raises ValueError, before any training, for data, labels or logits that do not fit; FloatingPointError where the teacher's
    logits or the loss are not finite.
    """
    config = config or DistillationConfig()
    batches = list(data)
    if not batches:
        raise ValueError("there is no data to distil on; pass at least one batch")
    if teacher is target:
        raise ValueError("teacher and target are one module; pass a target of its own with the base's weights")
    trained = [parameter for parameter in target.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("no parameter of the target requires a gradient; call target.requires_grad_(True)")
    device = trained[0].device
    with _evaluated(teacher) as from_device:
        teachers = [teacher_logits(teacher, to_device(batch, from_device)) for batch in batches]
    _check_teachers(teachers)
    teachers = [logits.to(device) for logits in teachers]
    truths = _labels(labels, teachers)
    with _evaluated(target):
        _check_student(student_logits(target, to_device(batches[0], device)), teachers[0])

    order = Calibration({"expert": batches}, ("expert",), shuffle=True, seed=config.seed)

    def loss_at(step: int) -> Tensor:
        index = order.at(step)["expert"]
        student = student_logits(target, to_device(batches[index], device))
        return distillation_loss(student, teachers[index], truths[index], config)

    descend(trained, loss_at, config.steps or config.epochs * len(batches), config, "distill")
    return target


def descend(
    trained: Sequence[nn.Parameter], loss_at: Callable[[int], Tensor], steps: int, config: DescentConfig, label: str
) -> None:
    """So many steps down the gradients of ``loss_at(step)``, whose random numbers are of the seed whatever torch's state is.

    Leaves no gradients. Raises FloatingPointError where a loss is not finite.
    """
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_share(step, steps))
    devices = [trained[0].device] if trained[0].device.type == "cuda" else []
    with torch.random.fork_rng(devices), tqdm(total=steps, desc=label, disable=not config.progress, unit="step") as bar:
        torch.manual_seed(config.seed)
        for step in range(steps):
            loss = loss_at(step)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"{label}: the loss is {loss.item()} at step {step}; try a smaller learning_rate")
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, config.gradient_norm)
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
            bar.update()
    optimizer.zero_grad()


def distillation_loss(student: Tensor, teacher: Tensor, labels: Tensor, config: DistillationConfig) -> Tensor:
    """L of logits [B, V] and labels [B], differentiable in the student's."""
    tau, share = config.temperature, config.label_share
    divergence = softmax_kl(student, teacher, student_temperature=tau, teacher_temperature=tau)
    return share * cross_entropy(student, labels) + (1 - share) * tau**2 * divergence


def _learning_rate_share(step: int, steps: int) -> float:
    warm_up = max(1, round(WARM_UP * steps))
    return min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))


@contextmanager
def _evaluated(module: nn.Module) -> Iterator[torch.device]:
    """The module in eval mode and without gradients, as it was afterwards; gives its device."""
    parameter = next(module.parameters(), None)
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield torch.device("cpu") if parameter is None else parameter.device
    finally:
        for part, training in modes.items():
            part.training = training


def _check_teachers(teachers: Sequence[Any]) -> None:
    for index, logits in enumerate(teachers):
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            raise ValueError(f"teacher_logits gives {_what(logits)} for batch {index}; expected a tensor [batch, classes]")
        if not torch.isfinite(logits).all():
            raise FloatingPointError(f"the teacher's logits of batch {index} hold NaN or Inf")


def _labels(labels: Iterable[Tensor] | None, teachers: list[Tensor]) -> list[Tensor]:
    """[B] int64 per batch, on the teachers' device: those given, or the teacher's most likely classes."""
    if labels is None:
        return [logits.argmax(-1) for logits in teachers]
    labels = list(labels)
    if len(labels) != len(teachers):
        raise ValueError(f"there are labels of {len(labels)} batches and {len(teachers)} batches; give one tensor per batch")
    for index, (given, logits) in enumerate(zip(labels, teachers, strict=True)):
        rows, classes = logits.shape
        if given.dtype != torch.int64 or list(given.shape) != [rows]:
            raise ValueError(f"labels of batch {index} are {given.dtype} {list(given.shape)}; expected int64 [{rows}]")
        if rows and not (0 <= given.min() and given.max() < classes):
            span = f"from {given.min()} to {given.max()}"
            raise ValueError(f"labels of batch {index} run {span}; the teacher has {classes} classes")
    return [given.to(teachers[0].device) for given in labels]


def _check_student(logits: Any, teacher: Tensor) -> None:
    if not isinstance(logits, Tensor) or logits.shape != teacher.shape:
        raise ValueError(
            f"student_logits gives {_what(logits)} for batch 0, teacher_logits {list(teacher.shape)}; both must be "
            "[batch, classes]"
        )


def _what(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
