"""linear_softmax_kl of a head that is merged, with the gradient by its coefficients: neither the head nor its gradient exists.

With head = base + Σ_t λ_t τ_t, ∂loss/∂λ_t = ⟨∂loss/∂head, τ_t⟩. A first pass over slabs of the head's rows, which merges each and
multiplies it with all hidden states, finds the largest logit m and Z = Σ exp((x − m) / temperature) of every row, rescaled when a
slab brings a larger m. A second pass has with them the probabilities of a slab, its losses, its gradient G = ∂loss/∂logits, and
∂loss/∂hidden += G · head, ∂loss/∂head = Gᵀ · hidden of the slab, which is contracted with its task vectors and forgotten. Where
G needs a sum over the whole row, as that of every divergence but KL(p ‖ q) does, a pass between them finds the sum and the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ._common import accumulator, check_devices, check_dtypes, define, library, shape
from .chunked_rows import even, workspace_for
from .linear_arguments import Teachers, check_linear, reduced_scale

_INPUTS = "Tensor hidden, Tensor base, Tensor task_vectors, Tensor coefficients"
_TEACHERS = "Tensor[] teacher_hidden, Tensor[] teacher_head, Tensor[] teacher_bias, Tensor? teacher_weights"
_SETTINGS = "Tensor? mask, Tensor row_scale, float student_temperature, float teacher_temperature, float beta"
define(
    f"merged_linear_softmax_kl({_INPUTS}, {_TEACHERS}, {_SETTINGS}, int? workspace_bytes) "
    "-> (Tensor total, Tensor losses, Tensor hidden_grad, Tensor coefficient_grad)"
)


def merged_linear_softmax_kl(
    hidden: Tensor,
    base: Tensor,
    task_vectors: Tensor,
    coefficients: Tensor,
    teacher_hidden: Tensor | Sequence[Tensor],
    teacher_head: Tensor | Sequence[Tensor],
    *,
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
    """`linear_softmax_kl` with the head base + Σ_t coefficients[t] · task_vectors[t], merged slab by slab.

    Differentiable in `hidden`, `coefficients` and `row_weights`. Every product with a head is computed twice, with beta > 0 three
    times, in fp32 (fp64 for fp64), and a slab has as many of the head's rows as the workspace has room for with all rows of
    hidden states.

    Args:
        base: [V, H], fp32, bf16 or fp16, or fp64 with everything else in fp64; a constant.
        task_vectors: [T, V, H]; a constant. Those of a layer of a packed matrix [T, N] lie in it:
            `.narrow(1, offset, V * H).unflatten(1, (V, H))`.
        coefficients: [T] fp32 (fp64 where base is fp64): the λ of the head's layer.
        reduction: "batchmean" or "sum".
        the others: as of `linear_softmax_kl`.

    Returns:
        A scalar, fp32 (fp64 for fp64 hidden states).

    Raises:
        ValueError, TypeError: as `linear_softmax_kl`, or a constant requires grad.
    """
    teachers = Teachers.of(base, None, teacher_hidden, teacher_head, teacher_bias)
    temperatures, options = (student_temperature, teacher_temperature), (row_weights, teacher_weights, mask, reduction, beta)
    teacher_weights = check_linear(hidden, base, None, teachers, temperatures, *options)
    if reduction == "none":
        raise ValueError("reduction 'none' has no gradient by coefficients that is one vector; choose batchmean or sum")
    if task_vectors.dim() != 3 or task_vectors.shape[1:] != base.shape:
        raise ValueError(
            f"task_vectors has shape {shape(task_vectors)}; with base of {shape(base)} it must be "
            f"[T, {base.shape[0]}, {base.shape[1]}]"
        )
    if list(coefficients.shape) != [len(task_vectors)]:
        raise ValueError(f"coefficients has shape {shape(coefficients)}; with task_vectors it must be [{len(task_vectors)}]")
    check_dtypes(hidden=hidden, task_vectors=task_vectors)
    if coefficients.dtype != accumulator(hidden):
        raise TypeError(f"coefficients is {coefficients.dtype}; with hidden of {hidden.dtype} it must be {accumulator(hidden)}")
    check_devices(hidden=hidden, coefficients=coefficients)
    for name, constant in (("base", base), ("task_vectors", task_vectors)):
        if constant.requires_grad:
            raise ValueError(f"{name} requires grad, but it is a constant here; pass {name}.detach()")
    row_scale = reduced_scale(hidden, row_weights, mask, reduction)
    inputs = (hidden, base, task_vectors, coefficients, teachers.hidden, teachers.heads, teachers.biases, teacher_weights, mask)
    return torch.ops.samerge.merged_linear_softmax_kl(*inputs, row_scale, *temperatures, beta, workspace_bytes)[0]


class _Rows:
    """Rows of logits that come slab by slab: their largest, Z, and with them log-probabilities."""

    def __init__(self, rows: int, temperature: float, like: Tensor):
        self.temperature = temperature
        self.max = like.new_full((rows, 1), -torch.inf)
        self.sum = like.new_zeros(rows, 1)

    def see(self, logits: Tensor) -> None:  # [R, v], overwritten
        larger = torch.maximum(self.max, logits.amax(1, keepdim=True))
        finite = larger.masked_fill(larger == -torch.inf, 0)  # all masked so far: their exponentials must be 0, not NaN
        self.sum *= ((self.max - finite) / self.temperature).exp_()
        self.sum += logits.sub_(finite).div_(self.temperature).exp_().sum(1, keepdim=True)
        self.max = larger

    def log_probabilities(self, logits: Tensor) -> Tensor:  # [R, v], in place
        return logits.sub_(self.max).div_(self.temperature).sub_(self.sum.log())


class _Mixture:
    """m = β p + (1 − β) q of β KL(p ‖ m) + (1 − β) KL(q ‖ m), and at β = 1, relative to 1 − β, KL(q ‖ p) with m = p."""

    def __init__(self, beta: float):
        self.beta, self.own = beta, 1 - beta or 1.0

    def log_probabilities(self, log_p: Tensor, log_q: Tensor, room: Tensor, out: Tensor) -> Tensor:  # [R, v]
        if self.beta == 1:
            return out.copy_(log_p)
        of_p = torch.add(log_p, math.log(self.beta), out=out)
        return torch.logaddexp(of_p, torch.add(log_q, math.log(self.own), out=room), out=out)

    def of_student(self, log_q: Tensor, log_m: Tensor, q: Tensor) -> Tensor:  # [R, v]
        """(1 − β) q log(q / m), which is also q times the derivative by q, in place of log_m; and q."""
        torch.exp(log_q, out=q)
        return torch.sub(log_q, log_m, out=log_m).masked_fill_(q == 0, 0).mul_(q).mul_(self.own)


class _Room:
    """Memory for a slab's matrices, which are written over slab by slab."""

    def __init__(self, count: int, numbers: int, like: Tensor):
        self._numbers = [like.new_empty(numbers) for _ in range(count)]

    def matrices(self, rows: int, columns: int) -> list[Tensor]:
        return [numbers[: rows * columns].view(rows, columns) for numbers in self._numbers]


class Slabs(Protocol):
    """A head [V, H] of which no more than some rows exist at once. shape: [V, H]."""

    shape: torch.Size

    def rows(self, some: slice, out: Tensor, room: Tensor) -> Tensor:
        """Those rows [v, H], widened: in ``out``, or where they lie. room: as large as ``out``, may be written over."""


class MergedSlabs(Slabs, Protocol):
    """One that is merged of task vectors."""

    def slabs(self, most: int) -> list[slice]:
        """All rows, some ``most`` at a time."""

    def contract(self, some: slice, gradient: Tensor, room: Tensor) -> Tensor:
        """⟨∂loss/∂head, τ_t⟩ [T] of those rows, the gradient being [v, H]."""


class WholeHead:
    """A head that is there."""

    def __init__(self, head: Tensor):  # [V, H]
        self.head, self.shape = head, head.shape

    def rows(self, some: slice, out: Tensor, room: Tensor) -> Tensor:
        slab = self.head[some]
        return slab if slab.dtype == out.dtype else out.copy_(slab)


class _MergedHead:
    """base + Σ_t coefficients[t] · task_vectors[t]."""

    def __init__(self, base: Tensor, task_vectors: Tensor, coefficients: Tensor):  # [V, H], [T, V, H], [T]
        self.base, self.task_vectors, self.coefficients = base, task_vectors, coefficients
        self.shape = base.shape

    def slabs(self, most: int) -> list[slice]:
        return [slice(first, min(first + most, len(self.base))) for first in range(0, len(self.base), most)]

    def rows(self, some: slice, out: Tensor, room: Tensor) -> Tensor:
        out.copy_(self.base[some])
        for coefficient, task_vector in zip(self.coefficients, self.task_vectors, strict=True):
            out.add_(room.copy_(task_vector[some]).mul_(coefficient))
        return out

    def contract(self, some: slice, gradient: Tensor, room: Tensor) -> Tensor:
        products = (torch.mul(task_vector[some], gradient, out=room) for task_vector in self.task_vectors)
        return torch.stack([each.sum(1).sum(dtype=torch.float64) for each in products])


def losses_by_slab(
    hidden: Tensor,  # [R, H]
    student: MergedSlabs,  # [V, H]
    bias: Tensor | None,  # [V]
    teacher_hidden: Sequence[Tensor],  # K of [R, H_k]
    teachers: Sequence[Slabs],  # K of [V, H_k]
    teacher_bias: Sequence[Tensor],  # K of [V], or none
    teacher_weights: Tensor,  # [K, R]
    scale: Tensor,  # [R]
    student_temperature: float,
    teacher_temperature: float,
    beta: float,
    workspace_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # [R], [R, H], [T], [V]
    """Every row's loss, and of Σ_r scale_r · loss_r the gradients by hidden states, coefficients and bias."""
    wide, rows = accumulator(hidden), len(hidden)
    classes, width = student.shape
    widest = max(head.shape[1] for head in (student, *teachers))
    number, of_weights, of_logits = wide.itemsize, 3, 5  # matrices of a slab [v, widest] and [R, v]
    of_class = number * (of_logits * rows + of_weights * widest) + rows
    most = min(classes, workspace_for(workspace_bytes, hidden.device) // of_class)
    if most < 1:
        raise ValueError(f"workspace_bytes is {workspace_bytes}, too little for one class of {rows} rows: give {2 * of_class}")
    slabs = student.slabs(even(most))
    most = max((some.stop - some.start for some in slabs), default=0)
    with torch.autocast(hidden.device.type, enabled=False):
        x, taught = hidden.to(wide), [states.to(wide) for states in teacher_hidden]
        weights_room, logits_room = _Room(of_weights, most * widest, x), _Room(of_logits, rows * most, x)

        def merged_logits(some: slice, out: Tensor) -> tuple[Tensor, Tensor]:  # [R, v], and the slab [v, H] in the first room
            first, _, other = weights_room.matrices(out.shape[1], width)
            head = student.rows(some, first, other)
            torch.mm(x, head.t(), out=out)
            return out if bias is None else out.add_(bias[some]), head

        def teacher_logits(k: int, some: slice, out: Tensor) -> Tensor:  # [R, v]
            _, second, other = weights_room.matrices(out.shape[1], teachers[k].shape[1])
            torch.mm(taught[k], teachers[k].rows(some, second, other).t(), out=out)
            return out.add_(teacher_bias[k][some]) if teacher_bias else out

        of_student = _Rows(rows, student_temperature, x)
        of_teachers = [_Rows(rows, teacher_temperature, x) for _ in teachers]
        for some in slabs:
            logits = logits_room.matrices(rows, some.stop - some.start)[0]
            of_student.see(merged_logits(some, logits)[0])
            for k, teacher in enumerate(of_teachers):
                teacher.see(teacher_logits(k, some, logits))

        losses, means, hidden_grad = x.new_zeros(rows), x.new_zeros(rows), torch.zeros_like(x)
        coefficient_grad: Tensor | None = None
        bias_grad = None if bias is None else torch.zeros_like(bias, dtype=wide)
        mixture = _Mixture(beta)
        for some in slabs if beta else ():
            log_q, log_p, log_m, q, p = logits_room.matrices(rows, some.stop - some.start)
            of_student.log_probabilities(merged_logits(some, log_q)[0])
            for k, teacher in enumerate(of_teachers):
                torch.exp(teacher.log_probabilities(teacher_logits(k, some, log_p)), out=p)
                mixture.log_probabilities(log_p, log_q, q, log_m)
                of_p = log_p.sub_(log_m).masked_fill_(p == 0, 0).mul_(p).sum(1)
                of_q = mixture.of_student(log_q, log_m, q).sum(1)
                losses += teacher_weights[k] * (beta * of_p + of_q + (p.sub_(q).sum(1) if beta == 1 else 0))  # as below
                means += teacher_weights[k] * of_q
        for some in slabs:
            log_q, log_p, p, slope, grad = logits_room.matrices(rows, some.stop - some.start)
            _, head = merged_logits(some, log_q)
            of_student.log_probabilities(log_q)
            grad.zero_()
            for k, teacher in enumerate(of_teachers):
                teacher.log_probabilities(teacher_logits(k, some, log_p))
                if beta:
                    log_m = mixture.log_probabilities(log_p, log_q, slope, out=p)
                    grad.addcmul_(mixture.of_student(log_q, log_m, slope), teacher_weights[k][:, None])
                    continue
                torch.exp(log_p, out=p)
                torch.exp(log_q, out=slope).sub_(p)  # q − p
                d = log_p.sub_(log_q).masked_fill_(p == 0, 0)
                # Σ p · d + q − p: what is added sums to 0 over a row, and takes the roundings of log Z with it.
                losses += teacher_weights[k] * p.mul_(d).add_(slope).sum(1)
                grad.addcmul_(slope, teacher_weights[k][:, None])
            if beta:
                grad.addcmul_(torch.exp(log_q, out=slope), means[:, None], value=-1)
            grad.mul_((scale / student_temperature)[:, None])
            _, head_grad, other = weights_room.matrices(some.stop - some.start, width)
            hidden_grad.addmm_(grad, head)
            torch.mm(grad.t(), x, out=head_grad)
            found = student.contract(some, head_grad, other).double()
            coefficient_grad = found if coefficient_grad is None else coefficient_grad + found
            if bias_grad is not None:
                bias_grad[some] = grad.sum(0)
    assert coefficient_grad is not None  # a head has a row
    return losses, hidden_grad, coefficient_grad.to(wide), bias_grad


def _forward(
    hidden: Tensor,  # [R, H]
    base: Tensor,  # [V, H]
    task_vectors: Tensor,  # [T, V, H]
    coefficients: Tensor,  # [T]
    teacher_hidden: list[Tensor],  # K of [R, H_k]
    teacher_head: list[Tensor],  # K of [V, H_k]
    teacher_bias: list[Tensor],  # K of [V], or none
    teacher_weights: Tensor | None,  # [K, R], None for 1/K
    mask: Tensor | None,  # [R], None for all rows
    row_scale: Tensor,  # [R]
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [], [R], [R, H], [T]
    kept = slice(None) if mask is None else mask.nonzero().flatten()
    scale, wide, count = row_scale[kept], accumulator(hidden), len(teacher_head)
    weights = scale.new_full((count, len(scale)), 1 / count) if teacher_weights is None else teacher_weights[:, kept]
    student, teachers = _MergedHead(base, task_vectors, coefficients), [WholeHead(head) for head in teacher_head]
    taught = [states[kept] for states in teacher_hidden]
    losses, hidden_grad, coefficient_grad, _ = losses_by_slab(
        hidden[kept], student, None, taught, teachers, teacher_bias, weights, scale, *settings
    )
    all_losses, all_grads = hidden.new_zeros(len(hidden), dtype=wide), torch.zeros_like(hidden)
    all_losses[kept], all_grads[kept] = losses, hidden_grad.to(hidden.dtype)
    return losses.dot(scale), all_losses, all_grads, coefficient_grad


def _fake(hidden: Tensor, base: Tensor, task_vectors: Tensor, coefficients: Tensor, *_: Any) -> tuple[Tensor, ...]:
    losses = hidden.new_empty(len(hidden), dtype=accumulator(hidden))
    return losses.new_empty(()), losses, hidden.new_empty(hidden.shape), torch.empty_like(coefficients)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.counts = [len(tensors) for tensors in inputs[4:7]]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], inputs[0], inputs[3])


def _backward(ctx: Any, factor: Tensor | None, *of_others: Tensor | None) -> tuple[Any, ...]:  # a scalar
    if any(grad is not None for grad in of_others):
        raise RuntimeError("merged_linear_softmax_kl has no second derivative")
    losses, hidden_grad, coefficient_grad, hidden, coefficients = ctx.saved_tensors

    def scaled(position: int, constant: Tensor, of: Tensor) -> Tensor | None:
        wanted = factor is not None and ctx.needs_input_grad[position]
        return torch.ops.samerge.constant_times(constant, factor, of) if wanted else None

    by_hidden, by_coefficients = scaled(0, hidden_grad, hidden), scaled(3, coefficient_grad, coefficients)
    nothing = [[None] * count for count in ctx.counts]
    return by_hidden, None, None, by_coefficients, *nothing, None, None, scaled(9, losses, hidden), None, None, None, None


library.impl("merged_linear_softmax_kl", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("samerge::merged_linear_softmax_kl", _fake, lib=library)
torch.library.register_autograd("samerge::merged_linear_softmax_kl", _backward, setup_context=_setup_context, lib=library)
