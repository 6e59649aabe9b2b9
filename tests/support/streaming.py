"""Small models for the streamed way to hold a merged model, packed in memory and in a file."""

import copy

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import samerge_ext as sm
from samerge_ext.packing.layout import BLOCK

TASKS = ("red", "green")


class Block(nn.Module):
    def __init__(self, width, dropout):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, dropout=dropout, batch_first=True)  # out_proj's forward never runs
        self.norm = nn.LayerNorm(width)
        self.wide = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, *, scale):
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + scale * self.dropout(self.narrow(F.gelu(self.wide(self.norm(x)))))


class Model(nn.Module):
    """What streaming must get right: blocks, one called twice; tied weights, read outside of their module; a parameter of the
    root; a frozen part; running statistics; dropout."""

    def __init__(self, width=16, blocks=3, dropout=0.0, vocabulary=37):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(1, 5, width))
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(blocks))
        self.norm = nn.BatchNorm1d(5)
        self.frozen = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens) + self.position
        for block in (*self.blocks, self.blocks[0]):
            x = block(x, scale=torch.tensor(0.5, dtype=x.dtype))
        x = torch.tanh(self.frozen(self.norm(x)))
        return (self.head(x) + F.linear(x, self.embedding.weight)).mean(1)


class Chain(nn.Sequential):
    """Three units of a matrix of two blocks and a bias of one."""

    def __init__(self):
        super().__init__(*(nn.Linear(40, 40) for _ in range(3)))


def chain(tasks):
    """A chain, three of them packed, and a batch of every task."""
    torch.manual_seed(0)
    base, *experts = (Chain() for _ in range(1 + len(tasks)))
    batches = {task: [torch.randn(2, 40)] for task in tasks}
    return Chain(), sm.PackedWeights.from_modules(base, dict(zip(tasks, experts, strict=True))), batches


def padded_unit(size):
    """Bytes of a chain's unit in fp32, filled up so that all ranks' parts are of one length."""
    return 4 * size * -(-3 // size) * BLOCK


def make(seed=0, dtype=torch.float64, **settings):
    torch.manual_seed(seed)
    return Model(**settings).to(dtype).eval()


def make_packed(base, scale=0.2, tasks=TASKS, **settings):
    experts = {}
    for task in tasks:
        experts[task] = expert = copy.deepcopy(base)
        with torch.no_grad():
            for name, tensor in expert.named_parameters():
                tensor += 0 if name.startswith("frozen") else scale * torch.randn_like(tensor)
            expert.norm.running_mean += torch.randn(5)
    return sm.PackedWeights.from_modules(base, experts, dtype=next(base.parameters()).dtype, **settings)


def make_batches(count=3, tasks=TASKS):
    torch.manual_seed(5)
    return {task: [torch.randint(37, (4, 5)) for _ in range(count)] for task in tasks}


def logits(module, batch, task):
    return module(batch)


def learn_both(packed, module, batches=None, forward=logits, **settings):
    """The same learned merge, resident and streamed."""
    configs = (sm.SAMergingConfig(progress=False, streamed=streamed, **settings) for streamed in (False, True))
    return [sm.samerging(copy.deepcopy(module), packed, batches or make_batches(), forward, config=c) for c in configs]


def both(**settings):
    packed = make_packed(make(**settings))
    return [sm.MergedModel(make(1, **settings), packed, 0.4, train=True, streamed=streamed) for streamed in (False, True)]


def gradient(model, tokens, seed=9, **autocast):
    model.zero_gradients()
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16, **(autocast or {"enabled": False})):
        outputs = model(tokens)
    outputs.float().square().sum().backward() if autocast else outputs.square().sum().backward()
    return outputs.detach(), model.coefficient_gradient()


def path_of_gradients(module, packed, store, steps=4):
    """∂loss/∂λ [steps, T, L] of a merged model that moves against it: resident without a store, streamed from one."""
    model = sm.MergedModel(module, packed, 0.4, train=True, streamed=store is not None, store=store)
    path = []
    for step in range(steps):
        model.merge()
        path.append(gradient(model, make_batches()["red"][step % 3], seed=step)[1])
        model.coefficients.data -= 1e-5 * path[-1]
    return torch.stack(path)


def packed_twice(folder, base=None):
    """The same packed weights in memory, and in a file."""
    in_file = write_packed(make_packed(base or make()), folder)
    return in_file.in_memory(), in_file


def write_packed(packed, folder):
    """The same in the file ``packed`` of a folder, made of models there."""
    models = {"base": (packed.coefficients(0.0), packed.buffers)}
    models.update({task: (packed.one_hot(task), packed.expert_buffers[task]) for task in packed.tasks})
    paths = {name: folder / f"{name}.safetensors" for name in models}
    for name, (coefficients, buffers) in models.items():
        tensors = {**packed.state_dict(packed.merge(coefficients)), **buffers}
        save_file({n: t.clone() for n, t in tensors.items() if n not in packed.aliases}, paths[name])
    return sm.PackedWeights.from_folders(paths.pop("base"), paths, dtype=packed.base.dtype, file=folder / "packed")
