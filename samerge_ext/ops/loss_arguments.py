"""Arguments that the losses between rows of logits share, whatever these are computed from."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ._common import accumulator, check_devices, shape


def check_settings(reduction: str, student_temperature: float, teacher_temperature: float, beta: float = 0.0) -> None:
    if reduction not in ("batchmean", "sum", "none"):
        raise ValueError(f"unknown reduction {reduction!r}; choose batchmean, sum or none")
    for name, temperature in (("student", student_temperature), ("teacher", teacher_temperature)):
        if not 0 < temperature < math.inf:
            raise ValueError(f"the {name}'s temperature is {temperature}; it must be positive and finite")
    if not 0 <= beta <= 1:
        raise ValueError(
            f"beta is {beta}; it must lie in 0 … 1: 0 for KL(teacher ‖ student), 1 for the reverse, and between them for their "
            "Jensen–Shannon divergence"
        )


def check_row_weights(weights: Tensor | None, **rows: Tensor) -> None:
    """weights [R] of ``rows``, one named tensor [R, ...]."""
    ((name, tensor),) = rows.items()
    if weights is not None:
        _check_weights("row_weights", weights, name, tensor, ([len(tensor)],))


def of_every_row(teacher_weights: Tensor | None, count: int, **rows: Tensor) -> Tensor | None:
    """The weights [K, R] of ``count`` teachers, given as [K] or as that, of ``rows``, one named tensor [R, ...]."""
    ((name, tensor),) = rows.items()
    if teacher_weights is None:
        return None
    _check_weights("teacher_weights", teacher_weights, name, tensor, ([count], [count, len(tensor)]))
    if teacher_weights.requires_grad:
        raise ValueError("teacher_weights requires grad, but it is a constant here; pass teacher_weights.detach()")
    return teacher_weights if teacher_weights.dim() == 2 else teacher_weights[:, None].expand(-1, len(tensor))


def _check_weights(what: str, weights: Tensor, name: str, rows: Tensor, shapes: Sequence[list[int]]) -> None:
    if list(weights.shape) not in shapes:
        raise ValueError(f"{what} has shape {shape(weights)}; it must be {' or '.join(map(str, shapes))}")
    if weights.dtype != accumulator(rows):
        raise TypeError(f"{what} is {weights.dtype}; with {name} of {rows.dtype} it must be {accumulator(rows)}")
    check_devices(**{name: rows, what: weights})
