"""The published SAMerging step, rewritten literally as a baseline: what its users run today.

Rewritten from the description of FusionBench's fork at commit a194e8e, not copied: the merged weights are an autograd
graph over λ built once a step; every task's loss is a KL through softmax().log() and its backward runs through that whole
graph; both passes of SAM use the weights merged before the step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call


def merged_layers(base: list[Tensor], task_vectors: list[list[Tensor]], coefficients: Tensor) -> list[Tensor]:
    """Base and T task vectors as lists of L layers, merged at coefficients [T, L] task by task and layer by layer."""
    merged = list(base)
    for row, task_vector in zip(coefficients, task_vectors, strict=True):
        for layer, (coefficient, difference) in enumerate(zip(row, task_vector, strict=True)):
            merged[layer] = merged[layer] + difference * coefficient
    return merged


def softmax_log_kl(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """KL of logits [R, V], mean over the rows."""
    q, p = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    return (p * (p.log() - q.log())).sum(-1).mean()


class PublishedMerge:
    """A base module and T task vectors as lists of its parameters, merged with autograd through λ [T, L]."""

    def __init__(self, module: nn.Module, task_vectors: list[list[Tensor]], coefficient: float):
        self.module = module.requires_grad_(False)
        self.base = dict(module.named_parameters())
        self.task_vectors = task_vectors
        shape, device = (len(task_vectors), len(self.base)), next(iter(self.base.values())).device
        self.coefficients = nn.Parameter(torch.full(shape, coefficient, device=device))
        self.optimizer = torch.optim.Adam([self.coefficients], lr=1e-3, weight_decay=5e-4)
        self.merge()

    def merge(self) -> None:
        layers = merged_layers(list(self.base.values()), self.task_vectors, self.coefficients)
        self.merged = dict(zip(self.base, layers, strict=True))

    def step(self, batches: list[Tensor], heads: list[Tensor], teachers: list[Tensor], forward, rho: float = 0.07) -> Tensor:
        """One SAM step; batches, heads and teacher logits [B, V] per task. Returns the first gradient [T, L]."""
        self._backward(batches, heads, teachers, forward)
        first = self.coefficients.grad
        with torch.no_grad():
            epsilon = rho * self.coefficients.grad / self.coefficients.grad.norm()
            self.coefficients.add_(epsilon)
        self.coefficients.grad = None
        self._backward(batches, heads, teachers, forward)
        with torch.no_grad():
            self.coefficients.sub_(epsilon)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.merge()
        return first

    def _backward(self, batches, heads, teachers, forward) -> None:
        for batch, head, teacher in zip(batches, heads, teachers, strict=True):
            features = forward(lambda x: functional_call(self.module, self.merged, x), batch)
            softmax_log_kl(features @ head, teacher).backward(retain_graph=True)
