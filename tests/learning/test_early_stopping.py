"""Batches that are held back: when a run ends, what it keeps, and what they have no part in."""

import pytest
import tiny
import torch
from headed import flat, literal_loss, make, make_problem, run

import samerge_ext as sm
from samerge_ext.learning.calibration import Calibration


def held_back_loss(problem, result, batches, indices):
    """Computed anew, without what is tested."""
    base, experts, _ = problem
    with torch.no_grad():
        return float(literal_loss(base, experts, result.coefficients, result.heads, batches, indices))


def test_heads_that_overfit_are_stopped_at_the_best_state():
    """At a large rate on a few examples the loss of what is held back falls, then rises above that of the start."""
    problem = make_problem(head_scale=8)
    batches = tiny.make_batches(count=4, rows=1)
    others = {task: [held[i] for i in (0, 1, 3)] for task, held in batches.items()}
    settings = {"steps": 60, "head_learning_rate": 0.3, "sam": "off"}
    start = run(problem[2], batches=others, sam="off", steps=1, head_learning_rate=0.0, learning_rate=0.0)
    begun = held_back_loss(problem, start, batches, [2])
    whole = run(problem[2], batches=others, **settings)
    assert len(whole.history) == 60
    assert held_back_loss(problem, whole, batches, [2]) > 1.1 * begun, "this does not overfit, and shows nothing"
    result = run(problem[2], batches=batches, **settings, held_back=0.25, measure_every=4, patience=4)
    assert [r["loss"] for r in result.history] == [r["loss"] for r in whole.history[: len(result.history)]]
    kept = held_back_loss(problem, result, batches, [2])
    assert kept < 0.5 * begun
    measured = {r["step"]: r["held_back_loss"] for r in result.history if "held_back_loss" in r}
    best = min(measured, key=measured.get)
    assert list(measured) == list(range(0, len(result.history), 4)) and len(result.history) == best + 4 * 4
    assert measured[0] == pytest.approx(begun, rel=1e-9) and measured[best] == pytest.approx(kept, rel=1e-9)
    model = sm.MergedModel(make(1), problem[2], result.coefficients)
    assert torch.equal(model.merged, result.merged), "the weights are those of the coefficients that were kept"


def test_a_run_that_improves_to_its_end_keeps_its_end():
    problem = make_problem()
    batches = tiny.make_batches(count=4)
    short = {"steps": 5, "measure_every": 10, "batches": batches, "learning_rate": 1e-2, "head_learning_rate": 1e-2}
    stopping = run(problem[2], held_back=0.25, **short)
    without = {task: [held[i] for i in (0, 1, 3)] for task, held in batches.items()}
    free = run(problem[2], **{**short, "batches": without})
    assert torch.equal(stopping.coefficients, free.coefficients) and torch.equal(flat(stopping.heads), flat(free.heads))
    assert not torch.equal(stopping.coefficients, torch.full_like(stopping.coefficients, 0.3))


def test_what_is_held_back_is_spread_and_never_learned_from():
    calibration = Calibration({"a": range(8), "b": range(3)}, ("a", "b"), held_back=0.25, shuffle=True)
    assert calibration.held_back == {"a": [2, 6], "b": [1]}
    visited = [calibration.at(step) for step in range(3 * calibration.steps_per_epoch)]
    assert {at["a"] for at in visited} == {0, 1, 3, 4, 5, 7} and {at["b"] for at in visited} == {0, 2}
