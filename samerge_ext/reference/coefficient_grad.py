"""out[t, l] = Σ over i in layer l of grad[i] · task_vectors[t, i]."""

import torch

from .dequantised import dequantised


def coefficient_grad(
    grad: torch.Tensor,  # [N]
    task_vectors: torch.Tensor,  # [T, N], or their codes
    block_layer: torch.Tensor,  # [N // 1024]
    num_layers: int,
    scales: torch.Tensor | None = None,  # [T, N // 128] of codes
) -> torch.Tensor:  # [T, L]
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    out = torch.zeros(task_vectors.shape[0], num_layers, dtype=dtype, device=grad.device)
    blocks = grad.to(dtype).reshape(-1, 1024)  # [B, 1024]
    for t, row in enumerate(out):
        task_vector = task_vectors[t] if scales is None else dequantised(task_vectors[t, None], scales[t, None], dtype)
        per_block = (blocks * task_vector.to(dtype).reshape(-1, 1024)).sum(1)  # [B]
        row.index_add_(0, block_layer.long(), per_block)
    return out
