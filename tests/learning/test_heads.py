"""Heads that are learned beside λ: their numbers, what is given back and what is refused."""

import copy
import io
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import streaming
import tiny
import torch
from headed import (
    HEADS,
    encoder_of,
    flat,
    given_heads,
    literal_loss,
    logits,
    make,
    make_problem,
    relative,
    run,
    start_of,
    with_given,
)
from helpers import ROOT

import samerge_ext as sm
from samerge_ext.checkpoints.sealed import read_sealed
from samerge_ext.learning.loop import make_passes
from samerge_ext.learning.prefetch import Input
from samerge_ext.ops.softmax_kl import softmax_kl_with_grad


def literal_learn(base, experts, batches, steps, *, rho=0.07, sam="paper", adaptive=False):
    """λ [T, L] and heads after so many steps of SAM on both, as one vector, with Adam at a rate for each."""
    coefficients = torch.full((len(experts), len(list(encoder_of(base).parameters()))), 0.3, dtype=torch.float64)
    heads = start_of(experts)
    learned = [coefficients, *(tensor for head in heads.values() for tensor in head.values())]
    for tensor in learned:
        tensor.requires_grad_()
    optimizer = torch.optim.Adam([{"params": learned[:1], "weight_decay": 5e-4, "lr": 1e-3}, {"params": learned[1:], "lr": 0.01}])

    def gradients(at, step):
        at = [tensor.detach().requires_grad_() for tensor in at]
        values = iter(at[1:])
        placed = {task: {name: next(values) for name in head} for task, head in heads.items()}
        loss = literal_loss(base, experts, at[0], placed, batches, [step % len(batches["red"])])
        return torch.autograd.grad(loss, at)

    for step in range(steps):
        found = gradients(learned, step)
        if sam == "paper":
            scales = [tensor.detach().abs() if adaptive else torch.ones_like(tensor) for tensor in learned]
            norm = torch.stack([(scale * g).norm() for scale, g in zip(scales, found)]).norm()
            moved = [x.detach() + rho * s**2 * g / norm for x, s, g in zip(learned, scales, found)]
            found = gradients(moved, step)
        for tensor, gradient in zip(learned, found):
            tensor.grad = gradient
        optimizer.step()
    return coefficients.detach(), {task: {n: x.detach() for n, x in head.items()} for task, head in heads.items()}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("settings", [{}, {"sam": "off"}, {"adaptive": True, "rho": 0.5}])
def test_packed_heads_follow_the_literal_loop(streamed, settings):
    base, experts, packed = make_problem()
    batches = tiny.make_batches(count=4)
    result = run(packed, batches=batches, streamed=streamed, **settings)
    coefficients, heads = literal_learn(base, experts, batches, 6, **settings)
    assert relative(result.coefficients, coefficients) < 1e-9
    moved = flat(heads) - flat(start_of(experts))
    assert relative(flat(result.heads) - flat(packed.heads), moved) < 1e-7 and moved.norm() > 0.1


@pytest.mark.parametrize("name", ["blocks.2.norm.*", "blocks.1.wide.weight"])
def test_a_norm_or_projection_inside_of_a_unit_is_a_head_too(name):
    """Streamed, it is there when its unit runs again in the backward."""
    packed = streaming.make_packed(streaming.make(), heads=name)
    settings = {"steps": 5, "train_heads": name, "head_learning_rate": 0.01, "held_back": 0}
    results = streaming.learn_both(packed, streaming.make(1), **settings)
    assert relative(results[1].coefficients, results[0].coefficients) < 1e-12
    moved = [flat(result.heads) - flat(packed.heads) for result in results]
    assert relative(*moved) < 1e-9 and moved[0].abs().mean() > 1e-2


def test_given_modules_follow_the_literal_loop_and_are_trained_in_place():
    base, experts, packed = make_problem()
    batches, heads = tiny.make_batches(count=4), given_heads(experts)
    result = run(packed, with_given(heads), heads, batches, train_heads=["weight", "bias"])
    coefficients, expected = literal_learn(base, experts, batches, 6)
    assert relative(result.coefficients, coefficients) < 1e-9
    for task, head in expected.items():
        assert relative(heads[task].weight.detach(), head["head.weight"]) < 1e-9
        assert torch.equal(result.heads[task]["weight"], heads[task].weight.detach())
        assert heads[task].weight.grad is None


@pytest.mark.parametrize("forward", ["packed", "given"])
def test_gradients_of_heads_are_those_of_finite_differences(forward):
    _, experts, packed = make_problem()
    batches, heads = tiny.make_batches(count=1), given_heads(experts)
    model = sm.MergedModel(make(1), packed, 0.3)
    model.train_heads(("weight", "bias") if forward == "given" else HEADS, heads if forward == "given" else None)

    def objective(student, teacher):
        return softmax_kl_with_grad(student, teacher, student_temperature=2.0, teacher_temperature=2.0)

    inputs = {task: Input(batches[task][0], experts[task](batches[task][0]).detach()) for task in packed.tasks}
    config = sm.SAMergingConfig(sam="off", task_weights={"red": 2.0})
    passes = make_passes(model, with_given(heads) if forward == "given" else logits, objective, config)
    point = torch.cat([model.coefficients.detach().flatten(), model.trained_heads.start])
    gradient, measured = passes(point, inputs)
    weights = torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64)
    numeric = torch.zeros_like(gradient)
    for i in range(len(point)):
        step = torch.zeros_like(point)
        step[i] = 1e-5
        ahead, behind = (passes(point + sign * step, inputs)[1][0, 0] for sign in (1, -1))
        numeric[i] = weights @ (ahead - behind) / 2e-5
    first = packed.num_tasks * packed.layout.num_layers
    assert len(point) > first
    for part in (slice(0, first), slice(first, None)):
        assert relative(gradient[part], numeric[part]) < 1e-7
    assert measured[0, 1].norm().item() == pytest.approx(gradient.norm().item(), rel=1e-12)


@pytest.mark.parametrize("settings", [{}, {"optimizer": "sgd", "streamed": True}])
@pytest.mark.parametrize("given", [False, True])
def test_an_interrupted_run_continues_to_the_same_numbers(tmp_path, settings, given):
    """The same modules are given again: an interrupted run leaves them as they were, which their teachers need."""
    _, experts, packed = make_problem()
    settings |= {"steps": 30, "checkpoint_every": 7, "head_learning_rate": 0.1}
    settings |= {"held_back": 0.25, "measure_every": 3, "patience": 4}

    def forward(left):
        heads = given_heads(experts)
        inner = with_given(heads) if given else logits

        def counted(module, batch, task):
            nonlocal left
            left -= torch.is_grad_enabled() and task == "red"
            if left < 0:
                raise tiny.Interrupted
            return inner(module, batch, task)

        return counted, heads if given else None

    patterns = ("weight", "bias") if given else HEADS
    called, heads = forward(10**9)
    whole = run(packed, called, heads, train_heads=patterns, **settings)
    called, heads = forward(2 * 17)
    before = copy.deepcopy(heads)
    with pytest.raises(tiny.Interrupted):
        run(packed, called, heads, train_heads=patterns, checkpoint_dir=tmp_path, **settings)
    for task in before or ():
        assert torch.equal(heads[task].weight, before[task].weight)
    state = torch.load(io.BytesIO(read_sealed(tmp_path / "state.pt")))
    assert len(state["history"]) == 14 and len(state["optimizer"]["param_groups"]) == 2
    called, heads = forward(10**9)
    continued = run(packed, called, heads, train_heads=patterns, checkpoint_dir=tmp_path, **settings)
    again = run(packed, *forward(10**9), train_heads=patterns, checkpoint_dir=tmp_path, **settings)
    for other in (continued, again):
        assert torch.equal(other.coefficients, whole.coefficients) and other.history == whole.history
        assert torch.equal(flat(other.heads), flat(whole.heads))
    if given:
        heads["red"].bias.data += 1
        with pytest.raises(ValueError, match="state.pt is of another run: heads differ"):
            run(packed, called, heads, train_heads=patterns, checkpoint_dir=tmp_path, **settings)


def test_the_result_saves_the_trained_heads_and_leaves_the_packed_ones(tmp_path):
    from safetensors.torch import load_file

    _, experts, packed = make_problem(torch.float32)
    batches = tiny.make_batches(count=4, dtype=torch.float32)
    result = run(packed, batches=batches, train_heads="head.weight", module=make(1, dtype=torch.float32))
    result.save_pretrained(tmp_path / "out")
    for task, expert in experts.items():
        saved = load_file(tmp_path / f"out/heads/{task}.safetensors")
        assert torch.equal(saved["head.weight"], result.heads[task]["head.weight"])
        assert (saved["head.weight"] - expert.head.weight).abs().max() > 1e-2
        assert torch.equal(saved["head.bias"], expert.head.bias)
        assert torch.equal(packed.heads[task]["head.weight"], expert.head.weight)


def test_heads_of_half_precision_are_learned_in_fp32():
    """Steps of 1e-4 would be lost in bf16, whose numbers near 0.3 are 1e-3 apart."""
    _, _, packed = make_problem(torch.float32)
    half = replace(packed, base=packed.base.bfloat16(), task_vectors=packed.task_vectors.bfloat16())
    batches = tiny.make_batches(count=2, dtype=torch.bfloat16)
    module = make(1, dtype=torch.bfloat16)
    result = run(half, batches=batches, module=module, head_learning_rate=1e-4, steps=60, sam="off", weight_decay=0.0)
    moved = (flat(result.heads) - flat(packed.heads)).abs().mean()
    assert moved > 1.5e-3


def test_statsmerging_learns_heads_too():
    _, _, packed = make_problem()
    batches = tiny.make_batches(count=4)
    losses = []
    for settings in ({}, {"train_heads": HEADS, "head_learning_rate": 0.05}):
        config = sm.StatsMergingConfig(steps=40, progress=False, held_back=0, loss="kl", **settings)
        result = sm.statsmerging(make(1), packed, batches, logits, config=config)
        losses.append(result.history[-1]["loss"])
    assert losses[1] < 0.5 * losses[0]
    assert (flat(result.heads) - flat(packed.heads)).norm() > 0.1


def test_adamerging_refuses_heads():
    with pytest.raises(ValueError, match="train_heads='head.*'; adamerging has no teachers"):
        sm.AdaMergingConfig(train_heads=HEADS)


def refused(message, given=None, forward=logits, **settings):
    _, _, packed = make_problem()
    with pytest.raises((ValueError, RuntimeError), match=message):
        run(packed, forward, given, **settings)


def test_heads_that_cannot_be_learned_are_refused():
    _, experts, _ = make_problem()
    heads = given_heads(experts)
    refused("train_heads='body.*' fits no tensor of a head; these are head.weight, head.bias.", train_heads=["body.*"])
    refused(r"heads= names \['pink'\]", {"pink": heads["red"]})
    refused("heads= gives modules and train_heads names none", heads, train_heads=())
    shared = {"red": heads["red"], "green": heads["red"]}
    refused("'weight' of task 'green' is one of task 'red' too", shared, train_heads=["weight", "bias"])
    refused("logits of task 'red' do not depend on its 'weight'", heads, train_heads="weight")
    refused("no head is in the module while a SharedEncoder runs, so that 'head.weight' of task 'red'", None, with_given(heads))
    one = {task: held[:1] for task, held in tiny.make_batches().items()}
    refused("held_back=0.25 leaves no batch of task 'red' to learn from, it has 1", batches=one, held_back=None)
    with pytest.raises(ValueError, match="held_back=1.5; expected a share < 1"):
        sm.SAMergingConfig(held_back=1.5)


def test_a_head_that_the_module_has_no_place_for_is_refused():
    _, _, packed = make_problem()
    with pytest.raises(ValueError, match="the module has no parameter 'head.weight', which is one of task 'red'"):
        run(packed, lambda module, batch, task: module(batch), module=tiny.make(1))


def test_a_head_of_whole_numbers_is_refused():
    base, experts, _ = make_problem()
    states = {task: {**e.state_dict(), "head.table": torch.arange(3)} for task, e in experts.items()}
    packed = sm.PackedWeights.from_state_dicts(base.state_dict(), states, dtype=torch.float64, heads=HEADS)
    with pytest.raises(ValueError, match="'head.table' of task 'red' is torch.int64, and only float tensors are learned"):
        run(packed)


def test_a_plan_counts_what_learning_heads_takes():
    """A process stays within it where heads are nearly all that there is."""
    script = ROOT / "tests" / "support" / "heads_memory.py"
    run = subprocess.run([sys.executable, script], check=True, capture_output=True, text=True)
    planned, measured, without = json.loads(run.stdout)
    assert 0.8 * planned < measured <= planned, f"{measured} of {planned} bytes"
    assert planned > 1.5 * without


def test_planning_leaves_given_modules_as_they_were():
    _, experts, packed = make_problem()
    heads = given_heads(experts)
    settings = {"train_heads": ("weight", "bias"), "batches": tiny.make_batches(count=4)}
    whole = run(packed, with_given(heads), heads, **settings)
    heads = given_heads(experts)
    planned = run(packed, with_given(heads), heads, memory_budget="1TB", **settings)
    assert torch.equal(whole.coefficients, planned.coefficients) and torch.equal(flat(whole.heads), flat(planned.heads))
