"""KL(teacher ‖ student) where of a teacher's soft-max its k most likely classes are kept, and the mass of the rest as one class.

With P, Q the masses that teacher and student give to the rest, the sum over k + 1 classes is

    Σ_{c in k} p_c (log p_c − log q_c) + P (log P − log Q)  =  KL(p ‖ q) − P · KL(p | rest ‖ q | rest)

It is never more than the divergence over all classes, and what it misses is how teacher and student share out the rest: P times
the divergence between those shares. Its gradient by the student's scaled logits is q_c − p_c for a class that is kept, and
q_c (1 − P / Q) for the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ._common import accumulator
from .chunked_rows import rows_at_once
from .head_products import Head


class MostLikely(NamedTuple):
    """Of a soft-max over V classes, 4 (2 k + 1) bytes of a row in place of 4 V."""

    classes: Tensor  # [R, k] int32, the most likely first
    log_p: Tensor  # [R, k] of them
    log_rest: Tensor  # [R], of the sum of all others

    @classmethod
    def of(cls, logits: Tensor, k: int, temperature: float) -> MostLikely:  # [R, V]
        """k: all classes where there are no more than that."""
        log_p = _log_softmax(logits, temperature)
        top, classes = log_p.topk(min(k, log_p.shape[1]), dim=1)
        return cls(classes.int(), top, _log_rest(log_p, classes))

    @classmethod
    def of_linear(cls, hidden: Tensor, head: Tensor, bias: Tensor | None, k: int, temperature: float) -> MostLikely:
        """Of the logits hidden · headᵀ + bias, made some rows at a time; [R, H], [V, H], [V]."""
        parts = [cls.of(logits, k, temperature) for _, _, logits in _logits(Head(head, bias, hidden), hidden)]
        if not parts:
            return cls.of(hidden.new_empty(0, len(head), dtype=accumulator(hidden)), k, temperature)
        return cls(*map(torch.cat, zip(*parts, strict=True)))

    def rows(self, some: slice) -> MostLikely:
        return MostLikely(*(tensor[some] for tensor in self))


def most_likely_kl_with_grad(
    student: Tensor, teacher: MostLikely, temperature: float, row_scale: Tensor
) -> tuple[Tensor, Tensor]:  # [R, V], [R] -> [], [R, V]
    """Σ_r row_scale_r · loss_r, and its gradient by the student's logits in their dtype."""
    loss, grad = _loss_and_grad(student, teacher, temperature, row_scale)
    return loss, grad.to(student.dtype)


def linear_most_likely_kl_with_grad(
    hidden: Tensor,  # [R, H]
    head: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    teacher: MostLikely,
    temperature: float,
    row_scale: Tensor,  # [R]
) -> tuple[Tensor, list[Tensor | None]]:
    """The same of the student's logits hidden · headᵀ + bias, of which no more than a workspace exists, and its gradients by
    hidden, head and bias; None by what requires none, and by all under no_grad."""
    inputs = (hidden, head, bias)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        wide = accumulator(hidden)
        sums = [
            x.new_zeros(x.shape, dtype=wide) if wants and x is not None else None for x, wants in zip(inputs, wanted, strict=True)
        ]
        of_hidden, of_head, of_bias = sums
        total = hidden.new_zeros((), dtype=wide)
        student = Head(head, bias, hidden)
        for rows, x, logits in _logits(student, hidden):
            loss, grad = _loss_and_grad(logits, teacher.rows(rows), temperature, row_scale[rows])
            total += loss
            if of_hidden is not None:
                of_hidden[rows] = student.hidden_grad(grad)
            if of_head is not None:
                student.add_weight_grad(grad, x, of_head)
            if of_bias is not None:
                of_bias += grad.sum(0)
    found = zip(sums, inputs, strict=True)
    return total, [grad if grad is None or x is None else grad.to(x.dtype) for grad, x in found]


def _loss_and_grad(
    logits: Tensor, teacher: MostLikely, temperature: float, row_scale: Tensor
) -> tuple[Tensor, Tensor]:  # [R, V], [R] -> [], [R, V] wide
    classes = teacher.classes.long()
    log_q = _log_softmax(logits, temperature)
    kept = log_q.gather(1, classes)
    beyond = teacher.log_rest - _log_rest(log_q, classes)  # log P − log Q
    p, rest = teacher.log_p.exp(), teacher.log_rest.exp()
    beyond = torch.where(rest > 0, beyond, 0.0)
    losses = torch.where(p > 0, p * (teacher.log_p - kept), 0.0).sum(1) + rest * beyond
    share = torch.where(rest > 0, beyond.exp(), 0.0)  # P / Q
    grad = log_q.exp_().mul_((1 - share)[:, None]).scatter_(1, classes, kept.exp() - p)
    return losses.dot(row_scale.to(losses.dtype)), grad.mul_((row_scale / temperature)[:, None])


def _logits(head: Head, hidden: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Which rows, hidden states of the operand's dtype and logits, as many at a time as the workspace has room for."""
    matrices = 4  # logits, the logarithm of their soft-max, and what a search or a gradient takes
    slab = hidden.new_empty(head.slab_bytes // head.wide.itemsize, dtype=head.wide)
    head.widen_into(slab)
    at_once = rows_at_once(head, [], matrices, None)
    for first in range(0, len(hidden), at_once):
        x = hidden[first : first + at_once].to(head.operand)
        logits = head.logits(x, hidden.new_empty(len(x), len(head.weight), dtype=head.wide))
        yield slice(first, first + len(x)), x, logits


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return (logits.to(accumulator(logits)) / temperature).log_softmax(1)


def _log_rest(log_p: Tensor, classes: Tensor) -> Tensor:  # [R, V], [R, k] -> [R]
    return log_p.scatter(1, classes, -torch.inf).logsumexp(1)
