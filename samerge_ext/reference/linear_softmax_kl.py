"""Losses between rows of logits from hidden states and heads, with all logits at once; see samerge_ext.ops.linear_softmax_kl."""

from collections.abc import Sequence

import torch

from .softmax_kl import softmax_kl


def linear_softmax_kl(
    hidden: torch.Tensor,  # [R, H]
    head: torch.Tensor,  # [V, H]
    bias: torch.Tensor | None,  # [V]
    teacher_hidden: Sequence[torch.Tensor],  # K of [R, H_k]
    teacher_head: Sequence[torch.Tensor],  # K of [V, H_k]
    teacher_bias: Sequence[torch.Tensor],  # K of [V], or none
    teacher_weights: torch.Tensor | None,  # [K, R], None for 1/K
    mask: torch.Tensor | None,  # [R], None for all rows
    row_scale: torch.Tensor | None,  # [R], None for no gradients
    loss: str,
    student_temperature: float,
    teacher_temperature: float,
    beta: float,
    wanted: Sequence[bool] = (True, True, True),
) -> tuple[torch.Tensor, ...]:  # losses [R] and the wanted gradients [R, H], [V, H], [V], else empty
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    kept = slice(None) if mask is None else mask
    biases: Sequence[torch.Tensor | None] = teacher_bias or [None] * len(teacher_head)
    with torch.autocast(hidden.device.type, enabled=False):
        x, weight = hidden[kept].to(wide), head.to(wide)
        taught = [_linear(h[kept], w, b, wide) for h, w, b in zip(teacher_hidden, teacher_head, biases)]
        weights = None if teacher_weights is None else teacher_weights[:, kept]
        scale = torch.zeros_like(x[:, 0]) if row_scale is None else row_scale[kept]
        inputs = (_linear(x, weight, bias, wide), torch.stack(taught) if taught else None, weights, None, scale, None)
        losses = hidden.new_zeros(len(hidden), dtype=wide)
        losses[kept], grad = softmax_kl(*inputs, loss, student_temperature, teacher_temperature, beta)
        assert grad is not None  # since there is a scale
        of = (hidden, head, head[:, 0] if bias is None else bias)
        hidden_grad, head_grad, bias_grad = (like.new_zeros(like.shape if wants else 0) for like, wants in zip(of, wanted))
        if wanted[0]:
            hidden_grad[kept] = (grad @ weight).to(hidden.dtype)
        if wanted[1]:
            head_grad.copy_(grad.t() @ x)
        if wanted[2]:
            bias_grad.copy_(grad.sum(0))
    return losses, hidden_grad, head_grad, bias_grad


def _linear(
    hidden: torch.Tensor, head: torch.Tensor, bias: torch.Tensor | None, wide: torch.dtype
) -> torch.Tensor:  # [R, H], [V, H], [V] -> [R, V]
    logits = hidden.to(wide) @ head.to(wide).t()
    return logits if bias is None else logits + bias.to(wide)
