"""The losses that are learned by, of logits or of what they are the product of, with their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from samerge_ext.learning.language_model import OfExpert, Projected, Weight
from samerge_ext.learning.nested import map_tensors
from samerge_ext.merged.streamed import StreamedRows
from samerge_ext.ops.linear_arguments import Teachers, reduced_scale
from samerge_ext.ops.linear_softmax_kl import linear_entropy, linear_loss_with_grad
from samerge_ext.ops.merged_linear_softmax_kl import WholeHead, losses_by_slab
from samerge_ext.ops.softmax_kl import argmax_cross_entropy_with_grad, entropy, entropy_with_grad, softmax_kl_with_grad

# What the model gives to a batch, and its expert: logits [R, V], or the hidden states and the head that would make them.
Answers = Tensor | Projected
ExpertAnswers = Tensor | OfExpert
# By logits; or by the parts of a `Projected`, None by what needs none.
Gradient = Tensor | list[Tensor | None]


def distillation(
    student: Answers, teacher: ExpertAnswers, student_temperature: float, teacher_temperature: float, row_weights: Tensor | None
) -> tuple[Tensor, Gradient]:
    """The mean over rows of KL(teacher ‖ student), weighted by ``row_weights`` [R], and its gradient by the student's answers."""
    temperatures = (student_temperature, teacher_temperature)
    if isinstance(student, Projected):
        return _projected("kl", student, teacher, temperatures, row_weights)
    return softmax_kl_with_grad(
        student,
        _logits(teacher),
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
        row_weights=row_weights,
    )


def imitation(student: Answers, teacher: ExpertAnswers, row_weights: Tensor | None) -> tuple[Tensor, Gradient]:
    """The mean cross-entropy with the teacher's most likely class, and its gradient, likewise."""
    if isinstance(student, Projected):
        return _projected("cross_entropy", student, teacher, (1.0, 1.0), row_weights)
    return argmax_cross_entropy_with_grad(student, _logits(teacher), row_weights=row_weights)


def uncertainty(student: Answers) -> tuple[Tensor, Gradient]:
    """The mean entropy, and its gradient."""
    if isinstance(student, Projected):
        return _projected("entropy", student, None, (1.0, 1.0), None)
    return entropy_with_grad(student)


def number_of_rows(answers: Answers | OfExpert) -> int:
    """R of answers."""
    return len(answers if isinstance(answers, Tensor) else answers.hidden)


def entropies(answers: Answers) -> Tensor:
    """The entropy of every row [R]."""
    if isinstance(answers, Projected):
        return linear_entropy(answers.hidden, _whole(answers.weight), bias=answers.bias, reduction="none")
    return entropy(answers, reduction="none")


def scaled(gradient: Gradient, by: float) -> Gradient:
    """In place."""
    return map_tensors(lambda tensor: tensor.mul_(by), gradient)


def _projected(
    loss: str,
    student: Projected,
    teacher: ExpertAnswers | None,
    temperatures: tuple[float, float],
    row_weights: Tensor | None,
) -> tuple[Tensor, Gradient]:
    taught = None if teacher is None else _projected_of(teacher)
    hidden, weight, bias = student
    if isinstance(weight, Tensor):
        return linear_loss_with_grad(loss, hidden, weight, bias, _teachers(taught), temperatures, row_weights)
    if loss == "kl" and taught is not None:
        return _by_slab(student, weight, taught, temperatures, row_weights)
    whole = weight.whole().requires_grad_()
    value, gradient = linear_loss_with_grad(loss, hidden, whole, bias, _teachers(taught), temperatures, row_weights)
    if gradient[1] is not None:
        gradient[1] = weight.contracted(gradient[1])
    return value, gradient


def _by_slab(
    student: Projected, weight: StreamedRows, teacher: Projected, temperatures: tuple[float, float], row_weights: Tensor | None
) -> tuple[Tensor, Gradient]:
    scale = reduced_scale(student.hidden, row_weights, None, "batchmean")
    head = WholeHead(teacher.weight) if isinstance(teacher.weight, Tensor) else teacher.weight
    biases = [] if teacher.bias is None else [teacher.bias]
    with torch.no_grad():
        once = torch.ones_like(scale)[None]
        arguments = (student.hidden, weight, student.bias, [teacher.hidden], [head], biases, once, scale)
        losses, *gradient = losses_by_slab(*arguments, *temperatures, 0.0, None)
    return losses.dot(scale), gradient


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
