"""Models small enough to follow by hand: a shared encoder with BatchNorm and a tied pair, frozen heads per task."""

import torch
from torch import nn

from samerge_ext import PackedWeights, StatsMergeLearner, StatsMergingConfig
from samerge_ext.methods.statsmerging import learner_settings
from samerge_ext.models import SharedEncoder
from samerge_ext.statistics.features import Features

TASKS = ("red", "green", "blue")
CLASSES = {"red": 3, "green": 5, "blue": 2}
WIDTH = 8
LEARNERS = {
    "shared": {},
    "whole model too": {"whole_model": True},
    "per layer": {"per_layer": True},
    "task-wise": {"granularity": "task"},
}


class Encoder(nn.Module):
    """Two linear layers around a BatchNorm, and a projection tied to the first layer's weight."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.second = nn.Linear(WIDTH, 2 * WIDTH)
        self.frozen = nn.Linear(2 * WIDTH, WIDTH)
        self.tied = nn.Linear(WIDTH, WIDTH, bias=False)
        self.tied.weight = self.first.weight

    def forward(self, x):
        x = torch.tanh(self.norm(self.first(x)))
        return self.tied(self.frozen(torch.tanh(self.second(x))))


def make(seed, dtype=torch.float64):
    torch.manual_seed(seed)
    return Encoder().to(dtype).eval()


def make_experts(base, scale=0.3, tasks=TASKS):
    """Experts that differ from the base everywhere but in `frozen`, BatchNorm statistics included."""
    experts = {}
    for seed, task in enumerate(tasks):
        torch.manual_seed(100 + seed)
        expert = Encoder().to(next(base.parameters()).dtype).eval()
        expert.load_state_dict(base.state_dict())
        with torch.no_grad():
            for name, tensor in expert.named_parameters():
                if not name.startswith("frozen"):
                    tensor += scale * torch.randn_like(tensor)
            expert.norm.running_mean += 0.1 * torch.randn(WIDTH)
            expert.norm.running_var *= 1 + torch.rand(WIDTH)
        experts[task] = expert
    return experts


def make_heads(dtype=torch.float64, tasks=TASKS):
    generator = torch.Generator().manual_seed(7)
    return {t: torch.randn(WIDTH, CLASSES[t], generator=generator, dtype=torch.float64).to(dtype) for t in tasks}


def make_batches(count=3, rows=6, dtype=torch.float64, tasks=TASKS):
    generator = torch.Generator().manual_seed(11)

    def batch():
        return torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64).to(dtype)

    return {task: [batch() for _ in range(count)] for task in tasks}


def shared_encoder(heads):
    return SharedEncoder(lambda module, batch: module(batch), lambda features, task: features @ heads[task])


def plain(heads):
    return lambda module, batch, task: module(batch) @ heads[task]


def plain_modules(heads):
    return lambda module, batch, task: heads[task](module(batch))


def make_learner(packed, granularity="layer", seed=0, **settings):
    """A learner at its start, and the statistics that it reads."""
    config = StatsMergingConfig(granularity=granularity, **{"hidden": 8, **settings})
    features = Features.of_packed(packed, of=config.of, singular_values=config.singular_values)
    statistics = features.of_granularity(granularity, config.whole_model)
    settings = learner_settings(config, packed.layout.names)
    return StatsMergeLearner.made_for(statistics, settings, start=0.3, seed=seed, dtype=packed.coefficient_dtype), statistics


def make_problem():
    """base, experts, packed weights, heads and batches, in fp64."""
    base = make(0)
    experts = make_experts(base)
    packed = PackedWeights.from_modules(base, experts, dtype=torch.float64)
    return base, experts, packed, make_heads(), make_batches()


class Interrupted(Exception):
    pass


def interrupt_after(passes):
    """A logits function that fails after so many passes with a gradient."""
    heads, left = make_heads(), passes * len(TASKS)

    def logits(module, batch, task):
        nonlocal left
        left -= torch.is_grad_enabled()
        if left < 0:
            raise Interrupted
        return module(batch) @ heads[task]

    return logits
