"""DARE: what is dropped is random, and the same whenever and however it is computed."""

import pytest
import torch
from helpers import assert_close
from tiny import make_problem

import samerge_ext as sm
from samerge_ext.elementwise import piecewise
from samerge_ext.methods.dare import random_mask


def large(dtype=torch.bfloat16):
    torch.manual_seed(0)
    base = {"w": torch.randn(400, 500), "b": torch.randn(5)}
    experts = {t: {n: x + 0.1 * torch.randn_like(x) for n, x in base.items()} for t in "ab"}
    return sm.PackedWeights.from_state_dicts(base, experts, dtype=dtype)


def test_a_mask_has_its_density_and_no_pattern():
    kept = torch.stack([random_mask(0, t, stretch, "w", 0.3) for t in range(4) for stretch in range(16)]).double()
    assert kept.mean().item() == pytest.approx(0.3, abs=0.001)  # 4.2 million draws: a deviation of 0.0002
    for lag in (1, 2, 64, 1024):
        both = (kept[:, lag:] * kept[:, :-lag]).mean().item()
        assert both == pytest.approx(0.09, abs=0.001), f"neighbours at a distance of {lag}"
    assert (kept[0] * kept[1]).mean().item() == pytest.approx(0.09, abs=0.006), "stretches"


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_a_mask_of_all_or_nothing(density):
    assert random_mask(0, 0, 0, "w", density).double().mean() == density


def test_numbers_are_dropped_or_rescaled():
    packed = large(torch.float32)
    alone = sm.dare(packed, 0.75, 1.0, weights=[1.0, 0.0])
    change, task_vector = alone.merged - packed.base, packed.task_vectors[0]
    kept = change != 0
    share = kept.double().mean() / (task_vector != 0).double().mean()
    assert share.item() == pytest.approx(0.25, abs=0.01)
    expected = packed.base + torch.where(kept, 4 * task_vector, 0)
    assert_close(alone.merged, expected.double())


def test_ties_after_dropping():
    """At p = 0 it is the elected sum of everything, which is TIES at density 1 without the mean."""
    packed = make_problem()[2]
    assert torch.equal(sm.dare(packed, 0.0, 0.5, rule="ties").merged, sm.ties(packed, 1.0, 0.5, normalize=False).merged)
    assert_close(sm.dare(packed, 0.0, 0.5).merged, sm.task_arithmetic(packed, 0.5).merged)
    mean = sm.dare(packed, 0.0, 1.0, normalize=True)
    assert_close(mean.merged, sm.average(packed).merged)


@pytest.mark.parametrize("rule", ["linear", "ties"])
def test_a_seed_is_all_that_matters(monkeypatch, threads, rule):
    packed = large()
    expected = sm.dare(packed, 0.5, rule=rule, seed=3).merged
    assert not torch.equal(sm.dare(packed, 0.5, rule=rule, seed=4).merged, expected)
    monkeypatch.setattr(piecewise, "PIECE", 1 << 16)
    threads(3)
    assert torch.equal(sm.dare(packed, 0.5, rule=rule, seed=3).merged, expected)


def test_tasks_lose_different_numbers():
    packed = large(torch.float32)
    first, second = (sm.dare(packed, 0.5, 1.0, weights=w).merged != packed.base for w in ([1.0, 0.0], [0.0, 1.0]))
    assert (first & second).double().mean().item() == pytest.approx(0.25, abs=0.01)


def test_what_makes_no_sense_is_refused():
    packed = make_problem()[2]
    with pytest.raises(ValueError, match="drop=-0.1"):
        sm.dare(packed, -0.1)
    with pytest.raises(ValueError, match="rule='mean'"):
        sm.dare(packed, rule="mean")
