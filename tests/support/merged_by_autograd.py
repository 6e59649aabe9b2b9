"""The truth of wrappers of merged models: plain autograd, tensor by tensor, on tiny models."""

import copy

import torch
from tiny import make, make_experts
from torch.func import functional_call


def problem(dtype=torch.float64):
    """A base whose `frozen` requires no grad, and experts that differ from it everywhere else."""
    base = make(0, dtype)
    base.frozen.requires_grad_(False)
    return base, list(make_experts(base).values())


def names_of(base):
    return [name for name, parameter in base.named_parameters() if parameter.requires_grad]


def weights(*shape, low=0.1, high=0.5):
    generator = torch.Generator().manual_seed(3)
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


class Literal:
    """θ₀ + Σ_t λ_t,l m_l τ_t,l in plain autograd, tensor by tensor; λ [T, L] is a function of what is learned."""

    def __init__(self, learned, base, experts, coefficients=lambda learned: learned, change=lambda task_vector: task_vector):
        self.learned, self.base, self.coefficients = learned.clone().requires_grad_(), copy.deepcopy(base), coefficients
        self.names = names_of(base)
        own, tuned = dict(self.base.named_parameters()), [dict(expert.named_parameters()) for expert in experts]
        self.task_vectors = [[change((t[n] - own[n]).detach().clone()) for n in self.names] for t in tuned]
        self.base.requires_grad_(False)

    def merge(self, mask=None):
        coefficients, own = self.coefficients(self.learned), dict(self.base.named_parameters())
        self.merged = {}
        for l, name in enumerate(self.names):
            parts = [coefficients[t, l] * self.task_vectors[t][l] for t in range(len(self.task_vectors))]
            self.merged[name] = own[name] + sum(parts) * (1.0 if mask is None else mask[name])
        return self.merged

    def __call__(self, x):
        return functional_call(self.base, self.merged, x)
