"""Interpolation on spheres and Model Stock beside their formulas on whole tensors in fp64, without inner products' tricks."""

import math

import pytest
import torch
from helpers import assert_close

import samerge_ext as sm
from samerge_ext.elementwise import piecewise

SHAPES = {"w": (40, 70), "conv": (6, 5, 3, 3), "b": (33,), "scale": ()}


def packed(count, dtype=torch.float32, shapes=SHAPES):
    torch.manual_seed(1)
    base = {name: torch.randn(shape) for name, shape in shapes.items()}
    experts = {f"t{i}": {name: x + 0.5 * torch.randn_like(x) for name, x in base.items()} for i in range(count)}
    return sm.PackedWeights.from_state_dicts(base, experts, dtype=dtype)


def tensors(packed):
    """Base and task vectors of every layer, in fp64."""
    views = [packed.layout.views(row) for row in (packed.base, *packed.task_vectors)]
    return {name: [of_row[name].double() for of_row in views] for name in views[0]}


def assert_merged(result, expected):
    for name, tensor in result.packed.layout.views(result.merged).items():
        assert_close(tensor, expected(*tensors(result.packed)[name]), name)


def angle(a, b):
    return torch.acos(((a * b).sum() / (a.norm() * b.norm())).clamp(-1, 1))


def between(t, a, b):
    phi = angle(a, b)
    return (torch.sin((1 - t) * phi) * a + torch.sin(t * phi) * b) / torch.sin(phi)


def along(tensor, other, over, merged):
    """A merge of two tensors over pairs of their rows, or columns."""
    if over == "tensor" or tensor.dim() < 2:
        return merged(tensor, other)
    a, b = (x.reshape(-1, x.shape[-1]) if over == "rows" else x.reshape(x.shape[0], -1).T for x in (tensor, other))
    found = torch.stack([merged(x, y) for x, y in zip(a, b)])
    return (found if over == "rows" else found.T).reshape(tensor.shape)


@pytest.fixture(params=["one piece", "many"])
def pieces(request, monkeypatch):
    if request.param == "many":
        monkeypatch.setattr(piecewise, "PIECE", 1)
        monkeypatch.setattr(piecewise, "ALIGNMENT", 1024)
        monkeypatch.setattr(piecewise, "CHUNK", 256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_is_on_the_arc(pieces, t, dtype):
    def expected(base, change):
        if base.dim() == 0:  # no angle but 0 and π
            return (1 - t) * base + t * (base + change)
        return between(t, base, base + change)

    assert_merged(sm.slerp(packed(1, dtype), t), expected)


def test_slerp_of_parallel_and_of_empty_tensors_is_linear():
    base = {"parallel": torch.arange(1.0, 6), "opposed": torch.arange(1.0, 6), "zero": torch.zeros(5)}
    expert = {"parallel": 3 * base["parallel"], "opposed": -base["opposed"], "zero": torch.ones(5)}
    found = sm.slerp(sm.PackedWeights.from_state_dicts(base, {"t": expert}), 0.25).state_dict()
    for name in ("parallel", "opposed"):
        assert_close(found[name], 0.75 * base[name] + 0.25 * expert[name], name)
    assert_close(found["zero"], math.sin(0.25 * math.pi / 2) * expert["zero"])  # at right angles to all


@pytest.mark.parametrize("over", ["tensor", "rows", "columns"])
def test_nuslerp_is_between_task_vectors(pieces, over):
    found = sm.nuslerp(packed(2, shapes={"w": (40, 70), "conv": (6, 5, 3, 3), "b": (33,)}), [1.0, 3.0], over=over)
    assert_merged(found, lambda base, a, b: base + along(a, b, over, lambda x, y: between(0.75, x, y)))


def test_nuslerp_of_weights_that_cancel_is_halfway():
    weights = packed(2, shapes={"w": (40, 70)})
    assert torch.equal(sm.nuslerp(weights, [1.0, -1.0]).merged, sm.nuslerp(weights).merged)


@pytest.mark.parametrize("normalize", [True, False])
def test_multislerp_is_a_mean_of_directions_and_lengths(pieces, normalize):
    weights = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)

    def expected(base, *changes):
        w = weights / weights.sum() if normalize else weights
        mean = sum(a * x / x.norm() for a, x in zip(w, changes))
        return base + sum(a * x.norm() for a, x in zip(w, changes)) * mean / mean.norm()

    assert_merged(sm.multislerp(packed(3), weights.tolist(), normalize=normalize), expected)


def test_directions_that_cancel():
    base, up = {"w": torch.zeros(4)}, torch.ones(4)
    two = sm.PackedWeights.from_state_dicts(base, {"a": {"w": up}, "b": {"w": -3 * up}})
    assert_close(sm.multislerp(two).state_dict()["w"], -up)  # the mean
    four = sm.PackedWeights.from_state_dicts(base, {str(i): {"w": up * (-1) ** i} for i in range(4)})
    with pytest.raises(ValueError, match="'w': the weighted directions of the models cancel"):
        sm.multislerp(four)


def test_karcher_has_the_least_squared_angles(pieces):
    """The gradient of the sum of squared angles at m is along m, and lengths are the mean."""

    def residual(weights, found):
        m = found / found.norm()
        pulls = [angle(m, x) * (x / x.norm() - torch.cos(angle(m, x)) * m) / torch.sin(angle(m, x)) for x in weights]
        return sum(pulls).norm()

    result = sm.karcher(packed(3, torch.float64))
    for name, found in result.packed.layout.views(result.merged).items():
        base, *changes = tensors(result.packed)[name]
        weights = [base + change for change in changes]
        assert_close(found.norm(), sum(x.norm() for x in weights) / 3, name)
        if found.dim():
            assert residual(weights, found) < 1e-4 < residual(weights, sum(weights)), name


@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock_is_its_third_equation(pieces, filter_wise):
    def ratio(*changes):
        cosines = [torch.cos(angle(a, b)) for i, a in enumerate(changes) for b in changes[i + 1 :]]
        cosine = sum(cosines) / len(cosines)
        return 3 * cosine / (1 + 2 * cosine)

    def expected(base, *changes):
        rows = [x.reshape(-1, x.shape[-1]) if filter_wise and x.dim() else x.reshape(1, -1) for x in changes]
        r = torch.stack([ratio(*of_row) for of_row in zip(*rows)])[:, None]
        return base + (r * sum(rows) / 3).reshape(base.shape)

    assert_merged(sm.model_stock(packed(3), filter_wise=filter_wise), expected)


def test_model_stock_of_opposed_task_vectors_is_the_base():
    base = {"w": torch.ones(4)}
    weights = sm.PackedWeights.from_state_dicts(base, {"a": {"w": torch.full((4,), 2.0)}, "b": {"w": torch.zeros(4)}})
    assert torch.equal(sm.model_stock(weights).state_dict()["w"], base["w"])


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda: sm.slerp(packed(2)), "slerp merges the base with one expert, and there are 2"),
        (lambda: sm.slerp(packed(1), torch.nan), "t=nan is not a finite number"),
        (lambda: sm.nuslerp(packed(3)), "nuslerp merges two experts, and there are 3"),
        (lambda: sm.nuslerp(packed(2), over="row"), "over='row'; choose"),
        (lambda: sm.nuslerp(packed(2), [1.0]), "weights has 1 values"),
        (lambda: sm.multislerp(packed(2), [1.0, -1.0]), "divides by the sum of the weights, which is 0"),
        (lambda: sm.karcher(packed(2), max_iter=0), "max_iter=0"),
        (lambda: sm.karcher(packed(2), tol=0.0), "tol=0.0"),
        (lambda: sm.model_stock(packed(1)), "the angle between two experts or more"),
    ],
)
def test_what_makes_no_sense_is_refused(work, message):
    with pytest.raises(ValueError, match=message):
        work()
