"""Sums of rank-one components with a coefficient each, and their gradient: what merges by singular component run on.

Both are one matrix product, which torch's libraries do on every device: the reference is all that there is.
"""

from __future__ import annotations

from typing import Any

import torch

from ..reference.component_sum import component_grad as _component_grad
from ..reference.component_sum import component_sum as _component_sum
from ._common import accumulator, check_dtypes, define, library, shape

define("component_sum(Tensor left, Tensor right, Tensor coefficients) -> Tensor")
define("component_grad(Tensor grad, Tensor left, Tensor right) -> Tensor")


def component_sum(left: torch.Tensor, right: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """Σ_r coefficients[r] · left[:, r] right[:, r]ᵀ. Differentiable in `coefficients`.

    Args:
        left: [m, K], fp32 or fp64; a constant. Of several tasks, the components of one after those of another.
        right: [n, K], likewise.
        coefficients: [K].

    Returns:
        [m, n], all of one dtype.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit, or a factor requires grad.
    """
    _check(left, right, coefficients=coefficients)
    if coefficients.shape != left.shape[1:]:
        raise ValueError(f"coefficients has shape {shape(coefficients)}; with left of {shape(left)} it must be [{left.shape[1]}]")
    return torch.ops.samerge.component_sum(left, right, coefficients)


def component_grad(grad: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """∂loss/∂coefficients of `component_sum`, out[r] = left[:, r]ᵀ grad right[:, r]. Differentiable in `grad`.

    Args:
        grad: [m, n], fp32, bf16, fp16, or fp64 with factors in fp64.
        left, right: as of `component_sum`.

    Returns:
        [K], in the factors' dtype.

    Raises:
        ValueError, TypeError: as `component_sum`.
    """
    _check(left, right, grad=grad)
    if grad.shape != (left.shape[0], right.shape[0]):
        raise ValueError(f"grad has shape {shape(grad)}; with these factors it must be [{left.shape[0]}, {right.shape[0]}]")
    return torch.ops.samerge.component_grad(grad, left, right)


def _check(left: torch.Tensor, right: torch.Tensor, **other: torch.Tensor) -> None:
    check_dtypes(left=left, right=right, **other)
    for name, factor in (("left", left), ("right", right)):
        if factor.dim() != 2 or factor.shape[1] != left.shape[1]:
            raise ValueError(f"{name} has shape {shape(factor)}; left must be [m, K] and right [n, K], left is {shape(left)}")
        if factor.dtype != accumulator(factor) or factor.dtype != left.dtype:
            raise TypeError(f"{name} is {factor.dtype}; both factors must be float32, or both float64")
        if factor.requires_grad:
            raise ValueError(f"{name} requires grad, but factors are constants here; pass {name}.detach()")


def _of_sum(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # [m, n]
    return None, None, torch.ops.samerge.component_grad(grad, *ctx.saved_tensors)


def _of_grad(ctx: Any, coefficients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # [K]
    return torch.ops.samerge.component_sum(*ctx.saved_tensors, coefficients).to(ctx.dtype), None, None


def _keep_of_sum(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _keep_of_grad(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(*inputs[1:])


library.impl("component_sum", _component_sum, "CompositeExplicitAutograd")
library.impl("component_grad", _component_grad, "CompositeExplicitAutograd")
torch.library.register_fake(
    "samerge::component_sum", lambda left, right, coefficients: left.new_empty(left.shape[0], right.shape[0]), lib=library
)
torch.library.register_fake("samerge::component_grad", lambda grad, left, right: left.new_empty(left.shape[1]), lib=library)
torch.library.register_autograd("samerge::component_sum", _of_sum, setup_context=_keep_of_sum, lib=library)
torch.library.register_autograd("samerge::component_grad", _of_grad, setup_context=_keep_of_grad, lib=library)
