"""linear_softmax_kl a chunk of rows at a time, composed of products with heads and of softmax_kl."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .. import backend, reference
from ..memory import free_gpu_bytes
from ._common import accumulator
from .head_products import Head

_ON_CPU, _ON_GPU = 64 * 2**20, 2**30  # bytes of workspace
_TOGETHER = 16  # rows or columns of a product
_KEPT_BACK = 1 / 8  # of it, for what softmax_kl and the library that multiplies take for themselves


def losses_and_grads(
    hidden: Tensor,  # [R, H]
    head: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    teacher_hidden: list[Tensor],  # K of [R, H_k]
    teacher_head: list[Tensor],  # K of [V, H_k]
    teacher_bias: list[Tensor],  # K of [V], or none
    teacher_weights: Tensor | None,  # [K, R], None for 1/K
    mask: Tensor | None,  # [R], None for all rows
    row_scale: Tensor | None,  # [R], None for no gradients
    loss: str,
    student_temperature: float,
    teacher_temperature: float,
    beta: float,
    workspace_bytes: int | None,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:  # [R], [R, H], [V, H], [V]
    """Every row's loss, and of Σ_r row_scale_r · loss_r the wanted gradients by hidden, head and bias: else they are empty."""
    settings = (loss, student_temperature, teacher_temperature, beta)
    if backend.active() == "reference":
        inputs = (hidden, head, bias, teacher_hidden, teacher_head, teacher_bias, teacher_weights, mask, row_scale)
        return reference.linear_softmax_kl(*inputs, *settings, wanted)
    with torch.autocast(hidden.device.type, enabled=False):
        student = Head(head, bias, hidden)
        biases: Sequence[Tensor | None] = teacher_bias or [None] * len(teacher_head)
        teachers = [Head(*parts) for parts in zip(teacher_head, biases, teacher_hidden, strict=True)]
        of_loss = accumulator(hidden)
        row_scale = row_scale if any(wanted) else None
        losses = hidden.new_zeros(len(hidden), dtype=of_loss)
        hidden_grad = torch.zeros_like(hidden) if wanted[0] else hidden.new_empty(0)
        head_grad = torch.zeros_like(head, dtype=of_loss) if wanted[1] else head.new_empty(0)
        bias_grad = head.new_zeros(len(head) if wanted[2] else 0, dtype=of_loss)

        # The gradient takes the place of the student's logits where softmax_kl allows it. Room for it is kept in any case: a loss
        # is the same to the bit with its gradient and without.
        apart = loss == "cross_entropy"
        matrices = 1 + len(teachers) + apart
        at_once = rows_at_once(student, teachers, matrices, workspace_bytes)
        kernel, buffer = backend.kernel("softmax_kl", hidden), None
        slab = hidden.new_empty(max(each.slab_bytes for each in (student, *teachers)) // of_loss.itemsize, dtype=of_loss)
        for each in (student, *teachers):
            each.widen_into(slab)
        for rows, count in _chunks(len(hidden), mask, at_once):
            if buffer is None:  # the first chunk is the largest
                buffer = hidden.new_empty(matrices, count, len(head), dtype=of_loss)
            x = hidden[rows].to(student.operand)
            logits = student.logits(x, buffer[0, :count])
            taught = buffer[1 : 1 + len(teachers), :count] if teachers else None  # [K, n, V]
            for k, teacher in enumerate(teachers):
                teacher.logits(teacher_hidden[k][rows].to(teacher.operand), buffer[1 + k, :count])
            weights = None if teacher_weights is None else teacher_weights[:, rows]
            scale = None if row_scale is None else row_scale[rows]
            out = None if scale is None else buffer[-1, :count] if apart else logits
            losses[rows], grad = kernel(logits, taught, weights, None, scale, out, *settings)
            if wanted[0]:
                hidden_grad[rows] = student.hidden_grad(grad).to(hidden.dtype)
            if wanted[1]:
                student.add_weight_grad(grad, x, head_grad)
            if wanted[2]:
                bias_grad += grad.sum(0)
        return losses, hidden_grad, head_grad.to(head.dtype), bias_grad.to(head.dtype if bias is None else bias.dtype)


def _chunks(rows: int, mask: Tensor | None, at_once: int) -> Iterator[tuple[slice | Tensor, int]]:
    """The rows that count, in as few chunks of nearly equal size as there can be, and the size of each."""
    places = None if mask is None else mask.nonzero().flatten()
    total = rows if places is None else len(places)
    size = -(-total // max(1, -(-total // at_once)))
    for first in range(0, total, max(size, 1)):
        some = slice(first, min(first + size, total))
        yield some if places is None else places[some], some.stop - first


def rows_at_once(student: Head, teachers: list[Head], matrices: int, workspace_bytes: int | None) -> int:
    """As many as the workspace has room for: of logits, hidden states as they are multiplied, and a slab of the widest head."""
    available = workspace_for(workspace_bytes, student.weight.device)
    heads = (student, *teachers)
    of_row = matrices * len(student.weight) * student.wide.itemsize + sum(head.row_bytes for head in heads)
    of_slab = max(head.slab_bytes for head in heads)
    rows = (available - of_slab) // of_row
    if rows < 1:
        needed = -int(-(of_row + of_slab) // (1 - _KEPT_BACK))
        raise ValueError(
            f"workspace_bytes is {workspace_bytes}, too little for one row: {matrices} times {len(student.weight)} logits and a "
            f"slab of the head take {needed} bytes"
        )
    return even(rows)


def even(count: int) -> int:
    """At most so many rows or columns of a product, which suit it: 16 rows are multiplied in the time of any fewer, and of a
    multiple of 16 columns rows begin as vectors do (MKL multiplies into 624 at 1.5 times its speed into 631)."""
    return count - count % _TOGETHER if count > _TOGETHER else count


def workspace_for(workspace_bytes: int | None, device: torch.device) -> int:
    """The bytes that may be allocated here, of those given or the default."""
    if workspace_bytes is None and device.type == "cuda":
        workspace_bytes, free = _ON_GPU, free_gpu_bytes(device)
        while workspace_bytes > free // 4:  # by halves: the order of sums then seldom depends on what else is held
            workspace_bytes //= 2
    return int((_ON_CPU if workspace_bytes is None else workspace_bytes) * (1 - _KEPT_BACK))
