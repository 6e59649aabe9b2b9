"""∂loss/∂λ_{t,l} = ⟨G_l, τ_{t,l}⟩ for all task vectors and layers in one pass."""

from __future__ import annotations

from typing import Any

import torch

from .. import backend
from ._common import Quantised, accumulator, check_packed, define, library

define("coefficient_grad(Tensor grad, Tensor task_vectors, Tensor block_layer, SymInt num_layers, Tensor? scales=None) -> Tensor")


def coefficient_grad(
    grad: torch.Tensor, task_vectors: torch.Tensor | Quantised, block_layer: torch.Tensor, num_layers: int
) -> torch.Tensor:
    """Gradient of a loss by the merging coefficients, out[t, l] = Σ over i in layer l of grad[i] · task_vectors[t, i].

    Differentiable in `grad`. On the CPU the result is the same to the bit at any number of threads: a layer is cut
    into fixed segments, and their sums, kept in double, are added in order.

    Args:
        grad: [N], N a multiple of 1,024, the gradient by the merged weights; fp32, bf16, fp16, or all in fp64.
        task_vectors: [T, N], its dtype independent of the gradient's, or QuantisedTaskVectors; a constant.
        block_layer: [N // 1024] int32, non-decreasing, in 0 … num_layers − 1: the layer of every block of 1,024 numbers.
        num_layers: L; a layer without a block gets 0.

    Returns:
        [T, L] fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit, or `task_vectors` requires grad.
    """
    if not isinstance(task_vectors, torch.Tensor):
        check_packed("grad", grad, task_vectors.codes, block_layer, task_vectors.scales)
        parts = task_vectors.codes, block_layer, num_layers, task_vectors.scales
        return task_vectors.of_tasks(torch.ops.samerge.coefficient_grad(grad, *parts))
    check_packed("grad", grad, task_vectors, block_layer)
    return torch.ops.samerge.coefficient_grad(grad, task_vectors, block_layer, num_layers)


def _forward(
    grad: torch.Tensor,
    task_vectors: torch.Tensor,
    block_layer: torch.Tensor,
    num_layers: int,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    return backend.kernel("coefficient_grad", grad)(grad, task_vectors, block_layer, num_layers, scales)


def _fake(
    grad: torch.Tensor,
    task_vectors: torch.Tensor,
    block_layer: torch.Tensor,
    num_layers: int,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    return grad.new_empty(task_vectors.shape[0], num_layers, dtype=accumulator(grad))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    grad, task_vectors, block_layer, _, scales = inputs
    ctx.grad_dtype, ctx.numel = grad.dtype, grad.shape[0]
    ctx.save_for_backward(task_vectors, block_layer, scales)


def _backward(ctx: Any, coefficients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # [T, L]
    task_vectors, block_layer, scales = ctx.saved_tensors
    zero = torch.zeros(ctx.numel, dtype=ctx.grad_dtype, device=task_vectors.device)
    return torch.ops.samerge.weighted_sum(zero, task_vectors, coefficients, block_layer, scales), None, None, None, None


library.impl("coefficient_grad", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("samerge::coefficient_grad", _fake, lib=library)
torch.library.register_autograd("samerge::coefficient_grad", _backward, setup_context=_setup_context, lib=library)
