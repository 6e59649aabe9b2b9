"""RegMean and RegMean++ beside their definitions, with inputs computed by hand and torch.linalg.inv in fp64."""

import copy
import warnings

import pytest
import tiny
import torch
from helpers import assert_close
from matrices import assert_near
from torch import nn
from torch.func import functional_call

import samerge_ext as sm
from samerge_ext.methods.regmean import _solution

ALPHA = 0.9


def shrunk(inputs, alpha=ALPHA):
    """G of rows [rows, n]."""
    gram = inputs.mT @ inputs / len(inputs)
    return alpha * gram + (1 - alpha) * torch.diag(gram.diagonal())


def literal(weights, inputs, alpha=ALPHA):
    """T weights [m, n] and rows [rows, n] -> the nearest weight, in the weights themselves, as published."""
    grams = [shrunk(rows, alpha) for rows in inputs]
    return sum(w @ g for w, g in zip(weights, grams, strict=True)) @ torch.linalg.inv(sum(grams))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Tower(nn.Module):
    """Two blocks, which are units, behind a linear layer, which is none; `idle` is never run."""

    def __init__(self, width=6):
        super().__init__()
        self.blocks = nn.ModuleList([Block(width) for _ in range(2)])
        self.stem = nn.Linear(4, width)
        self.idle = nn.Linear(3, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x.flatten(1)


TASKS = ("red", "green", "blue")
logits = lambda module, batch, task: module(batch)


def made(kind=Tower, dtype=torch.float64):
    torch.manual_seed(0)
    base = kind().to(dtype)
    experts = {task: copy.deepcopy(base) for task in TASKS}
    for expert in experts.values():
        for parameter in expert.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    batches = {task: [torch.randn(5, 3, 4, dtype=dtype) for _ in range(2 + row)] for row, task in enumerate(TASKS)}
    return base, experts, batches


def pack(base, experts, **settings):
    return sm.PackedWeights.from_modules(base, experts, **{"dtype": torch.float64, **settings})


def average(experts):
    return {name: sum(e.state_dict()[name] for e in experts.values()) / len(experts) for name in experts["red"].state_dict()}


def unit_inputs(block, x):
    """What the two linear layers of a block are given, and what it gives."""
    up = block.norm(x)
    return up, torch.tanh(block.up(up)), block(x)


def flat(x):
    return x.reshape(-1, x.shape[-1])


def literal_tower(base, experts, batches, merged_inputs):
    """By hand, layer by layer: the inputs are those of the expert itself, or of the merged model before its unit."""
    found = average(experts)
    rows = {task: torch.cat(batches[task]) for task in TASKS}
    weights = lambda name: [expert.get_parameter(name) for expert in experts.values()]
    found["stem.weight"] = literal(weights("stem.weight"), [flat(x) for x in rows.values()])
    merged = copy.deepcopy(base)
    merged.load_state_dict(found)
    x = {task: (merged if merged_inputs else experts[task]).stem(rows[task]) for task in TASKS}
    for b in range(2):
        up, down, out = zip(*(unit_inputs(experts[task].blocks[b], x[task]) for task in TASKS), strict=True)
        found[f"blocks.{b}.up.weight"] = literal(weights(f"blocks.{b}.up.weight"), map(flat, up))
        found[f"blocks.{b}.down.weight"] = literal(weights(f"blocks.{b}.down.weight"), map(flat, down))
        merged.load_state_dict(found)
        x = {task: merged.blocks[b](x[task]) if merged_inputs else out[row] for row, task in enumerate(TASKS)}
    return {name: tensor.detach() for name, tensor in found.items()}


@pytest.mark.parametrize("inputs", ["experts", "merged"])
def test_it_is_what_its_paper_says(inputs):
    base, experts, batches = made()
    truth = literal_tower(base, experts, batches, inputs == "merged")
    with pytest.warns(UserWarning, match=r"no batch runs through the linear layers \['idle.weight'\], which are averaged"):
        result = sm.regmean(copy.deepcopy(base), pack(base, experts), batches, logits, inputs=inputs)
    assert result.method == {"experts": "regmean", "merged": "regmean++"}[inputs] and result.coefficients is None
    for name, tensor in result.state_dict().items():
        assert_near(tensor, truth[name], name, 1e-10)
        assert torch.equal(result.module.get_parameter(name), tensor)


def test_both_kinds_of_inputs_differ():
    base, experts, batches = made()
    first, second = (literal_tower(base, experts, batches, merged) for merged in (False, True))
    assert torch.equal(first["stem.weight"], second["stem.weight"])
    assert (first["blocks.0.up.weight"] - second["blocks.0.up.weight"]).norm() > 1e-3


def run(base, experts, batches, call=logits, module=None, dtype=torch.float64, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sm.regmean(module or copy.deepcopy(base), pack(base, experts, dtype=dtype), batches, call, **settings)


def test_nothing_is_nearer_to_all_experts():
    """The objective's gradient at the solution, for Grams as they are off their diagonal but for α."""
    base, experts, batches = made()
    merged = run(base, experts, batches, alpha=0.5).module.stem.weight.detach().requires_grad_()
    total = 0.0
    for task, expert in experts.items():
        away = merged - expert.stem.weight.detach()
        total = total + ((away @ shrunk(flat(torch.cat(batches[task])), 0.5)) * away).sum()
    total.backward()
    assert merged.grad.norm() < 1e-12 * total


def test_equal_experts_are_themselves():
    base, experts, batches = made()
    same = {task: experts["red"] for task in TASKS}
    for name, tensor in run(base, same, batches, inputs="merged").state_dict().items():
        assert_near(tensor, experts["red"].state_dict()[name], name)


def test_a_tied_weight_sees_the_inputs_of_all_its_modules():
    """The two linear layers of `tiny` that share a weight, BatchNorm with each expert's own statistics, and heads."""
    base, experts, packed, heads, batches = tiny.make_problem()
    inputs = []
    for task, expert in experts.items():
        x = torch.cat(batches[task])
        middle = torch.tanh(expert.norm(expert.first(x)))
        last = expert.frozen(torch.tanh(expert.second(middle)))
        inputs.append((torch.cat([x, last]), middle))
    result = sm.regmean(tiny.make(1), packed, batches, tiny.plain(heads))
    for name, place in (("first.weight", 0), ("second.weight", 1)):
        truth = literal([expert.get_parameter(name) for expert in experts.values()], [rows[place] for rows in inputs])
        assert_near(result.state_dict()[name], truth, name, 1e-10)


class Shared(nn.Module):
    """A linear layer that shares its weight with an embedding, one that stores it the other way round, and inputs that are 0."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.turned = Turned(4, 5)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, x):
        return self.out(torch.tanh(self.turned(input=x)[..., :4])).flatten(1)


class Turned(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, input):
        return input @ self.weight


def test_weights_may_be_stored_the_other_way_round_and_inputs_be_zero():
    base, experts, batches = made(Shared)
    for held in batches.values():
        for batch in held:
            batch[..., 1] = 0
    result = run(base, experts, batches, transposed="turned*")
    weights = [expert.turned.weight.detach().mT for expert in experts.values()]
    rows, seen = [flat(torch.cat(batches[task])) for task in TASKS], [0, 2, 3]
    truth = sum(weights) / 3
    truth[:, seen] = literal([weight[:, seen] for weight in weights], [x[:, seen] for x in rows])
    assert_near(result.state_dict()["turned.weight"].mT, truth, "turned")
    assert_near(result.state_dict()["embedding.weight"], average(experts)["embedding.weight"], "embedding")


def test_other_types_are_as_exact_as_they_can_be():
    base, experts, batches = made(dtype=torch.float32)
    truth = literal_tower(*(double(part) for part in (base, experts, batches)), True)
    packed = pack(base, experts, dtype=torch.float32)
    with pytest.warns(UserWarning, match="idle"):
        result = sm.regmean(base, packed, batches, logits, inputs="merged")
    for name, tensor in result.state_dict().items():
        assert_close(tensor, truth[name], name)


def double(value):
    if isinstance(value, dict):
        return {key: double(part) for key, part in value.items()}
    return [double(part) for part in value] if isinstance(value, list) else copy.deepcopy(value).double()


def test_hooks_and_mode_are_left_as_they_were():
    base, experts, batches = made()
    module = copy.deepcopy(base)
    run(base, experts, batches, module=module, inputs="merged")
    assert not any(part._forward_pre_hooks for part in module.modules())
    with pytest.raises(RuntimeError, match="broken"):
        run(base, experts, batches, call=failing, module=module)
    assert not any(part._forward_pre_hooks for part in module.modules())


def failing(module, batch, task):
    module(batch)
    raise RuntimeError("broken")


def test_autocast_does_not_make_grams_coarse():
    base, experts, batches = made(dtype=torch.float32)

    def call(module, batch, task):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module(batch)

    stem = run(base, experts, batches, call=call, dtype=torch.float32).state_dict()["stem.weight"]  # its inputs are the batches
    truth = literal_tower(*(double(part) for part in (base, experts, batches)), False)["stem.weight"]
    assert (stem - truth).norm() < 1e-5 * truth.norm()


def test_what_it_cannot_merge_is_refused():
    base, experts, batches = made()
    for alpha in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="alpha=.*; it must be from 0 to below 1"):
            run(base, experts, batches, alpha=alpha)
    with pytest.raises(ValueError, match="inputs='both'; choose 'experts' or 'merged'"):
        run(base, experts, batches, inputs="both")
    with pytest.raises(ValueError, match="add batches for \\['blue'\\]"):
        run(base, experts, {task: batches[task] for task in TASKS[:2]})
    with pytest.raises(ValueError, match="pattern 'c_attn' fits no matrix"):
        run(base, experts, batches, transposed="c_attn")
    with pytest.raises(ValueError, match="units pattern 'layers' fits no module"):
        run(base, experts, batches, inputs="merged", units=["layers"])
    quantised = pack(base, experts, dtype=torch.float32, task_vector_dtype="int8")
    with pytest.raises(ValueError, match="regmean needs task vectors that are not quantised"):
        sm.regmean(base, quantised, batches, logits)
    batches["green"][1][0, 0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="expert 'green' gives '.*' inputs that are NaN or Inf"):
        run(base, experts, batches)
    plain, changed, batches = made(lambda: nn.Sequential(nn.Conv1d(3, 3, 1), nn.Flatten()))
    with pytest.raises(ValueError, match="the module has no nn.Linear that the experts changed"):
        run(plain, changed, batches)


def test_singular_grams_say_what_to_do():
    ones = torch.ones(2, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="the Grams of 'stem' are singular; lower alpha, or give more batches"):
        _solution(ones, ones, ones, "the Grams of 'stem'")


def test_the_merged_module_computes_with_the_merged_weights():
    base, experts, batches = made()
    result = run(base, experts, batches)
    batch = batches["red"][0]
    expected = functional_call(base.eval(), result.state_dict(), (batch,))
    torch.testing.assert_close(result.module(batch), expected, rtol=1e-12, atol=1e-12)
