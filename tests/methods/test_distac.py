"""DisTaC against a literal loop, what it does to lengths and certainty, what it leaves alone, and what is refused."""

import copy

import pytest
import tiny
import torch
from helpers import assert_close
from torch import nn

import samerge_ext as sm
from samerge_ext.learning.calibration import Calibration

STEPS = 12


def literal(base, expert, head, batches, factor, config, order):
    """θ by autograd on a copy of the expert: no packing, no operators."""
    student = copy.deepcopy(expert)
    then = {}
    with torch.no_grad():
        for (name, parameter), start in zip(student.named_parameters(), base.parameters(), strict=True):
            then[name] = start + factor * (parameter - start)
            parameter.copy_(then[name])
    student.frozen.requires_grad_(False)  # what no expert changed stays
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=config.learning_rate)
    warm_up = max(1, round(0.1 * config.steps))
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min((step + 1) / warm_up, (config.steps - step) / (config.steps - warm_up))
        batch = batches[order(step)]
        with torch.no_grad():
            p = torch.softmax(expert(batch) @ head / config.expert_temperature, -1)
        log_q = torch.log_softmax(student(batch) @ head / config.student_temperature, -1)
        loss = config.student_temperature * config.expert_temperature * (p * (p.log() - log_q)).sum(-1).mean()
        loss = loss + config.penalty * sum((q - then[n]).square().sum() for n, q in student.named_parameters())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, config.gradient_norm)
        optimizer.step()
    return dict(student.named_parameters())


@pytest.fixture
def problem():
    """One expert far from the base, the others near."""
    base = tiny.make(0)
    experts = tiny.make_experts(base)
    with torch.no_grad():
        for parameter, start in zip(experts["red"].parameters(), base.parameters(), strict=True):
            parameter.copy_(start + 3 * (parameter - start))
    return base, experts, sm.PackedWeights.from_modules(base, experts, dtype=torch.float64)


def conditioned(packed, logits=None, norm="smallest", **settings):
    config = sm.DisTaCConfig(**{"steps": STEPS, "learning_rate": 1e-2, "progress": False, **settings})
    logits = logits or tiny.plain(tiny.make_heads())
    return sm.distac(tiny.make(1), packed, tiny.make_batches(), logits, norm=norm, config=config)


def norms(packed):
    return packed.task_vectors.norm(dim=1)


def logits_of(packed, task, task_vectors):
    """Of the task's batches, by what its row of ``task_vectors`` makes of the base."""
    model = sm.MergedModel(tiny.make(1), packed, 0.0)
    with model.teacher(task) as module:
        model.take_on(packed.base + task_vectors[packed.tasks.index(task)])
        return module(torch.cat(tiny.make_batches()[task])) @ tiny.make_heads()[task]


@pytest.mark.parametrize("norm", ["smallest", "own", 2.5])
@pytest.mark.parametrize("shared", [False, True])
def test_every_number_is_the_loops(problem, norm, shared):
    base, experts, packed = problem
    settings = {"student_temperature": 3.0, "expert_temperature": 2.0, "penalty": 0.05, "seed": 4}
    config = sm.DisTaCConfig(steps=STEPS, learning_rate=1e-2, progress=False, **settings)
    logits = tiny.shared_encoder(tiny.make_heads()) if shared else None
    found = conditioned(packed, logits, norm, **settings)
    target = {"smallest": norms(packed).min().item(), "own": None}.get(norm, norm)
    order = Calibration(tiny.make_batches(), tiny.TASKS, shuffle=True, seed=config.seed).at
    for row, task in enumerate(packed.tasks):
        # shortening() rounds its factors to fp32
        factor = 1.0 if target is None else target / norms(packed)[row].item()
        factor = torch.tensor(factor, dtype=torch.float32).item() if norm == "smallest" else factor
        expected = literal(
            base, experts[task], tiny.make_heads()[task], tiny.make_batches()[task], factor, config, lambda s, t=task: order(s)[t]
        )
        for name, view in packed.layout.views(packed.base + found.task_vectors[row]).items():
            torch.testing.assert_close(view, expected[name].detach(), rtol=1e-9, atol=1e-10)


def test_lengths_are_as_near_to_the_norm_as_the_penalty_keeps_them(problem):
    _, _, packed = problem
    smallest = norms(packed).min()
    assert norms(packed).max() > 2.5 * smallest
    torch.testing.assert_close(norms(conditioned(packed, penalty=1e4, learning_rate=1e-5)), smallest.expand(3), rtol=1e-3, atol=0)
    off = [(norms(conditioned(packed, penalty=p, steps=100)) - smallest).abs().max().item() for p in (0.0, 1.0)]
    assert off[1] < 0.5 * off[0]


def test_the_divergence_from_the_expert_falls(problem):
    _, _, packed = problem
    teacher = logits_of(packed, "red", packed.task_vectors)
    shortened, distilled = (
        sm.softmax_kl(logits_of(packed, "red", found.task_vectors), teacher)
        for found in (sm.align_norms(packed), conditioned(packed, steps=200))
    )
    assert distilled < 0.1 * shortened


@pytest.mark.parametrize(("student", "expert", "certain"), [(3.0, 1.0, True), (1.0, 3.0, False)])
def test_the_temperatures_make_experts_more_or_less_certain(problem, student, expert, certain):
    _, _, packed = problem
    temperatures = {"student_temperature": student, "expert_temperature": expert}
    found = conditioned(packed, norm="own", penalty=0.0, steps=300, **temperatures)
    for task in packed.tasks:
        before, after = (sm.entropy(logits_of(packed, task, rows)).item() for rows in (packed.task_vectors, found.task_vectors))
        assert (after < before) == certain, f"{task}: from {before} to {after}"


def test_teachers_stay_the_experts_and_what_was_given_stays_as_it_was(problem):
    _, experts, packed = problem
    before = packed.task_vectors.clone()
    module, heads = tiny.make(1), tiny.make_heads()
    found = sm.distac(
        module, packed, tiny.make_batches(), tiny.plain(heads), config=sm.DisTaCConfig(steps=3, learning_rate=0.1, progress=False)
    )
    assert torch.equal(packed.task_vectors, before) and not torch.equal(found.task_vectors, before)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), tiny.make(0).parameters(), strict=True))
    assert all(parameter.grad is None for parameter in module.parameters())
    model, x = sm.MergedModel(tiny.make(1), found, 0.3), tiny.make_batches()["red"][0]
    with model.teacher("red") as teacher:
        torch.testing.assert_close(teacher(x), experts["red"](x))


def test_equal_seeds_give_equal_task_vectors(problem):
    _, _, packed = problem
    first = conditioned(packed, seed=1).task_vectors
    torch.rand(3)
    assert torch.equal(conditioned(packed, seed=1).task_vectors, first)
    assert not torch.equal(conditioned(packed, seed=2).task_vectors, first)


def test_any_method_merges_what_comes_out(problem):
    _, _, packed = problem
    found = conditioned(packed)
    assert_close(sm.task_arithmetic(found, 0.5).merged, packed.base + 0.5 * found.task_vectors.sum(0))
    calibration, logits = tiny.make_batches(), tiny.plain(tiny.make_heads())
    result = sm.samerging(tiny.make(1), found, calibration, logits, config=sm.SAMergingConfig(steps=3, progress=False))
    assert result.coefficients.shape == (3, packed.layout.num_layers)


def test_narrow_task_vectors_are_trained_in_fp32(problem):
    base, experts, _ = problem
    base, experts = base.float(), {task: expert.float() for task, expert in experts.items()}
    heads, batches = tiny.make_heads(torch.float32), tiny.make_batches(dtype=torch.float32)
    packed = sm.PackedWeights.from_modules(base, experts, dtype=torch.bfloat16)
    config = sm.DisTaCConfig(steps=STEPS, learning_rate=1e-2, progress=False)
    found = sm.distac(tiny.make(1, torch.float32), packed, batches, tiny.plain(heads), config=config)
    wide = sm.PackedWeights.from_modules(base, experts, dtype=torch.float32)
    expected = sm.distac(tiny.make(1, torch.float32), wide, batches, tiny.plain(heads), config=config)
    assert found.task_vectors.dtype == torch.bfloat16
    error = (found.task_vectors.float() - expected.task_vectors).norm() / expected.task_vectors.norm()
    assert error < 0.02


def test_what_does_not_fit_is_refused_before_any_step(problem):
    base, experts, packed = problem
    batches, heads = tiny.make_batches(), tiny.make_heads()

    def logits(module, batch, task):
        assert not torch.is_grad_enabled(), "a step began"
        return module(batch) @ heads[task]

    for norm in ("largest", 0.0, float("inf")):
        with pytest.raises(ValueError, match=f"norm={norm!r}"):
            conditioned(packed, logits, norm)
    with pytest.raises(ValueError, match=r"add batches for \['green'\]"):
        sm.distac(tiny.make(1), packed, {task: batches[task] for task in ("red", "blue")}, logits)
    with pytest.raises(ValueError, match="DisTaC needs task vectors that are not quantised"):
        conditioned(sm.PackedWeights.from_modules(base, experts, task_vector_dtype="int8"), logits)
    packed.task_vectors[1] = 0
    with pytest.raises(ValueError, match="the task vector of 'green' has the norm 0"):
        conditioned(packed, logits)


def test_a_loss_that_is_not_finite_names_the_task(problem):
    _, _, packed = problem
    heads = tiny.make_heads()

    def logits(module, batch, task):
        return module(batch) @ heads[task] * (float("nan") if torch.is_grad_enabled() and task == "green" else 1.0)

    with pytest.raises(FloatingPointError, match="distac 'green': the loss is nan at step 0"):
        conditioned(packed, logits)


@pytest.mark.parametrize(
    ("setting", "value"), [("student_temperature", 0.0), ("expert_temperature", -1.0), ("penalty", -0.1), ("steps", 0)]
)
def test_settings_out_of_range_are_refused(setting, value):
    with pytest.raises(ValueError, match=setting):
        sm.DisTaCConfig(**{setting: value})
