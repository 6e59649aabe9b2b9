"""Experts with heads of their own, a merge that learns them, and its loss in plain autograd."""

import copy

import literal
import tiny
import torch
from torch import nn
from torch.func import functional_call

import samerge_ext as sm

HEADS = "head.*"


class Classifier(tiny.Encoder):
    """The encoder with a head of its own, which the forward reads."""

    def __init__(self, classes=2):
        super().__init__()
        self.head = nn.Linear(tiny.WIDTH, classes)

    def forward(self, x):
        return self.head(super().forward(x))


def make(seed, classes=2, dtype=torch.float64):
    torch.manual_seed(seed)
    return Classifier(classes).to(dtype).eval()


def make_problem(dtype=torch.float64, head_scale=1):
    """base, experts with heads of their classes, and packed weights."""
    base = make(0, dtype=dtype)
    encoder = tiny.make(0, dtype)
    base.load_state_dict(encoder.state_dict(), strict=False)
    experts = {}
    for seed, (task, expert) in enumerate(tiny.make_experts(encoder).items()):
        experts[task] = make(200 + seed, tiny.CLASSES[task], dtype)
        experts[task].load_state_dict(expert.state_dict(), strict=False)
        experts[task].head.weight.data *= head_scale
    packed = sm.PackedWeights.from_modules(base, experts, dtype=dtype, heads=HEADS)
    return base, experts, packed


def logits(module, batch, task):
    return module(batch)


def given_heads(experts):
    return {task: copy.deepcopy(expert.head) for task, expert in experts.items()}


def with_given(heads):
    """A shared encoder, and heads that are modules of their own."""
    return sm.models.SharedEncoder(
        lambda module, batch: tiny.Encoder.forward(module, batch), lambda features, task: heads[task](features)
    )


def run(packed, forward=logits, heads=None, batches=None, module=None, **settings):
    settings = {"steps": 6, "progress": False, "train_heads": HEADS, "head_learning_rate": 0.01, "held_back": 0, **settings}
    batches = batches or tiny.make_batches(count=4)
    config = sm.SAMergingConfig(**settings)
    return sm.samerging(module or make(1), packed, batches, forward, config=config, heads=heads)


def flat(heads):
    return torch.cat([tensor.double().flatten() for head in heads.values() for tensor in head.values()])


def relative(found, truth):
    return ((found - truth).norm() / truth.norm()).item()


def literal_loss(base, experts, coefficients, heads, batches, indices, temperature=2.0):
    """Σ_t of the KL from expert t, in plain autograd; heads: task -> {name: tensor}."""
    weights = literal.merged_parameters(encoder_of(base), {t: encoder_of(e) for t, e in experts.items()}, coefficients)
    buffers = literal.averaged_buffers(encoder_of(base), {t: encoder_of(e) for t, e in experts.items()})
    total = 0.0
    for task, expert in experts.items():
        losses = []
        for index in indices:
            batch = batches[task][index]
            features = functional_call(encoder_of(base), {**weights, **buffers}, (batch,))
            student = features @ heads[task]["head.weight"].T + heads[task]["head.bias"]
            losses.append(literal.kl(student, expert(batch).detach(), temperature))
        total = total + sum(losses) / len(losses)
    return total


def encoder_of(model):
    encoder = tiny.make(0)
    encoder.load_state_dict({name: value for name, value in model.state_dict().items() if not name.startswith("head")})
    return encoder


def start_of(experts):
    return {t: {n: p.detach().clone() for n, p in e.named_parameters() if n.startswith("head")} for t, e in experts.items()}
