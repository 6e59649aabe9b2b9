"""out[i] = base[i] + Σ_t coefficients[t, layer(i)] · task_vectors[t, i]."""

import torch

from .dequantised import dequantised


def weighted_sum(
    out: torch.Tensor,  # [N], written
    base: torch.Tensor,  # [N]
    task_vectors: torch.Tensor,  # [T, N], or their codes
    coefficients: torch.Tensor,  # [T, L]
    block_layer: torch.Tensor,  # [N // 1024]
    scales: torch.Tensor | None = None,  # [T, N // 128] of codes
) -> None:
    merged = base.to(coefficients.dtype, copy=True).view(block_layer.numel(), -1 if base.numel() else 1024)  # [B, 1024]
    for t, coefficient in enumerate(coefficients):
        task_vector = task_vectors[t] if scales is None else dequantised(task_vectors[t, None], scales[t, None], merged.dtype)
        blocks = task_vector.to(merged.dtype).view_as(merged)  # [B, 1024]
        merged.addcmul_(blocks, coefficient[block_layer.long(), None])
    out.copy_(merged.view(-1))
