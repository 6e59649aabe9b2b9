"""What linear_softmax_kl is given: teachers as lists, and checks that name what does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._common import accumulator, check_devices, check_dtypes, shape
from .loss_arguments import check_row_weights, check_settings, of_every_row

Several = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class Teachers:
    """K teachers' hidden states [R, H_k], heads [V, H_k] and, all or none, biases [V]."""

    hidden: list[Tensor]
    heads: list[Tensor]
    biases: list[Tensor]

    @classmethod
    def of(cls, head: Tensor, bias: Tensor | None, hidden: Several, heads: Several | None, biases: Several | None) -> Teachers:
        """As they are given beside the student's head and bias, which are the teachers' too where they have none."""
        if isinstance(hidden, Tensor):
            hidden = [hidden] if hidden.dim() == 2 else list(hidden)
        if not hidden:
            raise ValueError("teacher_hidden holds no teacher; give at least one")
        if heads is None:
            if biases is not None:
                raise ValueError("teacher_bias is given without teacher_head; a teacher without one has the student's bias too")
            heads, biases = head.detach(), None if bias is None else bias.detach()
        heads = _of_each("teacher_head", heads, len(hidden))
        return cls(list(hidden), heads, [] if biases is None else _of_each("teacher_bias", biases, len(hidden)))


def _of_each(name: str, given: Several, teachers: int) -> list[Tensor]:
    each = [given] * teachers if isinstance(given, Tensor) else list(given)
    if len(each) != teachers:
        raise ValueError(f"{name} has {len(each)} entries and teacher_hidden {teachers}; give one, or one for each")
    return each


def check_linear(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    teachers: Teachers,
    temperatures: tuple[float, float],
    row_weights: Tensor | None,
    teacher_weights: Tensor | None,
    mask: Tensor | None,
    reduction: str,
    beta: float = 0.0,
) -> Tensor | None:
    """Raises on the first argument that does not fit; returns the teachers' weights as [K, R]."""
    check_settings(reduction, *temperatures, beta)
    if hidden.dim() != 2:
        raise ValueError(f"hidden has shape {shape(hidden)}; it must be [R, H]: flatten batches and positions to rows")
    if head.dim() != 2 or not len(head):
        raise ValueError(f"head has shape {shape(head)}; it must be [V, H] with at least one class")
    rows, classes = len(hidden), len(head)
    _check_head("", hidden, head, bias, hidden, classes)
    for k in range(len(teachers.hidden)):
        teacher, teacher_head = teachers.hidden[k], teachers.heads[k]
        if teacher.dim() != 2 or len(teacher) != rows:
            raise ValueError(
                f"teacher_hidden[{k}] has shape {shape(teacher)}; with hidden of {shape(hidden)} it must be [{rows}, H]"
            )
        teacher_bias = teachers.biases[k] if teachers.biases else None
        _check_head("teacher_", teacher, teacher_head, teacher_bias, hidden, classes, f"[{k}]")
        for name, tensor in (("hidden", teacher), ("head", teacher_head), ("bias", teacher_bias)):
            if tensor is not None and tensor.requires_grad:
                raise ValueError(f"teacher_{name}[{k}] requires grad, but teachers are constants here; pass its detach()")
    check_row_weights(row_weights, hidden=hidden)
    teacher_weights = of_every_row(teacher_weights, len(teachers.hidden), hidden=hidden)
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"mask is {mask.dtype}; it must be bool, true for the rows that count")
        if list(mask.shape) != [rows]:
            raise ValueError(f"mask has shape {shape(mask)}; with hidden of {shape(hidden)} it must be [{rows}]")
        check_devices(hidden=hidden, mask=mask)
    return teacher_weights


def reduced_scale(hidden: Tensor, row_weights: Tensor | None, mask: Tensor | None, reduction: str) -> Tensor:
    """What losses are multiplied by [R] before they are summed."""
    scale = hidden.new_ones(len(hidden), dtype=accumulator(hidden)) if row_weights is None else row_weights
    if reduction == "batchmean":
        scale = scale / (max(len(hidden), 1) if mask is None else mask.sum().clamp(min=1))
    return scale


def _check_head(
    whose: str, hidden: Tensor, head: Tensor, bias: Tensor | None, student: Tensor, classes: int, which: str = ""
) -> None:
    name = f"{whose}head{which}"
    if head.dim() != 2 or head.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"{name} has shape {shape(head)}; with {whose}hidden{which} of {shape(hidden)} it must be [V, {hidden.shape[1]}]"
        )
    if len(head) != classes:
        raise ValueError(
            f"{name} has {len(head)} rows and head {classes}; rows must stand for the same tokens in both: align the vocabularies"
        )
    check_dtypes(**{"hidden": student, f"{whose}hidden{which}": hidden, name: head})
    if bias is not None:
        if list(bias.shape) != [classes]:
            raise ValueError(f"{whose}bias{which} has shape {shape(bias)}; with {name} of {shape(head)} it must be [{classes}]")
        check_dtypes(**{"hidden": student, f"{whose}bias{which}": bias})
