"""The published SAMerging step, rewritten literally as a baseline: what its users run today.

Rewritten from the description of FusionBench's fork at commit a194e8e, not copied: the merged weights are an autograd
graph over λ built once a step; every task's loss is a KL through softmax().log() and its backward runs through that whole
graph; both passes of SAM use the weights merged before the step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call


class PublishedMerge:
    """A base module and T task vectors as state dicts, merged with autograd through λ [T, L]."""

    def __init__(self, module: nn.Module, task_vectors: list[dict[str, Tensor]], coefficient: float):
        self.module = module.requires_grad_(False)
        self.base = dict(module.named_parameters())
        self.task_vectors = task_vectors
        self.coefficients = nn.Parameter(torch.full((len(task_vectors), len(self.base)), coefficient))
        self.optimizer = torch.optim.Adam([self.coefficients], lr=1e-3, weight_decay=5e-4)
        self.merge()

    def merge(self) -> None:
        self.merged = dict(self.base)
        for row, task_vector in zip(self.coefficients, self.task_vectors, strict=True):
            for coefficient, (name, difference) in zip(row, task_vector.items(), strict=True):
                self.merged[name] = self.merged[name] + difference * coefficient

    def step(self, batches: list[Tensor], heads: list[Tensor], teachers: list[Tensor], forward, rho: float = 0.07) -> None:
        """One SAM step; batches, heads and teacher logits [B, V] per task."""
        self._backward(batches, heads, teachers, forward)
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

    def _backward(self, batches, heads, teachers, forward, temperature: float = 2.0) -> None:
        for batch, head, teacher in zip(batches, heads, teachers, strict=True):
            features = forward(lambda x: functional_call(self.module, self.merged, x), batch)
            student = (features @ head / temperature).softmax(-1)
            target = (teacher / temperature).softmax(-1)
            loss = (target * (target.log() - student.log())).sum(-1).mean()
            loss.backward(retain_graph=True)
