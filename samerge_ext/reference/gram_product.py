"""z = q WᵀW or q WWᵀ, whichever is smaller, W = scale · (base + matrix)."""

import torch


def gram_product(
    matrices: list[torch.Tensor],  # B of [m, n]
    bases: list[torch.Tensor],  # none, or B of [m, n]
    q: torch.Tensor,  # [B, width, min(m, n)]
    scale: torch.Tensor,  # [B]
) -> torch.Tensor:  # [B, width, min(m, n)]
    z = torch.empty_like(q, memory_format=torch.contiguous_format)
    for i, matrix in enumerate(matrices):
        weight = matrix.to(q.dtype, copy=True)  # [m, n]
        if bases:
            weight += bases[i].to(q.dtype)
        weight *= scale[i]
        if weight.shape[0] < weight.shape[1]:
            weight = weight.mT
        z[i] = (q[i] @ weight.mT) @ weight
    return z
