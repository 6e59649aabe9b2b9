"""The losses that are learned by, of logits or of what they are the product of, with their gradients."""

from __future__ import annotations

from torch import Tensor

from samerge_ext.learning.language_model import OfExpert, Projected
from samerge_ext.learning.nested import map_tensors
from samerge_ext.ops.linear_arguments import Teachers
from samerge_ext.ops.linear_softmax_kl import linear_entropy, linear_loss_with_grad
from samerge_ext.ops.softmax_kl import argmax_cross_entropy_with_grad, entropy, entropy_with_grad, softmax_kl_with_grad

# What the model gives to a batch, and its expert: logits [R, V], or the hidden states and the head that would make them.
Answers = Tensor | Projected
ExpertAnswers = Tensor | OfExpert
# By logits; or by hidden states, weight and bias, None by what needs none.
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


def entropies(answers: Answers) -> Tensor:
    """The entropy of every row [R]."""
    if isinstance(answers, Projected):
        return linear_entropy(answers.hidden, answers.weight, bias=answers.bias, reduction="none")
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
    teachers = Teachers([], [], [])
    if teacher is not None:
        assert isinstance(teacher, OfExpert)  # both or neither come from hidden states
        hidden, weight, bias = teacher.projected()
        teachers = Teachers([hidden], [weight], [] if bias is None else [bias])
    return linear_loss_with_grad(loss, *student, teachers, temperatures, row_weights)


def _logits(teacher: ExpertAnswers) -> Tensor:
    assert isinstance(teacher, Tensor)
    return teacher
