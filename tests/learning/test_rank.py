"""Coefficients of singular components: their numbers, with SAM, heads and checkpoints, and what is saved."""

import json

import literal
import pytest
import tiny
import torch
from torch.func import functional_call

import samerge_ext as sm
from samerge_ext.packing.components import Components

RANK = 3


@pytest.fixture
def problem():
    return tiny.make_problem()


def run(packed, method=sm.samerging, config=sm.SAMergingConfig, logits=None, **settings):
    settings = {"steps": 6, "granularity": "rank", "rank": RANK, "progress": False, **settings}
    return method(tiny.make(1), packed, tiny.make_batches(), logits or tiny.plain(tiny.make_heads()), config=config(**settings))


def literal_learn(base, experts, heads, batches, steps, loss, sam, rho=0.07):
    """λ [T, L] and c [T, k] by matrix after so many steps, in plain autograd on torch's decomposition."""
    names = [name for name, _ in base.named_parameters()]
    tau = [{n: p.detach() - dict(base.named_parameters())[n].detach() for n, p in e.named_parameters()} for e in experts.values()]
    matrices = [name for name in names if tau[0][name].dim() > 1 and tau[0][name].any()]
    decomposed = {(t, name): torch.linalg.svd(tau[t][name], full_matrices=False) for t in range(len(tau)) for name in matrices}
    point = torch.zeros(len(tau), len(names) + RANK * len(matrices), dtype=torch.float64)
    point[:, : len(names)] = 0.3
    point.requires_grad_()
    buffers = literal.averaged_buffers(base, experts)
    decay = 5e-4 if loss == "kl" else 0.0
    optimizer = torch.optim.Adam([point], lr=1e-3, weight_decay=decay)

    def gradient(at, step):
        at = at.detach().requires_grad_()
        weights = literal.merged_parameters(base, experts, at[:, : len(names)])
        for place, name in enumerate(matrices):
            for t in range(len(tau)):
                u, s, vh = decomposed[t, name]
                first = len(names) + RANK * place
                weights[name] = weights[name] + (u[:, :RANK] * (at[t, first : first + RANK] * s[:RANK])) @ vh[:RANK]
        total = 0.0
        for task, expert in experts.items():
            batch = batches[task][step % len(batches[task])]
            student = functional_call(base, {**weights, **buffers}, (batch,)) @ heads[task]
            if loss == "kl":
                total = total + literal.kl(student, expert(batch).detach() @ heads[task], 2.0)
            else:
                total = total + literal.entropy(student)
        return torch.autograd.grad(total, at)[0]

    for step in range(steps):
        g = gradient(point, step)
        if sam == "paper":
            g = gradient(point.detach() + rho * g / g.norm(), step)
        point.grad = g
        optimizer.step()
    values = point.detach()
    components = {}
    for place, name in enumerate(matrices):
        first = len(names) + RANK * place
        components[name] = values[:, [names.index(name)]] + values[:, first : first + RANK]
    return values[:, : len(names)], components


@pytest.mark.parametrize(("method", "sam"), [("samerging", "paper"), ("samerging", "off"), ("adamerging", "off")])
def test_learning_follows_the_literal_loop(problem, method, sam):
    base, experts, packed, heads, batches = problem
    config = sm.SAMergingConfig if method == "samerging" else sm.AdaMergingConfig
    result = run(packed, getattr(sm, method), config, steps=10, sam=sam)
    loss = "kl" if method == "samerging" else "entropy"
    coefficients, components = literal_learn(base, experts, heads, batches, 10, loss, sam)
    assert (result.coefficients - coefficients).norm() < 1e-9 * coefficients.norm()
    assert result.component_coefficients.keys() == components.keys() == {"first.weight", "second.weight"}
    for name, expected in components.items():
        found = result.component_coefficients[name]
        assert (found - expected).norm() < 1e-9 * expected.norm()
        layer = packed.layout.names.index(name)
        assert (found - result.coefficients[:, [layer]]).abs().max() > 1e-3, "components went ways of their own"


def test_before_learning_it_is_the_merge_by_layers(problem):
    _, _, packed, _, _ = problem
    model = sm.MergedModel(tiny.make(1), packed, 0.3)
    by_layers = model.merged.clone()
    model.use_components(Components.of(packed, RANK))
    model.merge()
    assert torch.equal(model.merged, by_layers)
    assert model.coefficients.shape == (3, packed.layout.num_layers + 2 * RANK)


def test_all_components_reach_a_lower_loss_than_layers(problem):
    """The same steps towards experts that lie far apart."""
    base = problem[0]
    packed = sm.PackedWeights.from_modules(base, tiny.make_experts(base, scale=1.0), dtype=torch.float64)
    losses = [
        run(packed, granularity=granularity, rank=8, steps=150, learning_rate=0.02, sam="off").history[-1]["loss"]
        for granularity in ("layer", "rank")
    ]
    assert losses[1] < 0.7 * losses[0]


def test_an_interrupted_run_continues_to_the_same_numbers(problem, tmp_path):
    packed = problem[2]
    whole = run(packed, checkpoint_every=2)
    with pytest.raises(tiny.Interrupted):
        run(packed, logits=tiny.interrupt_after(9), checkpoint_every=2, checkpoint_dir=tmp_path)
    continued = run(packed, checkpoint_every=2, checkpoint_dir=tmp_path)
    assert continued.history == whole.history and torch.equal(continued.merged, whole.merged)
    with pytest.raises(ValueError, match="state.pt is of another run: rank differ"):
        run(packed, rank=2, checkpoint_every=2, checkpoint_dir=tmp_path)


def test_the_coefficients_are_saved_beside_the_merged_weights(problem, tmp_path):
    from safetensors.torch import load_file

    packed = problem[2]
    result = run(packed)
    result.save_pretrained(tmp_path / "out")
    saved = load_file(tmp_path / "out/model.safetensors")["first.weight"].double()
    assert (saved - result.module.first.weight.detach()).norm() < 1e-6 * saved.norm()
    summary = json.loads((tmp_path / "out/coefficients.json").read_text())
    assert summary["component_coefficients"]["green"]["first.weight"] == result.component_coefficients["first.weight"][1].tolist()
    assert "component_coefficients" not in run(packed, granularity="layer").summary()


def test_what_cannot_be_is_refused(problem):
    with pytest.raises(ValueError, match="rank=0; expected a number ≥ 1"):
        sm.SAMergingConfig(rank=0)
    with pytest.raises(ValueError, match="granularity='rank'; choose one of 'layer', 'task'"):
        sm.StatsMergingConfig(granularity="rank")
