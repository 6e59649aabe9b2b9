"""out[i] = base[i] + Σ_t coefficients[t, layer(i)] · task_vectors[t, i]."""

import torch


def weighted_sum(
    out: torch.Tensor,  # [N], written
    base: torch.Tensor,  # [N]
    task_vectors: torch.Tensor,  # [T, N]
    coefficients: torch.Tensor,  # [T, L]
    block_layer: torch.Tensor,  # [N // 1024]
) -> None:
    merged = base.to(coefficients.dtype, copy=True).view(block_layer.numel(), -1 if base.numel() else 1024)  # [B, 1024]
    for task_vector, coefficient in zip(task_vectors, coefficients):
        blocks = task_vector.to(coefficients.dtype).view_as(merged)  # [B, 1024]
        merged.addcmul_(blocks, coefficient[block_layer.long(), None])
    out.copy_(merged.view(-1))
