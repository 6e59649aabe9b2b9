"""Losses between rows of raw logits, with their gradient from the same call.

With p_k = softmax(teacher[k, r] / teacher_temperature), q = softmax(student[r] / student_temperature), a row's loss is

    softmax_kl              Σ_k v[k, r] · D_β(p_k, q)           (arXiv 2512.21288 with β = 0; no τ² factor)
    argmax_cross_entropy    Σ_k v[k, r] · −log q[argmax p_k]    (arXiv 2506.04567)
    entropy                 H(q)                                (arXiv 2310.02575)

where D_0 is KL(p ‖ q), D_1 is KL(q ‖ p), and any other D_β, with m = β p + (1 − β) q, is the generalised Jensen–Shannon
divergence β KL(p ‖ m) + (1 − β) KL(q ‖ m) (arXiv 2306.13649, equation 1): D_0 is the limit of D_β / β and D_1 that of
D_β / (1 − β). The reductions are Σ_r w_r · loss_r / R ("batchmean"), Σ_r w_r · loss_r ("sum") and w_r · loss_r ("none").
"""

from typing import Any, NoReturn

import torch

from .. import backend
from ._common import accumulator, check_devices, check_dtypes, define, library, shape
from .loss_arguments import check_row_weights, check_settings, of_every_row

_ARGUMENTS = "Tensor student, Tensor? teacher, Tensor? teacher_weights, Tensor? num_classes"
_SETTINGS = "str loss, float student_temperature, float teacher_temperature, float beta"
define(f"softmax_kl({_ARGUMENTS}, {_SETTINGS}) -> Tensor")
define(f"softmax_kl_grad({_ARGUMENTS}, Tensor row_scale, {_SETTINGS}) -> (Tensor, Tensor)")
define(f"softmax_kl_grad_out({_ARGUMENTS}, Tensor row_scale, Tensor(a!) out, {_SETTINGS}) -> Tensor")


def softmax_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    student_temperature: float = 2.0,
    teacher_temperature: float = 2.0,
    beta: float = 0.0,
    row_weights: torch.Tensor | None = None,
    teacher_weights: torch.Tensor | None = None,
    num_classes: torch.Tensor | None = None,
    reduction: str = "batchmean",
) -> torch.Tensor:
    """Divergence of the student from its teachers: Σ_r w_r Σ_k v_kr KL(p_kr ‖ q_r) / R, or by `beta` the reverse or between them.

    Differentiable in `student` and `row_weights`; teachers are constants. Computed from log-sum-exp, in fp32 or wider:
    logits of any finite size are fine, and so is −inf for a class that does not exist. With labels that are −100 where a row is
    not to count, give `student[labels != -100]` and the teachers' rows likewise.

    Args:
        student: [R, V] logits; fp32, bf16 or fp16, or fp64 with fp64 teachers.
        teacher: [R, V] or [K, R, V] logits, their dtype independent of the student's.
        student_temperature, teacher_temperature: positive; logits are divided by them.
        beta: 0 for KL(p ‖ q); 1 for the reverse, KL(q ‖ p), which is infinite where a teacher lacks a class that the student has;
            between them for the generalised Jensen–Shannon divergence, β KL(p ‖ m) + (1 − β) KL(q ‖ m) with m = β p + (1 − β) q,
            which is at most log 2, and small where β is nearly 0 or 1. It is what TRL's GKD calls `beta`; its `temperature` is
            both temperatures here, and puts no factor before the loss there either.
        row_weights: [R] w, 1 by default.
        teacher_weights: [K] or [K, R] v, 1/K by default; a constant.
        num_classes: [R] int64 in 1 … V: only the first classes of a row count, the others get gradient 0. Rows of
            tasks with different numbers of classes can so share one padded matrix; what the padding holds is ignored.
        reduction: "batchmean", "sum" or "none". Of zero rows, the first two are 0.

    Returns:
        A scalar, or [R] for "none"; fp32 (fp64 for an fp64 student).

    Raises:
        ValueError, TypeError: a shape, dtype, device or setting does not fit, or a teacher requires grad.
    """
    options = (student_temperature, teacher_temperature, row_weights, teacher_weights, num_classes, reduction)
    return _loss("kl", student, teacher, *options, beta)


def softmax_kl_with_grad(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    student_temperature: float = 2.0,
    teacher_temperature: float = 2.0,
    beta: float = 0.0,
    row_weights: torch.Tensor | None = None,
    teacher_weights: torch.Tensor | None = None,
    num_classes: torch.Tensor | None = None,
    reduction: str = "batchmean",
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`softmax_kl` and its gradient by the student's logits in one call, outside autograd.

    Arguments and errors are those of `softmax_kl`. Continue with `student.backward(grad)`.
    out: [R, V], of the student's dtype, contiguous: the gradient is written there. It may be the student's logits themselves, and
        may not share memory with them otherwise.

    Returns:
        The loss, and its gradient [R, V] in the student's dtype; for "none", row r is the gradient of loss r.
    """
    options = (student_temperature, teacher_temperature, row_weights, teacher_weights, num_classes, reduction, out)
    return _loss_with_grad("kl", student, teacher, *options, beta)


def argmax_cross_entropy(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    student_temperature: float = 1.0,
    row_weights: torch.Tensor | None = None,
    teacher_weights: torch.Tensor | None = None,
    num_classes: torch.Tensor | None = None,
    reduction: str = "batchmean",
) -> torch.Tensor:
    """Cross-entropy of the student against its teachers' most likely classes, Σ_r w_r Σ_k v_kr (−log q_r[argmax p_kr]) / R.

    Arguments, result and errors are those of `softmax_kl`; of equal largest teacher logits the first counts.
    """
    options = (student_temperature, 1.0, row_weights, teacher_weights, num_classes, reduction)
    return _loss("cross_entropy", student, teacher, *options)


def argmax_cross_entropy_with_grad(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    student_temperature: float = 1.0,
    row_weights: torch.Tensor | None = None,
    teacher_weights: torch.Tensor | None = None,
    num_classes: torch.Tensor | None = None,
    reduction: str = "batchmean",
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`argmax_cross_entropy` and its gradient [R, V] in one call, outside autograd; as `softmax_kl_with_grad`, but `out` may not
    be the student's logits."""
    options = (student_temperature, 1.0, row_weights, teacher_weights, num_classes, reduction, out)
    return _loss_with_grad("cross_entropy", student, teacher, *options)


def entropy(
    student: torch.Tensor,
    *,
    temperature: float = 1.0,
    row_weights: torch.Tensor | None = None,
    num_classes: torch.Tensor | None = None,
    reduction: str = "batchmean",
) -> torch.Tensor:
    """Entropy of the student's rows in nats, Σ_r w_r H(q_r) / R; arguments and errors are those of `softmax_kl`."""
    return _loss("entropy", student, None, temperature, 1.0, row_weights, None, num_classes, reduction)


def entropy_with_grad(
    student: torch.Tensor,
    *,
    temperature: float = 1.0,
    row_weights: torch.Tensor | None = None,
    num_classes: torch.Tensor | None = None,
    reduction: str = "batchmean",
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`entropy` and its gradient [R, V] in one call, outside autograd; as `softmax_kl_with_grad`."""
    return _loss_with_grad("entropy", student, None, temperature, 1.0, row_weights, None, num_classes, reduction, out)


def _loss(
    loss: str,
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
    row_weights: torch.Tensor | None,
    teacher_weights: torch.Tensor | None,
    num_classes: torch.Tensor | None,
    reduction: str,
    beta: float = 0.0,
) -> torch.Tensor:
    teacher, teacher_weights = _check(
        student, teacher, student_temperature, teacher_temperature, row_weights, teacher_weights, num_classes, reduction, beta
    )
    losses = torch.ops.samerge.softmax_kl(
        student, teacher, teacher_weights, num_classes, loss, student_temperature, teacher_temperature, beta
    )
    return _reduce(losses, row_weights, reduction)


def _loss_with_grad(
    loss: str,
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
    row_weights: torch.Tensor | None,
    teacher_weights: torch.Tensor | None,
    num_classes: torch.Tensor | None,
    reduction: str,
    out: torch.Tensor | None,
    beta: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    teacher, teacher_weights = _check(
        student, teacher, student_temperature, teacher_temperature, row_weights, teacher_weights, num_classes, reduction, beta
    )
    _check_out(out, student)
    rows = student.shape[0]
    scale = 1 / max(rows, 1) if reduction == "batchmean" else 1.0
    if row_weights is None:
        row_scale = student.new_full((rows,), scale, dtype=accumulator(student))
    else:
        row_weights = row_weights.detach()
        row_scale = row_weights * scale
    inputs = (student.detach(), teacher, teacher_weights, num_classes, row_scale)
    settings = (loss, student_temperature, teacher_temperature, beta)
    # On small inputs the dispatcher would cost as much as the kernel; it is there for tensors that only stand for others.
    if type(student) in (torch.Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling():
        losses, grad = backend.kernel("softmax_kl", student)(*inputs, out, *settings)
    elif out is None:
        losses, grad = torch.ops.samerge.softmax_kl_grad(*inputs, *settings)
    else:
        losses, grad = torch.ops.samerge.softmax_kl_grad_out(*inputs, out, *settings), out
    if reduction == "none":
        return losses if row_weights is None else losses * row_weights, grad
    return losses.dot(row_scale), grad


def _check_out(out: torch.Tensor | None, student: torch.Tensor) -> None:
    if out is None:
        return
    if out.shape != student.shape or out.dtype != student.dtype or not out.is_contiguous():
        raise ValueError(
            f"out has shape {shape(out)}, stride {out.stride()} and dtype {out.dtype}; it must be contiguous, "
            f"{shape(student)} and {student.dtype} as the student is"
        )
    if out.requires_grad:
        raise ValueError("out requires grad, but a gradient is written into it outside of autograd; pass out.detach()")
    check_devices(student=student, out=out)


def _reduce(losses: torch.Tensor, row_weights: torch.Tensor | None, reduction: str) -> torch.Tensor:  # [R], [R]
    if row_weights is not None:
        losses = losses * row_weights
    if reduction == "none":
        return losses
    total = losses.sum()
    return total / max(losses.shape[0], 1) if reduction == "batchmean" else total


def _check(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
    row_weights: torch.Tensor | None,
    teacher_weights: torch.Tensor | None,
    num_classes: torch.Tensor | None,
    reduction: str,
    beta: float = 0.0,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Raises on the first argument that does not fit; returns the teachers as [K, R, V] and their weights as [K, R]."""
    check_settings(reduction, student_temperature, teacher_temperature, beta)
    if student.dim() != 2 or student.shape[1] == 0:
        raise ValueError(f"student has shape {shape(student)}; it must be [R, V] with at least one class")
    rows, classes = student.shape
    if teacher is None:
        check_dtypes(student=student)
    else:
        if teacher.dim() == 2:
            teacher = teacher.unsqueeze(0)
        if teacher.dim() != 3 or teacher.shape[0] == 0 or teacher.shape[1:] != student.shape:
            raise ValueError(
                f"teacher has shape {shape(teacher)}; with student of {shape(student)} it must be [{rows}, {classes}] or "
                f"[K, {rows}, {classes}]"
            )
        check_dtypes(student=student, teacher=teacher)
        if teacher.requires_grad:
            raise ValueError("teacher requires grad, but teachers are constants here; pass teacher.detach()")
    check_row_weights(row_weights, student=student)
    if teacher is not None:
        teacher_weights = of_every_row(teacher_weights, len(teacher), student=student)
    if num_classes is not None:
        if num_classes.dtype != torch.int64:
            raise TypeError(f"num_classes is {num_classes.dtype}; it must be int64")
        if list(num_classes.shape) != [rows]:
            raise ValueError(f"num_classes has shape {shape(num_classes)}; with student of {shape(student)} it must be [{rows}]")
        check_devices(student=student, num_classes=num_classes)
    return teacher, teacher_weights


def _forward(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    teacher_weights: torch.Tensor | None,
    num_classes: torch.Tensor | None,
    *settings: str | float,
) -> torch.Tensor:
    kernel = backend.kernel("softmax_kl", student)
    return kernel(student, teacher, teacher_weights, num_classes, None, None, *settings)[0]


def _forward_grad(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    teacher_weights: torch.Tensor | None,
    num_classes: torch.Tensor | None,
    row_scale: torch.Tensor,
    *settings: str | float,
) -> tuple[torch.Tensor, torch.Tensor]:
    kernel = backend.kernel("softmax_kl", student)
    return kernel(student, teacher, teacher_weights, num_classes, row_scale, None, *settings)


def _forward_grad_out(student: torch.Tensor, *args: Any) -> torch.Tensor:
    return backend.kernel("softmax_kl", student)(student, *args)[0]


def _fake(student: torch.Tensor, *_: Any) -> torch.Tensor:
    return student.new_empty(student.shape[0], dtype=accumulator(student))


def _fake_grad(student: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _fake(student), student.new_empty(student.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.settings = inputs[4:]


def _backward(ctx: Any, row_scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # [R]
    _, grad = torch.ops.samerge.softmax_kl_grad(*ctx.saved_tensors, row_scale, *ctx.settings)
    return grad, None, None, None, None, None, None, None


def _no_second_derivative(ctx: Any, *_: Any) -> NoReturn:
    raise RuntimeError("softmax_kl, entropy and argmax_cross_entropy have no second derivative")


library.impl("softmax_kl", _forward, "CompositeExplicitAutograd")
library.impl("softmax_kl_grad", _forward_grad, "CompositeExplicitAutograd")
library.impl("softmax_kl_grad_out", _forward_grad_out, "CompositeExplicitAutograd")
torch.library.register_fake("samerge::softmax_kl", _fake, lib=library)
torch.library.register_fake("samerge::softmax_kl_grad", _fake_grad, lib=library)
torch.library.register_fake("samerge::softmax_kl_grad_out", _fake, lib=library)
torch.library.register_autograd("samerge::softmax_kl", _backward, setup_context=_setup_context, lib=library)
torch.library.register_autograd("samerge::softmax_kl_grad", _no_second_derivative, lib=library)
