"""linear_softmax_kl, KL of hidden · headᵀ from one teacher with a head of its own, with its gradient by the hidden states, or by
the head too, beside the same with all logits at once.

The yardstick is the products alone, on an eighth of the rows: what a candidate takes beside them shows in its share. The
rows repeat after 16, so that the truth in fp64 of a few is that of all. On a GPU Liger-Kernel takes part, which is given the
teacher's probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
from ceiling import Yardstick
from inputs import OUR_TOLERANCE, SETTINGS, TOLERANCE, error_of, random_normal, short
from torch import Tensor
from torch.nn.functional import kl_div

import samerge_ext as sm
from samerge_ext import reference

DISTINCT = 16  # rows


@dataclass(frozen=True)
class HiddenStates:
    rows: int
    width: int
    classes: int
    dtype: torch.dtype
    with_head: bool  # a gradient by the head, too

    def __str__(self) -> str:
        of = "hidden and head" if self.with_head else "hidden"
        return f"{self.rows}x{self.width}x{self.classes} {short(self.dtype)}, grad by {of}"

    def tolerance(self, is_ours: bool) -> float:
        return (OUR_TOLERANCE if is_ours else TOLERANCE)[self.dtype]

    def needed_bytes(self, device: str) -> int:
        """Of heads, gradient and their truth, and six matrices of logits in fp32 for what candidates allocate."""
        return self.classes * (self.width * (4 * self.dtype.itemsize + 3 * 8) + 6 * 4 * self.rows)

    def build(self, device: str) -> Problem:
        return Problem(self, device)


class Problem:
    def __init__(self, case: HiddenStates, device: str):
        self.rows, self.with_head = case.rows, case.with_head
        options = {"dtype": case.dtype, "device": device}
        few = min(DISTINCT, case.rows)
        repeated = lambda seed: random_normal(few, case.width, **options, seed=seed).repeat(-(-case.rows // few), 1)[: case.rows]
        head = lambda seed: random_normal(case.classes, case.width, **options, seed=seed).mul_(3 / case.width**0.5)
        self.hidden, self.teacher = repeated(0).requires_grad_(), repeated(1)  # [R, H]
        self.head, self.teacher_head = head(2).requires_grad_(case.with_head), head(3)  # [V, H]

    @property
    def leaves(self) -> list[Tensor]:
        return [self.hidden, self.head] if self.with_head else [self.hidden]

    @cached_property
    def _truth(self) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, its gradient by the distinct rows, and that by the last classes' weights."""
        few = min(DISTINCT, self.rows)
        times = torch.full((few,), self.rows // few, dtype=torch.float64, device=self.head.device)
        times[: self.rows % few] += 1
        hidden, teacher = (x.detach()[:few].double() for x in (self.hidden, self.teacher))
        heads = [x.detach().double() for x in (self.head, self.teacher_head)]
        given = (hidden, heads[0], None, [teacher], [heads[1]], [], None, None, times / self.rows)
        losses, by_hidden, by_head, _ = reference.linear_softmax_kl(*given, *SETTINGS, (True, self.with_head, False))
        return (losses * times).sum() / self.rows, by_hidden / times[:, None], by_head

    def error_of(self, result: tuple[Tensor, ...]) -> float:
        """Of the loss and its gradients: the largest error."""
        if any(x.isnan().any() for x in result):
            return float("nan")
        loss, by_hidden, by_head = self._truth
        errors = [error_of(result[0], loss), error_of(result[1][: len(by_hidden)], by_hidden)]
        return max(errors + ([error_of(result[2], by_head)] if self.with_head else []))


def with_grads(x: Problem, loss) -> tuple[Tensor, ...]:
    value = loss()
    return value.detach(), *torch.autograd.grad(value, x.leaves)


def ours(x: Problem):
    return lambda: with_grads(x, lambda: sm.linear_softmax_kl(x.hidden, x.head, x.teacher, x.teacher_head))


def roomy(x: Problem):
    """Ours with four times the memory, in which as many rows are multiplied at once."""
    settings = {"workspace_bytes": 2**28}
    return lambda: with_grads(x, lambda: sm.linear_softmax_kl(x.hidden, x.head, x.teacher, x.teacher_head, **settings))


def unfused_loss(hidden: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
    with torch.no_grad():
        log_p = (torch.mm(teacher, teacher_head.t()).float() / 2).log_softmax(-1)
    log_q = (torch.mm(hidden, head.t()).float() / 2).log_softmax(-1)
    return kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def unfused(x: Problem):
    return lambda: with_grads(x, lambda: unfused_loss(x.hidden, x.head, x.teacher, x.teacher_head))


def liger(x: Problem):
    """From 0.8.5 on."""
    from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss

    kl = LigerFusedLinearKLDivLoss(reduction="batchmean", temperature=2.0)
    head = x.head if x.with_head else x.head.detach()

    def loss():
        with torch.no_grad():
            p = (torch.mm(x.teacher, x.teacher_head.t()).float() / 2).softmax(-1)
        return kl(x.hidden, head, p)

    return lambda: with_grads(x, loss)


def cases(device: str, size: str) -> list[HiddenStates]:
    """A CPU without instructions for bf16 takes minutes for products in it, which ours widens."""
    of = lambda rows, width, classes, dtype: [HiddenStates(rows, width, classes, dtype, head) for head in (False, True)]
    if size == "tiny":
        return [*of(19, 5, 30, torch.float32), *of(19, 5, 30, torch.bfloat16)]
    if size == "quick":
        return of(512, 576, 8192, torch.float32)
    if device == "cuda":
        return [*of(4096, 576, 49152, torch.bfloat16), *of(8192, 4096, 128256, torch.bfloat16)]
    return [*of(4096, 576, 49152, torch.float32), HiddenStates(1024, 2048, 128256, torch.float32, False)]


CASES = cases
CANDIDATES = {"samerge, 256 MiB": roomy, "unfused": unfused}
CUDA_CANDIDATES = {"Liger": liger}


@pytest.fixture(scope="module")
def yardstick(x):
    rows = -(-x.rows // 8)
    hidden, head, teacher, teacher_head = (y.detach() for y in (x.hidden[:rows], x.head, x.teacher[:rows], x.teacher_head))

    def products():
        logits = hidden @ head.t()
        teacher @ teacher_head.t()
        logits @ head
        if x.with_head:
            logits.t() @ hidden

    return Yardstick("products", rows / x.rows, products)


def bench_linear_softmax_kl(x, candidate, measure, yardstick):
    measure(candidate, work=1, error_of=x.error_of, yardstick=yardstick)
