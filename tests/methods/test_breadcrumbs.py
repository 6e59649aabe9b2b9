"""Model Breadcrumbs beside a sort."""

import pytest
import torch
from helpers import assert_close, largest_kept

import samerge_ext as sm
from samerge_ext.elementwise import piecewise
from samerge_ext.elementwise.piecewise import Combination, Piece, merge_pieces
from samerge_ext.methods.breadcrumbs import Breadcrumbs
from samerge_ext.methods.ties import Ties


def packed(dtype=torch.float32):
    torch.manual_seed(2)
    base = {"w": torch.randn(90, 70), "b": torch.randn(9), "same": torch.randn(50)}
    experts = {t: {n: x + (0.1 * torch.randn_like(x)).round(decimals=2) * (n != "same") for n, x in base.items()} for t in "ab"}
    return sm.PackedWeights.from_state_dicts(base, experts, dtype=dtype)


def crumbs(change, density, gamma):
    """By definition, with the first of equal magnitudes."""
    numel = change.numel()
    kept = numel if density == 1 else int(density * numel)
    outliers = min(int(gamma * numel), numel - kept)
    mask = largest_kept(change.flatten(), outliers + kept) & ~largest_kept(change.flatten(), outliers)
    return change * mask.view(change.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("density", "gamma"), [(0.5, 0.1), (0.9, 0.3), (0.0, 0.2), (1.0, 0.2), (0.3, 0.0)])
def test_neither_the_largest_nor_the_smallest(monkeypatch, dtype, density, gamma):
    monkeypatch.setattr(piecewise, "PIECE", 1 << 10)
    monkeypatch.setattr(piecewise, "ALIGNMENT", 1 << 10)
    weights = packed(dtype)
    views = [weights.layout.views(row) for row in (weights.base, *weights.task_vectors)]
    found = sm.breadcrumbs(weights, density, 0.8, gamma=gamma, weights=[1.0, 0.5]).merged
    for name, tensor in weights.layout.views(found).items():
        base, a, b = (of_row[name].double() for of_row in views)
        assert_close(tensor, base + 0.8 * (crumbs(a, density, gamma) + 0.5 * crumbs(b, density, gamma)), name)


def test_with_an_elected_sign_it_is_ties_of_what_is_left():
    weights = packed()
    found = sm.breadcrumbs(weights, 0.4, gamma=0.0, rule="ties", normalize=True).merged
    assert torch.equal(found, sm.ties(weights, 0.4).merged)  # without outliers the largest are kept


RESCALED = {
    "breadcrumbs": lambda: (Breadcrumbs(1000, torch.float32, [0.5], [0.1], Combination([1.0]), True), 0.1),
    "ties": lambda: (Ties(1000, torch.float32, [0.5], Combination([1.0]), True), 0.0),
}


@pytest.mark.parametrize("size", [1000, 300])
@pytest.mark.parametrize("method", RESCALED)
def test_rescaling_keeps_the_sum_of_magnitudes(method, size):
    """Of a tensor of one piece, which is seen again as it is, and of several; numbers of equal magnitude are counted anew."""
    torch.manual_seed(0)
    change = torch.zeros(1, 1024).index_copy(1, torch.arange(1000), torch.randn(1, 1000).round(decimals=1))

    def cut():
        for start in range(0, 1000, size):
            rows = torch.zeros(1, 1024)
            rows[:, : min(size, 1000 - start)] = change[:, start : min(start + size, 1000)]
            yield Piece(start, min(size, 1000 - start), torch.zeros(1024), rows, rows)

    only = list(cut())
    rule, gamma = RESCALED[method]()
    merged = torch.cat([m[: p.size] for p, m in merge_pieces(rule, lambda: iter(only if len(only) == 1 else cut()))])
    expected = crumbs(change[0, :1000].double(), 0.5, gamma)
    assert_close(merged, expected * change.double().abs().sum() / expected.abs().sum())


def test_what_makes_no_sense_is_refused():
    for name, value in (("density", 1.1), ("gamma", -0.1), ("rule", "mean")):
        with pytest.raises(ValueError, match=f"{name}={value!r}"):
            sm.breadcrumbs(packed(), **{name: value})
