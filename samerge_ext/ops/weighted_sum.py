"""θ(λ) = θ₀ + Σ_t λ_t τ_t over all layers at once."""

from __future__ import annotations

from typing import Any

import torch

from .. import backend
from ._common import Quantised, accumulator, check_devices, check_packed, define, library, shape

# With scales, task_vectors holds the codes of QuantisedTaskVectors.
_INPUTS = "Tensor base, Tensor task_vectors, Tensor coefficients, Tensor block_layer, Tensor? scales=None"
define(f"weighted_sum({_INPUTS}) -> Tensor")
define(f"weighted_sum_out(Tensor(a!) out, {_INPUTS}) -> ()")


def weighted_sum(
    base: torch.Tensor,
    task_vectors: torch.Tensor | Quantised,
    coefficients: torch.Tensor,
    block_layer: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Merged weights, out[i] = base[i] + Σ_t coefficients[t, layer(i)] · task_vectors[t, i] (arXiv 2212.04089, eq. 1,
    with one coefficient per layer as in arXiv 2310.02575).

    Differentiable in `coefficients` (through `coefficient_grad`) and in `base`. Sums are kept in fp32, in fp64 for
    fp64 inputs. Rows of `task_vectors` may lie apart in memory; where the numbers of a row do, they are copied first.

    Args:
        base: [N], N a multiple of 1,024; fp32, bf16 or fp16, or fp64 with everything else in fp64.
        task_vectors: [T, N], its dtype independent of the base's, or QuantisedTaskVectors, which are read as they are
            stored; a constant.
        coefficients: [T, L] fp32 (fp64 where base is fp64).
        block_layer: [N // 1024] int32, non-decreasing, in 0 … L − 1: the layer of every block of 1,024 numbers.
        out: [N], contiguous, of a dtype of its own: written in place and returned, outside autograd.

    Returns:
        [N], of the base's dtype, or `out`.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit, or `task_vectors` requires grad.
        RuntimeError: `out` is given while an input requires grad and grad mode is on.
    """
    if isinstance(task_vectors, torch.Tensor):
        stored, scales = task_vectors, None
    else:
        stored, scales = task_vectors.codes, task_vectors.scales
    check_packed("base", base, stored, block_layer, scales)
    if coefficients.dim() != 2 or coefficients.shape[0] != task_vectors.shape[0]:
        raise ValueError(
            f"coefficients has shape {shape(coefficients)}; with task_vectors of {list(task_vectors.shape)} it must be "
            f"[{task_vectors.shape[0]}, L]"
        )
    if coefficients.dtype != accumulator(base):
        raise TypeError(f"coefficients is {coefficients.dtype}; with base of {base.dtype} it must be {accumulator(base)}")
    check_devices(base=base, coefficients=coefficients)
    if not isinstance(task_vectors, torch.Tensor):
        coefficients = task_vectors.of_rows(coefficients)
    if out is None:
        return torch.ops.samerge.weighted_sum(base, stored, coefficients, block_layer, scales)

    if torch.is_grad_enabled() and (base.requires_grad or coefficients.requires_grad or out.requires_grad):
        raise RuntimeError(
            "weighted_sum(out=...) is not differentiable, but an argument requires grad; call it under torch.no_grad() "
            "or without out="
        )
    if out.shape != base.shape or not out.is_contiguous():
        raise ValueError(f"out has shape {shape(out)} and stride {out.stride()}; it must be contiguous, {shape(base)}")
    check_packed("out", out, stored, block_layer, scales)
    torch.ops.samerge.weighted_sum_out(out, base, stored, coefficients, block_layer, scales)
    return out


def _forward(
    base: torch.Tensor,
    task_vectors: torch.Tensor,
    coefficients: torch.Tensor,
    block_layer: torch.Tensor,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    out = torch.empty_like(base, memory_format=torch.contiguous_format)
    backend.kernel("weighted_sum", base)(out, base, task_vectors, coefficients, block_layer, scales)
    return out


def _forward_out(
    out: torch.Tensor,
    base: torch.Tensor,
    task_vectors: torch.Tensor,
    coefficients: torch.Tensor,
    block_layer: torch.Tensor,
    scales: torch.Tensor | None = None,
) -> None:
    backend.kernel("weighted_sum", base)(out, base, task_vectors, coefficients, block_layer, scales)


def _mark_written(keyset: torch._C.DispatchKeySet, out: torch.Tensor, *args: torch.Tensor | None) -> None:
    """Bumps the version counter, so that autograd notices a merge between a forward and its backward."""
    torch.autograd.graph.increment_version(out)
    with torch._C._AutoDispatchBelowADInplaceOrView():
        below = keyset & torch._C._after_ADInplaceOrView_keyset
        return torch.ops.samerge.weighted_sum_out.default.redispatch(below, out, *args)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    base, task_vectors, coefficients, block_layer, scales = inputs
    ctx.base_dtype, ctx.num_layers = base.dtype, coefficients.shape[1]
    ctx.save_for_backward(task_vectors, block_layer, scales)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # [N]
    needs_base, needs_coefficients = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
    grad_base = grad.to(ctx.base_dtype) if needs_base else None
    grad_coefficients = None
    if needs_coefficients:
        task_vectors, block_layer, scales = ctx.saved_tensors
        grad_coefficients = torch.ops.samerge.coefficient_grad(grad, task_vectors, block_layer, ctx.num_layers, scales)
    return grad_base, None, grad_coefficients, None, None


library.impl("weighted_sum", _forward, "CompositeExplicitAutograd")
library.impl("weighted_sum_out", _forward_out, "CompositeExplicitAutograd")
library.impl("weighted_sum_out", _mark_written, "ADInplaceOrView", with_keyset=True)
torch.library.register_fake("samerge::weighted_sum", lambda base, *_: base.new_empty(base.shape), lib=library)
torch.library.register_fake("samerge::weighted_sum_out", lambda *_: None, lib=library)
torch.library.register_autograd("samerge::weighted_sum", _backward, setup_context=_setup_context, lib=library)
