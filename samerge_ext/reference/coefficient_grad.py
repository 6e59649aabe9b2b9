"""out[t, l] = Σ over i in layer l of grad[i] · task_vectors[t, i]."""

import torch


def coefficient_grad(
    grad: torch.Tensor,  # [N]
    task_vectors: torch.Tensor,  # [T, N]
    block_layer: torch.Tensor,  # [N // 1024]
    num_layers: int,
) -> torch.Tensor:  # [T, L]
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    out = torch.zeros(task_vectors.shape[0], num_layers, dtype=dtype, device=grad.device)
    blocks = grad.to(dtype).reshape(-1, 1024)  # [B, 1024]
    for row, task_vector in zip(out, task_vectors):
        per_block = (blocks * task_vector.to(dtype).reshape(-1, 1024)).sum(1)  # [B]
        row.index_add_(0, block_layer.long(), per_block)
    return out
