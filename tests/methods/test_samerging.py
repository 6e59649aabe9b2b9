"""samerging and adamerging follow a literal loop, step by step."""

import literal
import pytest
import tiny
import torch

import samerge_ext as sm

STEPS = 20


@pytest.fixture
def problem():
    return tiny.make_problem()


def close(result, expected, tolerance=1e-9):
    error = (result.coefficients - expected).norm() / expected.norm()
    assert error < tolerance, f"coefficients are off by {error:.2e}, relative"


@pytest.mark.parametrize("adapter", [tiny.shared_encoder, tiny.plain])
@pytest.mark.parametrize("granularity", ["layer", "task"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_paper_sam_follows_the_literal_loop(problem, adapter, granularity, adaptive):
    base, experts, packed, heads, batches = problem
    rho = 0.5 if adaptive else 0.07
    expected = literal.learn(
        base, experts, heads, batches, steps=STEPS, adaptive=adaptive, rho=rho, task_wise=granularity == "task"
    )
    config = sm.SAMergingConfig(steps=STEPS, granularity=granularity, adaptive=adaptive, rho=rho, progress=False)
    result = sm.samerging(tiny.make(1), packed, batches, adapter(heads), config=config)
    close(result, expected[-1])
    assert len(result.history) == STEPS


def test_published_sam_steps_with_the_gradient_at_unperturbed_weights(problem):
    base, experts, packed, heads, batches = problem
    passes = []

    def counted(module, batch, task):
        passes.append((task, torch.is_grad_enabled()))
        return module(batch) @ heads[task]

    config = sm.SAMergingConfig(steps=STEPS, sam="published", progress=False)
    result = sm.samerging(tiny.make(1), packed, batches, counted, config=config)
    close(result, literal.learn(base, experts, heads, batches, steps=STEPS, sam="off")[-1])
    assert sum(grad for _, grad in passes) == STEPS * len(tiny.TASKS), "published SAM takes one pass a step"


@pytest.mark.parametrize(
    "options", [{"temperature": 1.0}, {"task_weights": {"red": 2.0, "blue": 0.5}}, {"beta": 1.0}, {"beta": 0.3}]
)
def test_temperature_task_weights_and_divergence(problem, options):
    base, experts, packed, heads, batches = problem
    translated = {"temperature": options.get("temperature", 2.0), "beta": options.get("beta", 0.0)}
    if "task_weights" in options:
        translated["alpha"] = {"red": 2.0, "green": 1.0, "blue": 0.5}
    expected = literal.learn(base, experts, heads, batches, steps=5, **translated)
    config = sm.SAMergingConfig(steps=5, progress=False, **options)
    close(sm.samerging(tiny.make(1), packed, batches, tiny.plain(heads), config=config), expected[-1])


def test_scaling_by_temperature_is_the_loss_times_tau_squared(problem):
    _, _, packed, heads, batches = problem
    losses = [
        sm.samerging(
            tiny.make(1),
            packed,
            batches,
            tiny.plain(heads),
            config=sm.SAMergingConfig(steps=1, progress=False, temperature=3.0, scale_by_temperature=scaled),
        ).history[0]
        for scaled in (False, True)
    ]
    assert losses[1]["loss"] == pytest.approx(9 * losses[0]["loss"], rel=1e-12)
    assert losses[1]["gradient_norm"] == pytest.approx(9 * losses[0]["gradient_norm"], rel=1e-12)


def test_sgd_with_momentum(problem):
    base, experts, packed, heads, batches = problem
    expected = literal.learn(
        base,
        experts,
        heads,
        batches,
        steps=STEPS,
        optimizer=lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=5e-4),
    )
    config = sm.SAMergingConfig(steps=STEPS, optimizer="sgd", learning_rate=1e-2, progress=False)
    close(sm.samerging(tiny.make(1), packed, batches, tiny.shared_encoder(heads), config=config), expected[-1])


@pytest.mark.parametrize("granularity", ["layer", "task"])
def test_adamerging_follows_the_literal_loop(problem, granularity):
    base, experts, packed, heads, batches = problem
    expected = literal.learn(
        base,
        experts,
        heads,
        batches,
        steps=STEPS,
        loss="entropy",
        sam="off",
        task_wise=granularity == "task",
        optimizer=lambda p: torch.optim.Adam(p, lr=1e-3),
    )
    config = sm.AdaMergingConfig(steps=STEPS, granularity=granularity, progress=False)
    close(sm.adamerging(tiny.make(1), packed, batches, tiny.shared_encoder(heads), config=config), expected[-1])


@pytest.mark.parametrize("tasks_per_batch", [1, 2])
def test_tasks_per_batch_does_not_change_the_numbers(problem, tasks_per_batch):
    _, _, packed, heads, batches = problem
    results = [
        sm.samerging(
            tiny.make(1),
            packed,
            batches,
            tiny.shared_encoder(heads),
            config=sm.SAMergingConfig(steps=5, progress=False, tasks_per_batch=n),
        )
        for n in (None, tasks_per_batch)
    ]
    close(results[0], results[1].coefficients, 1e-12)


def test_teachers_are_the_experts_whatever_the_start(problem):
    """Distilling one expert alone from λ = 0 reaches it: its teacher is its own logits, with its own statistics."""
    base, experts, _, heads, batches = problem
    packed = sm.PackedWeights.from_modules(base, {"red": experts["red"]}, dtype=torch.float64)
    config = sm.SAMergingConfig(
        steps=400, learning_rate=0.03, weight_decay=0.0, initial_coefficient=0.0, sam="off", progress=False
    )
    result = sm.samerging(tiny.make(1), packed, {"red": batches["red"]}, tiny.plain(heads), config=config)
    assert result.history[-1]["loss"] < 1e-4 * result.history[0]["loss"]
