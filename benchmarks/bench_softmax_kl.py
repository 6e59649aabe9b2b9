"""softmax_kl, Σ_r KL(p_r ‖ q_r) / R from raw logits at temperature 2: must read both matrices, and write the gradient.

A candidate takes the inputs (student [R, V], teacher [R, V]), prepares what is not to be timed, and returns the call that is. The
call returns the loss, or in cases "with grad" the loss and its gradient by the student. All sum in fp32, whatever the storage.
"""

from collections.abc import Callable

import torch
from cases import logits_cases
from inputs import LogitsInputs
from published import softmax_log_kl
from torch import Tensor
from torch.nn.functional import kl_div

import samerge_ext as sm

Loss = Callable[[Tensor, Tensor], Tensor]  # of student and teacher logits [R, V]


def ours(x: LogitsInputs):
    loss = sm.softmax_kl_with_grad if x.with_gradient else sm.softmax_kl
    return lambda: loss(x.student, x.teacher)


def into_out(x: LogitsInputs):
    """Ours, with the gradient written into memory that is there already."""
    out = torch.zeros_like(x.student)
    return lambda: sm.softmax_kl_with_grad(x.student, x.teacher, out=out)


def from_loss(x: LogitsInputs, loss: Loss):
    """The call for a loss whose gradient is autograd's."""
    student = x.student.detach().requires_grad_(x.with_gradient)

    def call():
        value = loss(student, x.teacher)
        return (value.detach(), *torch.autograd.grad(value, student)) if x.with_gradient else value

    return call


def log_softmax_kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = (student.float() / 2).log_softmax(-1), (teacher.float() / 2).log_softmax(-1)
    return kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def liger(x: LogitsInputs):
    from liger_kernel.transformers import LigerKLDIVLoss

    kl = LigerKLDIVLoss(reduction="batchmean")
    return from_loss(x, lambda s, t: kl((s.float() / 2).log_softmax(-1), (t.float() / 2).softmax(-1)))


CASES = logits_cases
CANDIDATES = {
    "samerge, out=": into_out,
    "published": lambda x: from_loss(x, lambda s, t: softmax_log_kl(s.float(), t.float())),
    "log_softmax + kl_div": lambda x: from_loss(x, log_softmax_kl),
    "torch.compile": lambda x: from_loss(x, torch.compile(log_softmax_kl, dynamic=False)),
}
CUDA_CANDIDATES = {"Liger": liger}
OPERATIONS = 16  # per class, an exponential counted as one


def bench_softmax_kl(x, candidate, measure):
    moved = (3 if x.with_gradient else 2) * x.student.nbytes
    measure(candidate, work=moved, operations=OPERATIONS * x.student.numel(), error_of=x.error_of)
