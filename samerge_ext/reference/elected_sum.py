"""The sum of the task vectors that agree with the sign of their sum; see samerge_ext.ops.elected_sum."""

import torch


def elected_sum(
    base: torch.Tensor,  # [N]
    task_vectors: torch.Tensor,  # [T, N]
    weights: torch.Tensor,  # [T]
    scale: float,
    normalize: bool,
) -> torch.Tensor:  # [N]
    rounded = weights.to(task_vectors.dtype)[:, None]
    values, weights = (task_vectors * rounded).to(weights.dtype), rounded.to(weights.dtype)  # [T, N], [T, 1]
    total = torch.zeros_like(base, dtype=weights.dtype)
    for row in values:
        total += row
    agrees = torch.where(total >= 0, values > 0, values < 0)  # [T, N]
    merged = torch.where(agrees, values, 0).sum(0)
    if normalize:
        divisor = torch.where(agrees, weights, 0).sum(0)
        merged /= torch.where(divisor == 0, 1, divisor)
    merged = torch.where(total.isnan(), total, merged)
    return (base.to(weights.dtype) + scale * merged).to(base.dtype)
