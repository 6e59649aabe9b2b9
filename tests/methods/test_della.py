"""DELLA: what is kept is random, with a probability that rises with the rank, and the same however it is computed."""

import pytest
import torch
from helpers import assert_close

import samerge_ext as sm
from samerge_ext.elementwise import piecewise
from samerge_ext.methods.della import larger_or_lucky
from samerge_ext.reference.drop import uniform


def packed(dtype=torch.float32):
    torch.manual_seed(0)
    base = {"w": torch.randn(300, 500), "conv": torch.randn(8, 30, 3, 3), "b": torch.randn(700)}
    experts = {t: {n: x + 0.1 * torch.randn_like(x) for n, x in base.items()} for t in "ab"}
    return sm.PackedWeights.from_state_dicts(base, experts, dtype=dtype)


def kept_share(row, density, epsilon, draws=1 << 17):
    """How often each number of a row [C] is kept."""
    stretches = [uniform(torch.tensor(key, dtype=torch.int32)) for key in range(-(-draws * len(row) // (1 << 16)))]
    drawn = torch.cat(stretches)[: draws * len(row)].view(draws, len(row))
    return larger_or_lucky(row.expand(draws, -1), drawn, density, epsilon).double().mean(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.15), (0.3, 0.29), (0.2, 0.0)])
def test_probabilities_rise_with_the_rank(dtype, density, epsilon):
    row = torch.tensor([-3.0, 0.5, 0.0, 2.0, -1.0, 1.5, 0.25], dtype=dtype)
    ranks = row.abs().argsort().argsort().double()
    expected = density - epsilon + 2 * epsilon * ranks / (len(row) - 1)
    assert (kept_share(row, density, epsilon) - expected).abs().max() < 0.006  # four deviations of 131,072 draws


def test_of_equal_magnitudes_each_has_a_rank_of_its_own():
    """The first the lowest, as a stable sort has it."""
    found = kept_share(torch.tensor([2.0, -1.0, 1.0, 1.0]), 0.5, 0.3)
    assert (found - torch.tensor([0.8, 0.2, 0.4, 0.6], dtype=torch.float64)).abs().max() < 0.006
    assert (kept_share(torch.tensor([2.0]), 0.3, 0.2) - 0.3).abs() < 0.006


def test_numbers_are_kept_independently():
    row = torch.randn(64, generator=torch.Generator().manual_seed(1))
    drawn = torch.cat([uniform(torch.tensor(key, dtype=torch.int32)) for key in range(64)]).view(-1, 64)
    kept = larger_or_lucky(row.expand(len(drawn), -1), drawn, 0.5, 0.4).double()
    correlation = torch.corrcoef(kept.T).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / len(drawn) ** 0.5


def test_what_is_kept_keeps_the_sum_of_magnitudes_of_a_tensor():
    weights = packed()
    change = sm.della(weights, 0.4, weights=[1.0, 0.0], rule="linear", normalize=False).merged - weights.base
    views = [weights.layout.views(row) for row in (weights.base, weights.task_vectors[0], change)]
    for name, (base, whole, found) in ((name, [of_row[name].double() for of_row in views]) for name in views[0]):
        kept = found != 0
        share = kept.double().mean().item()
        assert share == pytest.approx(0.4, abs=0.06 if name == "b" else 0.02), name
        factor = whole.abs().sum() / whole[kept].abs().sum()
        assert_close((base + found).float(), base + torch.where(kept, factor * whole, 0), name)
        large = whole.abs() > whole.abs().median()
        assert kept[large].double().mean() > kept[~large].double().mean() + 0.1, name  # 0.15 on average


def test_a_row_is_along_the_second_dimension():
    """One large number in each row of a tensor of others: kept more often only among its own."""
    change = torch.randn(2000, 30, 4, generator=torch.Generator().manual_seed(0)).abs() + 1
    change[:, :, 1:] *= 100  # rows of a channel each
    base = {"w": torch.zeros_like(change)}
    found = sm.della(sm.PackedWeights.from_state_dicts(base, {"t": {"w": change}}), 0.5, epsilon=0.4, rescale=False)
    kept = (found.state_dict()["w"] != 0).double()
    assert (kept.mean((0, 1)) - 0.5).abs().max() < 0.01
    ranks = change.argsort(1).argsort(1)
    assert kept[ranks == 29].mean() == pytest.approx(0.9, abs=0.02) and kept[ranks == 0].mean() == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("rule", ["linear", "ties"])
def test_a_seed_is_all_that_matters(monkeypatch, threads, rule):
    weights = packed(torch.bfloat16)
    expected = sm.della(weights, rule=rule, seed=3).merged
    assert not torch.equal(sm.della(weights, rule=rule, seed=4).merged, expected)
    monkeypatch.setattr(piecewise, "PIECE", 1 << 16)
    threads(3)
    assert torch.equal(sm.della(weights, rule=rule, seed=3).merged, expected)


def test_all_and_nothing_are_no_matter_of_chance():
    weights = packed()
    assert torch.equal(sm.della(weights, 1.0).merged, sm.ties(weights, 1.0).merged)
    assert torch.equal(sm.della(weights, 0.0).merged, weights.base)
    first = sm.della(weights, [1.0, 0.0], rule="linear", normalize=False).merged
    assert torch.equal(first, sm.task_arithmetic(weights, [1.0, 0.0]).merged)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"density": 1.5}, "density=1.5"),
        ({"density": 0.1}, r"'b': density ± epsilon, 0.1 ± 0.15, is to lie between 0 and 1|'w': density"),
        ({"density": 0.9, "epsilon": 0.1}, "0.9 ± 0.1"),
        ({"rule": "mean"}, "rule='mean'"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        sm.della(packed(), **arguments)
