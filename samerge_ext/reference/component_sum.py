"""Σ_r c_r l_r r_rᵀ, and ⟨G, l_r r_rᵀ⟩, the diagonal of LᵀGR: one matrix product each."""

import torch


def component_sum(
    left: torch.Tensor,  # [m, K]
    right: torch.Tensor,  # [n, K]
    coefficients: torch.Tensor,  # [K]
) -> torch.Tensor:  # [m, n]
    with torch.autocast(left.device.type, enabled=False):
        return (left * coefficients) @ right.mT


def component_grad(
    grad: torch.Tensor,  # [m, n]
    left: torch.Tensor,  # [m, K]
    right: torch.Tensor,  # [n, K]
) -> torch.Tensor:  # [K]
    with torch.autocast(left.device.type, enabled=False):
        return ((grad.to(left.dtype) @ right) * left).sum(0)
