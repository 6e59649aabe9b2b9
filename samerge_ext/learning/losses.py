"""The losses that are learned by, of logits or of what they are the product of, with their gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from samerge_ext.learning.language_model import OfExpert, Projected, Weight
from samerge_ext.learning.nested import map_tensors
from samerge_ext.merged.streamed_rows import StreamedRows
from samerge_ext.ops.linear_arguments import Teachers, reduced_scale
from samerge_ext.ops.linear_softmax_kl import linear_entropy, linear_loss_with_grad, linear_softmax_kl
from samerge_ext.ops.merged_linear_softmax_kl import WholeHead, losses_by_slab
from samerge_ext.ops.most_likely_kl import MostLikely, linear_most_likely_kl_with_grad, most_likely_kl_with_grad
from samerge_ext.ops.softmax_kl import (
    argmax_cross_entropy_with_grad,
    entropy,
    entropy_with_grad,
    softmax_kl,
    softmax_kl_with_grad,
)

# What the model gives to a batch, and its expert: logits [R, V], or the hidden states and the head that would make them; of the
# expert, too, no more than what is most likely.
Answers = Tensor | Projected
ExpertAnswers = Tensor | OfExpert | MostLikely
# By logits; or by the parts of a `Projected`, None by what needs none.
Gradient = Tensor | list[Tensor | None]


class Divergence(NamedTuple):
    """Which divergence of the student from its teacher is meant, in the words of `softmax_kl`."""

    student_temperature: float = 1.0
    teacher_temperature: float = 1.0
    beta: float = 0.0


def distillation(
    student: Answers, teacher: ExpertAnswers, divergence: Divergence, row_weights: Tensor | None
) -> tuple[Tensor, Gradient]:
    """The mean over rows of the student's divergence from its teacher, weighted by ``row_weights`` [R], and its gradient by the
    student's answers."""
    if isinstance(teacher, MostLikely):
        return _towards_most_likely(student, teacher, divergence.student_temperature, row_weights)
    if isinstance(student, Projected):
        return _projected("kl", student, teacher, divergence, row_weights)
    return softmax_kl_with_grad(student, _logits(teacher), **divergence._asdict(), row_weights=row_weights)


def divergence_from(teacher: ExpertAnswers, student: Answers, divergence: Divergence) -> Tensor:
    """`distillation`'s loss, differentiable: where the weights of the whole module are learned. Of a streamed model it is not."""
    if isinstance(student, Tensor):
        return softmax_kl(student, _logits(teacher), **divergence._asdict())
    assert isinstance(student.weight, Tensor)
    hidden, head, bias = _projected_of(teacher)
    return linear_softmax_kl(
        student.hidden,
        student.weight,
        hidden,
        _whole(head),
        bias=student.bias,
        teacher_bias=bias,
        **divergence._asdict(),
    )


def imitation(student: Answers, teacher: ExpertAnswers, row_weights: Tensor | None) -> tuple[Tensor, Gradient]:
    """The mean cross-entropy with the teacher's most likely class, and its gradient, likewise."""
    if isinstance(student, Projected):
        return _projected("cross_entropy", student, teacher, Divergence(), row_weights)
    return argmax_cross_entropy_with_grad(student, _logits(teacher), row_weights=row_weights)


def uncertainty(student: Answers) -> tuple[Tensor, Gradient]:
    """The mean entropy, and its gradient."""
    if isinstance(student, Projected):
        return _projected("entropy", student, None, Divergence(), None)
    return entropy_with_grad(student)


def number_of_rows(answers: Answers | ExpertAnswers) -> int:
    """R of answers."""
    if isinstance(answers, MostLikely):
        return len(answers.log_rest)
    return len(answers if isinstance(answers, Tensor) else answers.hidden)


def entropies(answers: Answers) -> Tensor:
    """The entropy of every row [R]."""
    if isinstance(answers, Projected):
        return linear_entropy(answers.hidden, _whole(answers.weight), bias=answers.bias, reduction="none")
    return entropy(answers, reduction="none")


def scaled(gradient: Gradient, by: float | Tensor) -> Gradient:
    """In place."""
    return map_tensors(lambda tensor: tensor.mul_(by), gradient)


def _projected(
    loss: str, student: Projected, teacher: ExpertAnswers | None, divergence: Divergence, row_weights: Tensor | None
) -> tuple[Tensor, Gradient]:
    taught = None if teacher is None else _projected_of(teacher)
    hidden, weight, bias = student
    if loss == "kl" and taught is not None and not isinstance(weight, Tensor):
        return _by_slab(student, weight, taught, divergence, row_weights)
    whole = weight if isinstance(weight, Tensor) else weight.whole().requires_grad_()
    options = (_teachers(taught), divergence[:2], row_weights, divergence.beta)
    value, gradient = linear_loss_with_grad(loss, hidden, whole, bias, *options)
    return value, _contracted(gradient, weight)


def _by_slab(
    student: Projected, weight: StreamedRows, teacher: Projected, divergence: Divergence, row_weights: Tensor | None
) -> tuple[Tensor, Gradient]:
    scale = reduced_scale(student.hidden, row_weights, None, "batchmean")
    head = WholeHead(teacher.weight) if isinstance(teacher.weight, Tensor) else teacher.weight
    biases = [] if teacher.bias is None else [teacher.bias]
    with torch.no_grad():
        once = torch.ones_like(scale)[None]
        arguments = (student.hidden, weight, student.bias, [teacher.hidden], [head], biases, once, scale)
        losses, *gradient = losses_by_slab(*arguments, *divergence, None)
    return losses.dot(scale), gradient


def _towards_most_likely(
    student: Answers, teacher: MostLikely, temperature: float, row_weights: Tensor | None
) -> tuple[Tensor, Gradient]:
    if isinstance(student, Tensor):
        return most_likely_kl_with_grad(student, teacher, temperature, reduced_scale(student, row_weights, None, "batchmean"))
    hidden, weight, bias = student
    whole = weight if isinstance(weight, Tensor) else weight.whole().requires_grad_()
    scale = reduced_scale(hidden, row_weights, None, "batchmean")
    value, gradient = linear_most_likely_kl_with_grad(hidden, whole, bias, teacher, temperature, scale)
    return value, _contracted(gradient, weight)


def _contracted(gradient: list[Tensor | None], weight: Weight) -> list[Tensor | None]:
    """Of a head that was merged for it as a whole, the gradient by its coefficients in place of that by its weight."""
    if gradient[1] is not None and not isinstance(weight, Tensor):
        gradient[1] = weight.contracted(gradient[1])
    return gradient


def most_likely(answers: Answers, k: int, temperature: float) -> MostLikely:
    """The k most likely classes of every row of the soft-max of a teacher's answers, and the mass of the rest."""
    if isinstance(answers, Tensor):
        return MostLikely.of(answers, k, temperature)
    return MostLikely.of_linear(answers.hidden, _whole(answers.weight), answers.bias, k, temperature)


def _teachers(teacher: Projected | None) -> Teachers:
    if teacher is None:
        return Teachers([], [], [])
    return Teachers([teacher.hidden], [_whole(teacher.weight)], [] if teacher.bias is None else [teacher.bias])


def _whole(weight: Weight) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight.whole()


def _projected_of(teacher: ExpertAnswers) -> Projected:
    assert isinstance(teacher, OfExpert)  # both or neither come from hidden states
    return teacher.projected()


def _logits(teacher: ExpertAnswers) -> Tensor:
    assert isinstance(teacher, Tensor)
    return teacher
