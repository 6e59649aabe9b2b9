"""Losses between rows of logits that never exist at once: from hidden states and heads, in chunks of rows.

With student[r] = head · hidden[r] + bias, teacher[k, r] = teacher_head[k] · teacher_hidden[k, r] + teacher_bias[k], the losses,
weights and temperatures are those of softmax_kl.py. A chunk's logits are computed into a workspace, softmax_kl replaces the
student's by their gradient, and products with the head and the hidden states make of it the gradients by both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ._common import accumulator, define, library
from .chunked_rows import losses_and_grads
from .linear_arguments import Teachers, check_linear, reduced_scale

_INPUTS = "Tensor hidden, Tensor head, Tensor? bias"
_TEACHERS = "Tensor[] teacher_hidden, Tensor[] teacher_head, Tensor[] teacher_bias, Tensor? teacher_weights, Tensor? mask"
_SETTINGS = "str loss, float student_temperature, float teacher_temperature, float beta, int? workspace_bytes"
_ARGUMENTS = f"{_INPUTS}, {_TEACHERS}, Tensor row_scale"
define(f"linear_softmax_kl({_INPUTS}, {_TEACHERS}, {_SETTINGS}) -> Tensor")
define(
    f"linear_softmax_kl_sum({_ARGUMENTS}, {_SETTINGS}, bool[3] wanted) "
    "-> (Tensor total, Tensor losses, Tensor hidden_grad, Tensor head_grad, Tensor bias_grad)"
)
define("constant_times(Tensor constant, Tensor factor, Tensor of) -> Tensor")


def linear_softmax_kl(
    hidden: Tensor,
    head: Tensor,
    teacher_hidden: Tensor | Sequence[Tensor],
    teacher_head: Tensor | Sequence[Tensor] | None = None,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | Sequence[Tensor] | None = None,
    student_temperature: float = 2.0,
    teacher_temperature: float = 2.0,
    beta: float = 0.0,
    row_weights: Tensor | None = None,
    teacher_weights: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "batchmean",
    workspace_bytes: int | None = None,
) -> Tensor:
    """`softmax_kl` of hidden · headᵀ + bias from its teachers' logits, of which no more than a workspace exists at once.

    Differentiable in `hidden`, `head`, `bias` and `row_weights`; teachers are constants. Where a gradient is asked for it is
    computed with the loss, and each product is computed once; with "none" the backward computes all of them again. Logits are
    fp32 (fp64 for fp64 hidden states) whatever the storage: a CPU widens narrow heads, a slab at a time, and a GPU multiplies
    bf16 hidden states and heads on tensor cores, rounding the logits' gradient to bf16 for them.

    Args:
        hidden: [R, H] the student's last hidden states; fp32, bf16 or fp16, or fp64 with everything else in fp64.
        head: [V, H], its dtype independent of the hidden states'.
        teacher_hidden: [R, H_1] or [K, R, H_1], or a list of K of [R, H_k].
        teacher_head: [V, H_1] of all teachers, or a list of K of [V, H_k]; by default the student's, as a constant.
        bias: [V].
        teacher_bias: [V] of all teachers, or a list of K; by default the student's where `teacher_head` is, else none.
        student_temperature, teacher_temperature, beta: as of `softmax_kl`.
        row_weights: [R] w, 1 by default.
        teacher_weights: [K] or [K, R] v, 1/K by default; a constant.
        mask: [R] bool, the rows that count: `labels != -100` of labels that are −100 where a row is not to. Of the others
            nothing is computed, their loss is 0, and "batchmean" divides by the number of those that count.
        reduction: "batchmean", "sum" or "none". Of zero rows, the first two are 0.
        workspace_bytes: what may be allocated beside the results; as many rows are computed at a time as fit. By default 64 MiB,
            on a GPU 1 GiB, halved until it is no more than a quarter of the free memory. A gradient by a bf16 or fp16 head is
            summed in fp32 beside it.

    Returns:
        A scalar, or [R] for "none"; fp32 (fp64 for fp64 hidden states).

    Raises:
        ValueError, TypeError: a shape, dtype, device or setting does not fit, a teacher requires grad, or not one row fits into
            the workspace.
    """
    teachers = Teachers.of(head, bias, teacher_hidden, teacher_head, teacher_bias)
    settings = ("kl", student_temperature, teacher_temperature, beta, workspace_bytes)
    return _loss(hidden, head, bias, teachers, row_weights, teacher_weights, mask, reduction, settings)


def linear_argmax_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    teacher_hidden: Tensor | Sequence[Tensor],
    teacher_head: Tensor | Sequence[Tensor] | None = None,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | Sequence[Tensor] | None = None,
    student_temperature: float = 1.0,
    row_weights: Tensor | None = None,
    teacher_weights: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "batchmean",
    workspace_bytes: int | None = None,
) -> Tensor:
    """`argmax_cross_entropy` of hidden · headᵀ + bias; arguments, result and errors are those of `linear_softmax_kl`."""
    teachers = Teachers.of(head, bias, teacher_hidden, teacher_head, teacher_bias)
    settings = ("cross_entropy", student_temperature, 1.0, 0.0, workspace_bytes)
    return _loss(hidden, head, bias, teachers, row_weights, teacher_weights, mask, reduction, settings)


def linear_entropy(
    hidden: Tensor,
    head: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    row_weights: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "batchmean",
    workspace_bytes: int | None = None,
) -> Tensor:
    """`entropy` of hidden · headᵀ + bias; arguments, result and errors are those of `linear_softmax_kl`."""
    settings = ("entropy", temperature, 1.0, 0.0, workspace_bytes)
    return _loss(hidden, head, bias, Teachers([], [], []), row_weights, None, mask, reduction, settings)


def linear_loss_with_grad(
    loss: str,
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    teachers: Teachers,
    temperatures: tuple[float, float],
    row_weights: Tensor | None,
    beta: float = 0.0,
) -> tuple[Tensor, list[Tensor | None]]:
    """A loss, "kl", "cross_entropy" or "entropy", with reduction "batchmean", and its gradients by hidden, head and bias in one
    call; None by what requires none, and by all under no_grad. Nothing is allocated beside them and the workspace."""
    check_linear(hidden, head, bias, teachers, temperatures, row_weights, None, None, "batchmean", beta)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, head, bias)]
    with torch.no_grad():
        inputs = (hidden, head, bias, teachers.hidden, teachers.heads, teachers.biases, None, None)
        row_scale = reduced_scale(hidden, row_weights, None, "batchmean")
        found = torch.ops.samerge.linear_softmax_kl_sum(*inputs, row_scale, loss, *temperatures, beta, None, wanted)
    return found[0], [grad if wants else None for grad, wants in zip(found[2:], wanted, strict=True)]


def _loss(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    teachers: Teachers,
    row_weights: Tensor | None,
    teacher_weights: Tensor | None,
    mask: Tensor | None,
    reduction: str,
    settings: tuple[str, float, float, float, int | None],
) -> Tensor:
    options = (row_weights, teacher_weights, mask, reduction, settings[3])
    teacher_weights = check_linear(hidden, head, bias, teachers, settings[1:3], *options)
    inputs = (hidden, head, bias, teachers.hidden, teachers.heads, teachers.biases, teacher_weights, mask)
    if reduction == "none":
        losses = torch.ops.samerge.linear_softmax_kl(*inputs, *settings)
        return losses if row_weights is None else losses * row_weights
    row_scale = reduced_scale(hidden, row_weights, mask, reduction)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, head, bias)]
    return torch.ops.samerge.linear_softmax_kl_sum(*inputs, row_scale, *settings, wanted)[0]


def _forward(*arguments: Any) -> Tensor:
    without_scale = (*arguments[:8], None, *arguments[8:], (False, False, False))
    return losses_and_grads(*without_scale)[0]


def _forward_sum(*arguments: Any) -> tuple[Tensor, ...]:
    row_scale = arguments[8]
    losses, *grads = losses_and_grads(*arguments)
    return losses.dot(row_scale), losses, *grads


def _fake(hidden: Tensor, *_: Any) -> Tensor:
    return hidden.new_empty(len(hidden), dtype=accumulator(hidden))


def _fake_sum(hidden: Tensor, head: Tensor, bias: Tensor | None, *others: Any) -> tuple[Tensor, ...]:
    losses = _fake(hidden)
    inputs = (hidden, head, head if bias is None else bias)
    grads = (x.new_empty(x.shape if wants else 0) for x, wants in zip(inputs, others[-1], strict=True))
    return losses.new_empty(()), losses, *grads


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, head, bias, *teachers, teacher_weights, mask = inputs[:8]
    ctx.counts = [len(tensors) for tensors in teachers]
    ctx.save_for_backward(hidden, head, bias, teacher_weights, mask, *(tensor for tensors in teachers for tensor in tensors))
    ctx.settings = inputs[8:]


def _backward(ctx: Any, row_scale: Tensor) -> tuple[Any, ...]:  # [R]
    hidden, head, bias, teacher_weights, mask, *others = ctx.saved_tensors
    teachers = [[others.pop(0) for _ in range(count)] for count in ctx.counts]
    inputs = (hidden, head, bias, *teachers, teacher_weights, mask)
    wanted = [ctx.needs_input_grad[i] for i in range(3)]
    grads = torch.ops.samerge.linear_softmax_kl_sum(*inputs, row_scale, *ctx.settings, wanted)[2:]
    of_inputs = (grad if wants else None for grad, wants in zip(grads, wanted, strict=True))
    return *of_inputs, *_nothing(ctx.counts), None, None, None, None, None, None, None


def _setup_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.counts, ctx.wanted = [len(tensors) for tensors in inputs[3:6]], inputs[-1]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], *inputs[:3])


def _backward_sum(ctx: Any, factor: Tensor | None, *of_others: Tensor | None) -> tuple[Any, ...]:  # a scalar
    if any(grad is not None for grad in of_others):  # the gradients are what a backward of the losses has asked for
        _no_second_derivative(ctx)
    losses, *grads, hidden, head, bias = ctx.saved_tensors
    wanted = [*ctx.wanted, ctx.needs_input_grad[8]]
    scaled: list[Tensor | None] = [None] * 4
    for i, (constant, of) in enumerate(zip((*grads, losses), (hidden, head, bias, hidden), strict=True)):
        if factor is not None and wanted[i]:
            scaled[i] = torch.ops.samerge.constant_times(constant, factor, of)
    return *scaled[:3], *_nothing(ctx.counts), None, None, scaled[3], None, None, None, None, None, None


def _nothing(counts: list[int]) -> list[list[None]]:
    return [[None] * count for count in counts]


def _no_second_derivative(ctx: Any, *_: Any) -> NoReturn:
    raise RuntimeError("linear_softmax_kl and its siblings have no second derivative")


library.impl("linear_softmax_kl", _forward, "CompositeExplicitAutograd")
library.impl("linear_softmax_kl_sum", _forward_sum, "CompositeExplicitAutograd")
library.impl("constant_times", lambda constant, factor, of: constant * factor, "CompositeExplicitAutograd")
torch.library.register_fake("samerge::linear_softmax_kl", _fake, lib=library)
torch.library.register_fake("samerge::linear_softmax_kl_sum", _fake_sum, lib=library)
torch.library.register_fake("samerge::constant_times", lambda constant, *_: torch.empty_like(constant), lib=library)
torch.library.register_autograd("samerge::linear_softmax_kl", _backward, setup_context=_setup, lib=library)
torch.library.register_autograd("samerge::linear_softmax_kl_sum", _backward_sum, setup_context=_setup_sum, lib=library)
torch.library.register_autograd("samerge::constant_times", _no_second_derivative, lib=library)
