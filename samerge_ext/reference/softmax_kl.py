"""Losses between the rows of logits and their gradient; see samerge_ext.ops.softmax_kl for the equations."""

import math

import torch


def softmax_kl(
    student: torch.Tensor,  # [R, V]
    teacher: torch.Tensor | None,  # [K, R, V]
    teacher_weights: torch.Tensor | None,  # [K, R], None for 1/K
    num_classes: torch.Tensor | None,  # [R]
    row_scale: torch.Tensor | None,  # [R], None for no gradient
    out: torch.Tensor | None,  # [R, V] for the gradient, None for a new tensor
    loss: str,
    student_temperature: float,
    teacher_temperature: float,
    beta: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # [R], [R, V]
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    logits = [student.to(wide) / student_temperature, *(() if teacher is None else teacher.to(wide) / teacher_temperature)]
    if num_classes is not None:
        if ((num_classes < 1) | (num_classes > student.shape[1])).any():
            raise ValueError(f"num_classes must lie in 1 … {student.shape[1]}, the number of columns of student")
        padding = torch.arange(student.shape[1], device=student.device) >= num_classes[:, None]  # [R, V]
        logits = [rows.masked_fill(padding, float("-inf")) for rows in logits]
    log_q, *log_p = (rows.log_softmax(-1) for rows in logits)
    q = log_q.exp()
    if loss == "entropy":
        losses = torch.special.entr(q).sum(-1)
        slope = torch.special.entr(q) - q * losses[:, None]
    else:
        losses, slope = torch.zeros_like(q[:, 0]), torch.zeros_like(q)
        for k, log_p_k in enumerate(log_p):
            weight = torch.full_like(losses, 1 / len(log_p)) if teacher_weights is None else teacher_weights[k].to(wide)
            if loss == "cross_entropy":
                hot = torch.zeros_like(q).scatter_(-1, log_p_k.argmax(-1, keepdim=True), 1)
                log_p_k = hot.log()
            if loss == "cross_entropy" or beta == 0:
                losses += weight * _kl(log_p_k, log_q).sum(-1)
                slope += weight[:, None] * (q - log_p_k.exp())
            else:
                own = 1 - beta or 1.0  # at the limit of 1 relative to 1 − β
                log_m = torch.logaddexp(log_p_k + math.log(beta), log_q + math.log(own)) if beta < 1 else log_p_k
                losses += weight * (beta * _kl(log_p_k, log_m) + own * _kl(log_q, log_m)).sum(-1)
                of_q = torch.where(q == 0, 0, own * q * (log_q - log_m))
                slope += weight[:, None] * (of_q - q * of_q.sum(-1, keepdim=True))
    if row_scale is None:
        return losses, None
    grad = (slope * (row_scale.to(wide) / student_temperature)[:, None]).to(student.dtype)
    return losses, grad if out is None else out.copy_(grad)


def _kl(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    """Of every class; b − a sums to 0, and takes the roundings of both logarithms with it."""
    a = log_a.exp()
    return torch.where(a == 0, 0, a * (log_a - log_b)) + log_b.exp() - a
