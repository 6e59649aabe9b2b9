"""merged_linear_softmax_kl, KL of hidden · (base + Σ_t λ_t τ_t)ᵀ from one teacher, with its gradients by the hidden states and by
λ, beside the same with all logits at once, where the head is merged, its gradient is made and contracted, and beside
linear_softmax_kl of a head that is merged so.

Inputs are those of bench_linear_softmax_kl.py, with a frozen base and task vectors. The yardstick is the products of the way with
all logits, on an eighth of the rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import bench_linear_softmax_kl as of_one_head
import pytest
import torch
from ceiling import Yardstick
from inputs import SETTINGS, error_of, random_normal, short
from torch import Tensor

import samerge_ext as sm
from samerge_ext import reference


@dataclass(frozen=True)
class MergedHead:
    rows: int
    width: int
    classes: int
    tasks: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.rows}x{self.width}x{self.classes} {short(self.dtype)}, T={self.tasks}"

    @property
    def _states(self) -> of_one_head.HiddenStates:
        return of_one_head.HiddenStates(self.rows, self.width, self.classes, self.dtype, with_head=True)

    def tolerance(self, is_ours: bool) -> float:
        return self._states.tolerance(is_ours)

    def needed_bytes(self, device: str) -> int:
        """As for one head, and task vectors with one of them in fp64."""
        return self._states.needed_bytes(device) + self.classes * self.width * (self.tasks * self.dtype.itemsize + 8)

    def build(self, device: str) -> Problem:
        return Problem(self, self._states.build(device))


class Problem:
    def __init__(self, case: MergedHead, of_one: of_one_head.Problem):
        self.rows = case.rows
        self.hidden, self.teacher, self.teacher_head = of_one.hidden, of_one.teacher, of_one.teacher_head
        self.base = of_one.head.detach()  # [V, H]
        numbers = random_normal(case.tasks, self.base.numel(), dtype=case.dtype, device=self.base.device, seed=4)
        self.task_vectors = numbers.mul_(0.3 / case.width**0.5).view(case.tasks, *self.base.shape)  # [T, V, H]
        self.coefficients = torch.full((case.tasks,), 0.3, device=self.base.device, requires_grad=True)  # [T]

    @cached_property
    def _truth(self) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, its gradient by the distinct rows, and that by the coefficients."""
        few = min(of_one_head.DISTINCT, self.rows)
        times = torch.full((few,), self.rows // few, dtype=torch.float64, device=self.base.device)
        times[: self.rows % few] += 1
        hidden, teacher = (x.detach()[:few].double() for x in (self.hidden, self.teacher))
        head = self.base.double()
        for coefficient, task_vector in zip(self.coefficients.tolist(), self.task_vectors, strict=True):
            head += coefficient * task_vector.double()
        given = (hidden, head, None, [teacher], [self.teacher_head.double()], [], None, None, times / self.rows)
        losses, by_hidden, by_head, _ = reference.linear_softmax_kl(*given, *SETTINGS, (True, True, False))
        by_coefficients = torch.stack([(by_head * task_vector.double()).sum() for task_vector in self.task_vectors])
        return (losses * times).sum() / self.rows, by_hidden / times[:, None], by_coefficients

    def error_of(self, result: tuple[Tensor, ...]) -> float:
        """Of the loss and its gradients: the largest error."""
        if any(x.isnan().any() for x in result):
            return float("nan")
        loss, by_hidden, by_coefficients = self._truth
        pairs = ((result[0], loss), (result[1][: len(by_hidden)], by_hidden), (result[2], by_coefficients))
        return max(error_of(*pair) for pair in pairs)

    def merged(self) -> Tensor:
        """The head [V, H], as autograd knows it."""
        return (self.base.flatten() + self.coefficients.to(self.base.dtype) @ self.task_vectors.flatten(1)).view_as(self.base)

    def with_grads(self, loss) -> tuple[Tensor, ...]:
        value = loss()
        return value.detach(), *torch.autograd.grad(value, (self.hidden, self.coefficients))


def ours(x: Problem):
    given = (x.hidden, x.base, x.task_vectors, x.coefficients, x.teacher, x.teacher_head)
    return lambda: x.with_grads(lambda: sm.merged_linear_softmax_kl(*given))


def merged_head(x: Problem):
    """Ours of a head that is merged and has a gradient as a whole; torch contracts it in fp32."""
    return lambda: x.with_grads(lambda: sm.linear_softmax_kl(x.hidden, x.merged(), x.teacher, x.teacher_head))


def unfused(x: Problem):
    return lambda: x.with_grads(lambda: of_one_head.unfused_loss(x.hidden, x.merged(), x.teacher, x.teacher_head))


def cases(device: str, size: str) -> list[MergedHead]:
    if size == "tiny":
        return [MergedHead(19, 5, 30, 2, torch.float32)]
    if size == "quick":
        return [MergedHead(512, 576, 8192, 4, torch.float32)]
    return [MergedHead(4096, 576, 49152, 4, torch.float32)]


CASES = cases
CANDIDATES = {"a whole head": merged_head, "unfused": unfused}


@pytest.fixture(scope="module")
def yardstick(x):
    rows = -(-x.rows // 8)
    hidden, teacher = (y.detach()[:rows] for y in (x.hidden, x.teacher))

    def products():
        logits = hidden @ x.base.t()
        teacher @ x.teacher_head.t()
        logits @ x.base
        logits.t() @ hidden

    return Yardstick("products", rows / x.rows, products)


def bench_merged_linear_softmax_kl(x, candidate, measure, yardstick):
    measure(candidate, work=1, error_of=x.error_of, yardstick=yardstick)
