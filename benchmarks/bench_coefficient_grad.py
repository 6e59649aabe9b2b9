"""coefficient_grad, ⟨G_l, τ_{t,l}⟩ for all tasks and layers: must read gradient and task vectors, (T + 1) N numbers, or
fewer bytes where task vectors are quantised.

A candidate takes the inputs (gradient [N], task_vectors [T, N], block_layer [N // 1024]), prepares what is not to be timed, and
returns the call that is. The call returns ∂loss/∂λ [T, L].
"""

import torch
from cases import packed_cases
from inputs import PackedInputs
from published import merged_layers

import samerge_ext as sm
from samerge_ext.packing.quantised import FORMATS


def ours(x: PackedInputs):
    return lambda: sm.coefficient_grad(x.gradient, x.task_vectors, x.block_layer, x.num_layers)


def quantised(form: str):
    """Ours on quantised task vectors, which are fewer bytes."""

    def candidate(x: PackedInputs):
        task_vectors = x.quantised(form)
        return lambda: sm.coefficient_grad(x.gradient, task_vectors, x.block_layer, x.num_layers)

    return candidate


def published(x: PackedInputs):
    """The backward pass through the merge."""
    coefficients = x.coefficients.clone().requires_grad_()
    merged = merged_layers(x.layers(x.base), [x.layers(row) for row in x.task_vectors], coefficients)
    gradient = x.layers(x.gradient)
    return lambda: torch.autograd.grad(merged, coefficients, gradient, retain_graph=True)[0]


def mv(x: PackedInputs):
    layers = [(x.task_vectors[:, span], x.gradient[span]) for span in x.spans]
    return lambda: torch.stack([stack @ gradient for stack, gradient in layers], 1)  # [T, n] @ [n]


def bmm(x: PackedInputs):
    stack, gradient = x.task_vectors.view(x.num_tasks, -1, 1024).transpose(0, 1), x.gradient.view(-1, 1024, 1)
    layers = x.block_layer.long()

    def contract():
        blocks = torch.bmm(stack, gradient).squeeze(-1).float()  # [B, T, 1024] @ [B, 1024, 1]
        return blocks.new_zeros(x.num_layers, x.num_tasks).index_add_(0, layers, blocks).T

    return contract


def compiled(x: PackedInputs):
    layers = x.block_layer.long()

    @torch.compile(dynamic=False)
    def contract(gradient, task_vectors):
        products = task_vectors.view(x.num_tasks, -1, 1024).float() * gradient.view(-1, 1024).float()
        return products.new_zeros(x.num_tasks, x.num_layers).index_add_(1, layers, products.sum(-1))

    return lambda: contract(x.gradient, x.task_vectors)


CASES = packed_cases
CANDIDATES = {"published": published, "mv by layer": mv, "bmm by block": bmm, "torch.compile": compiled}
CANDIDATES |= {f"samerge {form}": quantised(form) for form in FORMATS}


def bench_coefficient_grad(x, candidate, measure):
    stored = x.stored(candidate)
    measure(
        candidate,
        work=stored.nbytes + x.gradient.nbytes,
        operations=2 * x.task_vectors.numel(),
        error_of=lambda gradient: x.error_of_coefficient_grad(gradient, stored),
    )
