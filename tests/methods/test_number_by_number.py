"""SCE, NearSwap, Arcee Fusion and RAM beside their formulas on whole tensors in fp64."""

import pytest
import torch
from helpers import assert_close, largest_kept

import samerge_ext as sm
from samerge_ext.elementwise import piecewise

SHAPES = {"w": (60, 50), "b": (40,), "same": (30,), "scale": ()}


def packed(count, dtype=torch.float32, size=0.3):
    """Task vectors with zeros in them, and one tensor that nobody changes."""
    torch.manual_seed(3)
    base = {name: torch.randn(shape) for name, shape in SHAPES.items()}

    def change(x, i):
        return size * (1 + i) * torch.randn_like(x) * (torch.rand_like(x) < 0.7)

    experts = {f"t{i}": {n: x if n == "same" else x + change(x, i) for n, x in base.items()} for i in range(count)}
    return sm.PackedWeights.from_state_dicts(base, experts, dtype=dtype)


@pytest.fixture(params=["one piece", "many"])
def pieces(request, monkeypatch):
    if request.param == "many":
        monkeypatch.setattr(piecewise, "PIECE", 1)
        monkeypatch.setattr(piecewise, "ALIGNMENT", 1024)
        monkeypatch.setattr(piecewise, "CHUNK", 100)


def assert_merged(result, expected):
    views = [result.packed.layout.views(row) for row in (result.packed.base, *result.packed.task_vectors)]
    for name, tensor in result.packed.layout.views(result.merged).items():
        base, *changes = (of_row[name].double() for of_row in views)
        assert_close(tensor, expected(base, torch.stack(changes)), name)


def sce(select):
    def expected(base, changes):
        if select < 1:
            variance = changes.var(0, correction=0)
            mask = largest_kept(variance.flatten(), int(select * int(variance.count_nonzero()))).view(base.shape)
            changes = changes * mask
        squares = changes.square().reshape(len(changes), -1).mean(1)
        weights = squares / squares.sum() if squares.sum() >= 1e-6 else torch.full_like(squares, 1 / len(squares))
        agrees = (changes.sign() == torch.where(changes.sum(0) >= 0, 1, -1)) * weights.view(-1, *[1] * base.dim())
        return base + (agrees * changes).sum(0) / agrees.sum(0).clamp(min=1e-6)

    return expected


@pytest.mark.parametrize("select", [1.0, 0.4, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sce(pieces, select, dtype):
    assert_merged(sm.sce(packed(3, dtype), select), sce(select))


def test_sce_of_small_task_vectors_weighs_them_equally():
    weights = packed(3, size=1e-4)
    squares = weights.task_vectors.double().square().mean(1).sum()
    assert 0 < squares < 1e-6
    assert_merged(sm.sce(weights), sce(1.0))


@pytest.mark.parametrize("t", [0.1, 1e-7, 0.0, -1.0])
def test_nearswap(pieces, t):
    def expected(base, changes):
        (change,) = changes
        return base + change * (t / change.abs().clamp(min=1e-6)).clamp(0, 1)

    assert_merged(sm.nearswap(packed(1), t), expected)


def fused(base, changes):
    (change,) = changes
    p, q = torch.softmax(base + change, -1) + 1e-8, torch.softmax(base, -1) + 1e-8
    importance = change.abs() * (p * (p / q).log()).sum(-1, keepdim=True)
    ordered = importance.flatten().sort().values
    first, second, third = (ordered[int(q * (len(ordered) - 1))] for q in (0.25, 0.5, 0.75))
    return base + change * (importance >= second + 1.5 * (third - first))


def test_arcee_fusion(pieces):
    result = sm.arcee_fusion(packed(1))
    assert_merged(result, fused)
    changed = result.packed.layout.views((result.merged != result.packed.base).double())["w"].mean()
    assert 0.02 < changed < 0.4


@pytest.mark.parametrize("r", [0.0, 0.1])
def test_ram(pieces, r):
    def expected(base, changes):
        changed = changes.abs() > 0.05
        together = changed.sum(0)
        shared, own = ((changed & where).reshape(len(changes), -1).sum(1) for where in (together > 1, together == 1))
        factor = 1 + r * (shared / own.clamp(min=0.05)).clamp(0, 0.2)
        alone = (changes * (changed & (together == 1)) * factor.view(-1, *[1] * base.dim())).sum(0)
        return base + alone + (changes * (changed & (together > 1))).sum(0) / together.clamp(min=1)

    assert_merged(sm.ram(packed(3), r, epsilon=0.05), expected)


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda: sm.sce(packed(2), 1.5), "select=1.5"),
        (lambda: sm.nearswap(packed(2)), "nearswap merges the base with one expert, and there are 2"),
        (lambda: sm.nearswap(packed(1), torch.inf), "t=inf"),
        (lambda: sm.arcee_fusion(packed(2)), "arcee_fusion merges the base with one expert"),
        (lambda: sm.ram(packed(2), epsilon=-1.0), "epsilon=-1.0"),
    ],
)
def test_what_makes_no_sense_is_refused(work, message):
    with pytest.raises(ValueError, match=message):
        work()
