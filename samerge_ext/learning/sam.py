"""Sharpness-Aware Minimisation of a loss over the merging coefficients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Loss [] and gradient, shaped like the coefficients, at given coefficients.
Gradient = Callable[[Tensor], tuple[Tensor, Tensor]]


def perturbation(coefficients: Tensor, gradient: Tensor, rho: float, adaptive: bool = False) -> Tensor:
    """The step ε to where the loss is worst near λ, to first order; zero where its norm would be zero.

    plain: ε = ρ g / ‖g‖₂ (Foret et al. 2021, eq. 2); adaptive: ε = ρ λ²∘g / ‖|λ|∘g‖₂ (Kwon et al. 2021, eq. 3).
    """
    scale = coefficients.abs() if adaptive else torch.ones_like(coefficients)
    norm = torch.linalg.vector_norm(scale * gradient)
    direction = scale.square() * gradient / norm
    return torch.where(norm > 0, rho * direction, torch.zeros_like(direction))


def sam_gradient(
    gradient_at: Gradient, coefficients: Tensor, rho: float, adaptive: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Two passes: the loss and gradient at λ, then the gradient at λ + ε with the weights merged there.

    Returns the loss at λ, the gradient at λ and the gradient at λ + ε, the one to step with.
    """
    loss, gradient = gradient_at(coefficients)
    _, sharp = gradient_at(coefficients + perturbation(coefficients, gradient, rho, adaptive))
    return loss, gradient, sharp
