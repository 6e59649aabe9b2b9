"""weighted_sum, θ₀ + Σ_t λ_t τ_t over all layers: must read base and task vectors and write the sum, (T + 2) N numbers, or
fewer bytes where task vectors are quantised.

A candidate takes the inputs (base [N], task_vectors [T, N], coefficients [T, L], block_layer [N // 1024], out [N]), prepares
what is not to be timed, and returns the call that is. The call returns the merged weights, [N] or a list of layers.
"""

import torch
from cases import packed_cases
from inputs import PackedInputs
from published import merged_layers

import samerge_ext as sm
from samerge_ext.packing.quantised import FORMATS


def ours(x: PackedInputs):
    return lambda: sm.weighted_sum(x.base, x.task_vectors, x.coefficients, x.block_layer, out=x.out)


def quantised(form: str):
    """Ours on quantised task vectors, which are fewer bytes."""

    def candidate(x: PackedInputs):
        task_vectors = x.quantised(form)
        return lambda: sm.weighted_sum(x.base, task_vectors, x.coefficients, x.block_layer, out=x.out)

    return candidate


def published(x: PackedInputs):
    base, task_vectors = x.layers(x.base), [x.layers(row) for row in x.task_vectors]
    coefficients = x.coefficients.clone().requires_grad_()
    return lambda: merged_layers(base, task_vectors, coefficients)


def foreach(x: PackedInputs):
    out, base, task_vectors = x.layers(x.out), x.layers(x.base), [x.layers(row) for row in x.task_vectors]
    coefficients = x.coefficients.tolist()

    def merge():
        torch._foreach_copy_(out, base)
        for task_vector, coefficient in zip(task_vectors, coefficients, strict=True):
            torch._foreach_add_(out, torch._foreach_mul(task_vector, coefficient))
        return out

    return merge


def addmv(x: PackedInputs):
    layers = [(x.base[span], x.task_vectors[:, span].T, x.out[span]) for span in x.spans]
    coefficients = x.coefficients.to(x.base.dtype).T.contiguous()  # [L, T]

    def merge():
        for (base, stack, out), coefficient in zip(layers, coefficients, strict=True):
            torch.addmv(base, stack, coefficient, out=out)  # [n] + [n, T] @ [T]
        return [out for _, _, out in layers]

    return merge


def compiled(x: PackedInputs):
    @torch.compile(dynamic=False)
    def merge(base, task_vectors, coefficients, layers):
        blocks = task_vectors.view(len(task_vectors), -1, 1024)  # [T, B, 1024]
        return (base.view(-1, 1024) + (coefficients[:, layers, None] * blocks).sum(0)).to(base.dtype).view(-1)

    return lambda: merge(x.base, x.task_vectors, x.coefficients, x.block_layer)


CASES = packed_cases
CANDIDATES = {"published": published, "_foreach": foreach, "addmv by layer": addmv, "torch.compile": compiled}
CANDIDATES |= {f"samerge {form}": quantised(form) for form in FORMATS}


def bench_weighted_sum(x, candidate, measure):
    stored = x.stored(candidate)
    measure(
        candidate,
        work=stored.nbytes + 2 * x.base.nbytes,
        operations=2 * x.task_vectors.numel(),
        error_of=lambda merged: x.error_of_merged(merged, stored),
    )
