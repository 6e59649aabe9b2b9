"""Heads refitted in closed form: beside a fit for every row that is left out, and what is refused."""

import copy

import pytest
import tiny
import torch
from headed import HEADS, encoder_of, given_heads, logits, make, make_problem, relative, with_given
from torch import nn

import samerge_ext as sm
from samerge_ext.methods.refit_heads import RIDGES


def fitted(features, answers, weight, ridge, has_bias):
    """V and its bias, by normal equations."""
    missed = answers - features @ weight.T
    centre, offset = (features.mean(0), missed.mean(0)) if has_bias else (0 * features[0], 0 * missed[0])
    rows = features - centre
    system = rows.T @ rows + ridge * torch.eye(rows.shape[1], dtype=rows.dtype)
    change = torch.linalg.solve(system, rows.T @ (missed - offset)).T
    return weight + change, offset - change @ centre


def literal(features, answers, weight, has_bias):
    """The same at the ridge that is best for rows left out, each by a fit of its own with that ridge."""
    rows = features - features.mean(0) if has_bias else features
    unit = rows.square().sum() / rows.shape[1]
    errors = []
    for ridge in RIDGES:
        error = 0.0
        for row in range(len(features)):
            others = torch.arange(len(features)) != row
            found, bias = fitted(features[others], answers[others], weight, ridge * unit, has_bias)
            error += (features[row] @ found.T + bias - answers[row]).square().sum()
        errors.append(error)
    best = RIDGES[int(torch.stack(errors).argmin())]
    assert RIDGES[0] < best < RIDGES[-1], "the ends show nothing"
    return fitted(features, answers, weight, best * unit, has_bias)


def features_and_answers(base, experts, merged, batches):
    """task -> H of the merged encoder, Z of the expert."""
    encoder = encoder_of(base)
    encoder.load_state_dict({n: t for n, t in merged.state_dict().items() if not n.startswith("head")})
    rows = {task: torch.cat(held) for task, held in batches.items()}
    with torch.no_grad():
        return {task: (encoder(rows[task]), experts[task](rows[task])) for task in experts}


@pytest.fixture
def problem():
    base, experts, packed = make_problem()
    batches = {task: rows[:6] for task, rows in tiny.make_batches(count=12).items()}
    return base, experts, packed, batches, sm.wudi(packed, module=make(1))


def test_packed_heads_are_those_of_a_fit_for_each_row_left_out(problem):
    base, experts, packed, batches, merged = problem
    expected = features_and_answers(base, experts, merged.module, batches)
    before = copy.deepcopy(merged.heads)
    result = sm.refit_heads(merged, batches, logits, "head")
    for task, (features, answers) in expected.items():
        weight, bias = literal(features, answers, before[task]["head.weight"], has_bias=True)
        assert relative(result.heads[task]["head.weight"], weight) < 1e-9
        assert relative(result.heads[task]["head.bias"], bias) < 1e-9
        assert relative(weight, before[task]["head.weight"]) > 1e-3
        assert torch.equal(packed.heads[task]["head.weight"], before[task]["head.weight"])
    assert result.method == "wudi, heads refitted"


def test_given_heads_without_a_bias_are_refitted_in_place(problem):
    base, experts, packed, batches, merged = problem
    heads = given_heads(experts)
    for task, head in heads.items():
        head.bias = experts[task].head.bias = None
    expected = features_and_answers(base, experts, merged.module, batches)
    before = {task: head.weight.detach().clone() for task, head in heads.items()}
    result = sm.refit_heads(merged, batches, with_given(heads), heads)
    for task, (features, answers) in expected.items():
        weight, _ = literal(features, answers, before[task], has_bias=False)
        assert relative(heads[task].weight.detach(), weight) < 1e-9
        assert torch.equal(result.heads[task]["weight"], heads[task].weight.detach())


def test_answers_come_nearer_to_the_experts(problem):
    base, experts, packed, batches, merged = problem
    unseen = {task: rows[6:] for task, rows in tiny.make_batches(count=12).items()}
    pairs = features_and_answers(base, experts, merged.module, unseen)
    result = sm.refit_heads(merged, batches, logits, "head")
    for task, (features, answers) in pairs.items():
        far, near = (
            (features @ head["head.weight"].T + head["head.bias"] - answers).square().mean()
            for head in (packed.heads[task], result.heads[task])
        )
        assert near < far


def test_the_encoder_and_its_statistics_stay_as_they_are(problem):
    *_, batches, merged = problem
    for buffer in merged.module.buffers():
        if buffer.is_floating_point():
            buffer += 0.25  # estimated anew, say
    before = {name: tensor.clone() for name, tensor in merged.module.state_dict().items() if not name.startswith("head")}
    result = sm.refit_heads(merged, batches, logits, "head")
    after = result.module.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items()) and "norm.running_mean" in before


def test_a_head_that_answers_as_its_expert_stays(problem):
    base, experts, packed, batches, _ = problem
    task = packed.tasks[0]
    alone = sm.PackedWeights.from_modules(base, {task: experts[task]}, dtype=torch.float64, heads=HEADS)
    merged = sm.task_arithmetic(alone, 1.0, module=make(1))
    result = sm.refit_heads(merged, {task: batches[task]}, logits, "head")
    assert relative(result.heads[task]["head.weight"], alone.heads[task]["head.weight"]) < 1e-9


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ("blocks", "'blocks.weight' is no head of task"),
        ({}, "heads= has modules of"),
        ({"red": nn.Identity(), "green": nn.Identity(), "blue": nn.Identity()}, "is Identity; only an nn.Linear"),
    ],
)
def test_what_is_no_head_is_refused_before_any_pass(problem, heads, message):
    *_, packed, _, merged = problem
    if isinstance(heads, dict) and heads:
        heads = dict.fromkeys(packed.tasks, nn.Identity())

    def fail(*_):
        raise AssertionError("a pass was made")

    with pytest.raises(ValueError, match=message):
        sm.refit_heads(merged, tiny.make_batches(), fail, heads)


def test_a_head_that_is_not_called_is_told(problem):
    _, experts, _, batches, merged = problem
    with pytest.raises(ValueError, match="no batch of task .* runs through its head"):
        sm.refit_heads(merged, batches, logits, given_heads(experts))


def test_a_result_without_a_module_is_refused(problem):
    *_, packed, batches, _ = problem
    with pytest.raises(ValueError, match="give wudi a module="):
        sm.refit_heads(sm.wudi(packed), batches, logits, "head")


def test_features_that_are_not_finite_are_told(problem):
    *_, batches, merged = problem
    batches[next(iter(batches))][0][0] = torch.nan
    with pytest.raises(FloatingPointError, match="features or answers"):
        sm.refit_heads(merged, batches, logits, "head")


@pytest.mark.parametrize("classes", [(2, 2), (3, 2)])
def test_running_statistics_of_a_head_stay_its_tasks(classes):
    """Of one shape in all tasks, so that one could be written over another's, or of several, which cannot be copied."""
    torch.manual_seed(0)

    def model(count):
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, count), nn.BatchNorm1d(count)).double().eval()

    base, experts = model(2), {}
    for task, count in zip("ab", classes, strict=True):
        experts[task] = model(count)
        experts[task][2].running_mean += torch.randn(count)
    packed = sm.PackedWeights.from_modules(base, experts, dtype=torch.float64, heads=["1.*", "2.*"])
    batches = {task: [torch.randn(8, 4, dtype=torch.float64)] for task in experts}
    result = sm.refit_heads(sm.average(packed, module=model(2)), batches, logits, "1")
    for task, expert in experts.items():
        assert torch.equal(result.heads[task]["2.running_mean"], expert[2].running_mean)
        assert torch.equal(packed.heads[task]["2.running_mean"], expert[2].running_mean)
