import warnings

import pytest
import torch
from helpers import NARROW, SIGMA_ROUNDING, SIGMA_TOLERANCE, random_normal

import samerge_ext as sm
from samerge_ext.ops import krylov

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed")
strategies = hypothesis.strategies


def truth(matrix, k):  # [m, n] -> [k] fp64, zeros beyond min(m, n); by LAPACK, since a GPU's Jacobi sweeps end at 1e-13
    weight = matrix.detach().double().cpu()
    if not weight.numel():
        return matrix.new_zeros(k, dtype=torch.float64)
    weight = weight.reshape(weight.shape[0], -1) if weight.dim() > 1 else weight.reshape(1, -1)
    scale = weight.abs().max().clamp(min=1e-300)
    return torch.nn.functional.pad(torch.linalg.svdvals(weight / scale) * scale, (0, k))[:k].to(matrix.device)


def check(matrices, k=3, rtol=SIGMA_TOLERANCE, **options):
    """Relative errors below rtol (below 1e-6 of the largest, absolute ones), and none above its bound."""
    sigma, bound = sm.svd_topk(matrices, k, rtol=rtol, return_bound=True, **options)
    assert sigma.shape == bound.shape == (len(matrices), k)
    for i, matrix in enumerate(matrices):
        expected, actual, allowed = truth(matrix, k), sigma[i].double(), bound[i].double()
        error, small = (actual - expected).abs(), SIGMA_ROUNDING * expected[0]
        below = actual <= 2 * krylov.FLOOR * expected[0]
        assert (error <= torch.where(below, 2 * krylov.FLOOR * expected[0], rtol * expected) + small).all(), (i, actual, expected)
        within = error <= (allowed * actual).nan_to_num(nan=torch.inf) + small
        assert within.all(), f"matrix {i}: bound {allowed} below the error {error / expected}"
        assert (allowed[~below] <= rtol).all() and (allowed >= 0).all()
        assert (actual[1:] <= actual[:-1]).all() and not actual[len(expected) :].any()
    return sigma


def with_spectrum(m, n, values, seed=0, dtype=torch.float64):
    """An [m, n] matrix of the given singular values."""
    left, right = random_normal((m, m if m <= n else n), (n, n if n <= m else m), seed=seed, dtype=torch.float64)
    values = torch.as_tensor(values, dtype=torch.float64, device=left.device)
    u, v = torch.linalg.qr(left)[0][:, : len(values)], torch.linalg.qr(right)[0][:, : len(values)]
    return ((u * values) @ v.mT).to(dtype)


SIDE = 240  # above krylov.DIRECT_SIDE
DECAY = [0.9**i for i in range(SIDE)]


def test_sides_are_on_both_sides_of_the_threshold():
    assert 100 < krylov.DIRECT_SIDE < 170


def test_shapes_and_order(each_level):
    shapes = [(SIDE, SIDE), (7, 3), (300, SIDE), (1, 1), (SIDE, 300), (3, 7), (400, 2), (2, 400), (SIDE, SIDE), (40, 50)]
    check(random_normal(*shapes, seed=0))
    check([with_spectrum(300, SIDE, DECAY), with_spectrum(SIDE, 300, DECAY)])


def test_one_tensor_of_many(each_backend):
    stack = random_normal((4, 30, 20), seed=1)[0]
    assert torch.equal(sm.svd_topk(stack, 2), sm.svd_topk(list(stack), 2))
    assert sm.svd_topk(torch.empty(0, 3, 4), 2).shape == sm.svd_topk([], 2).shape == (0, 2)


@pytest.mark.parametrize("dtype", (*NARROW, torch.float64), ids=str)
def test_dtypes(each_level, dtype):
    matrices = [with_spectrum(SIDE, 260, DECAY, dtype=dtype), with_spectrum(30, 50, [3, 1, 1, 0.5], dtype=dtype)]
    result = check(matrices)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_other_dimensions(each_backend):
    vector, kernel, number = random_normal((37,), (6, 3, 4, 4), (), seed=2)
    result = check([vector, kernel, number, torch.empty(0, 5), torch.empty(0)])
    assert torch.allclose(result[0], torch.tensor([vector.norm().item(), 0, 0]))
    assert torch.allclose(result[2], torch.tensor([number.abs().item(), 0, 0]))
    assert not result[3:].any()


def test_more_values_than_there_are(each_backend):
    result = check(random_normal((3, 2), (SIDE, 4), seed=3), k=6)
    assert not result[0, 2:].any() and not result[1, 4:].any()


@pytest.mark.parametrize("k", (1, 9, 30))
def test_any_number_of_values(each_backend, k):
    check([with_spectrum(300, SIDE, DECAY), random_normal((90, 100), seed=4)[0]], k=k)


def test_zero_rank_one_and_repeated_values(each_backend):
    some = [0.0, 0.0, 1.0], [1.0], [2.0, 2.0, 2.0, 2.0, 1.0], [1.0] * 20, [1.0, 1.0, 0.5, 0.5, 0.5], [5.0, 1e-9]
    for m, n in ((SIDE, 250), (250, SIDE), (60, 20)):
        check([torch.zeros(m, n, dtype=torch.float64), *(with_spectrum(m, n, sorted(s, reverse=True)) for s in some)], k=4)
        check([with_spectrum(m, n, sorted(s, reverse=True), dtype=torch.float32) for s in some[1:5]], k=4)
    check([torch.eye(SIDE), torch.ones(SIDE, SIDE)], k=12)


@pytest.mark.parametrize("ratio", (1e-2, 1e-4, 2e-6))
def test_values_far_below_the_largest_keep_their_relative_error(each_level, ratio):
    """Down to 1e-6 of the largest, although WᵀW squares the ratio: what fp32 does not settle is computed in fp64."""
    for m, n in ((SIDE, 300), (40, 50)):
        check([with_spectrum(m, n, [1.0, ratio, ratio * 0.9, ratio * 0.5, ratio * 0.2])])
        check([with_spectrum(m, n, [1.0, ratio, ratio * 0.9] + [ratio * 0.5] * 10)])


@pytest.mark.parametrize("scale", (1e-20, 1e20, 1e-38, 1e37))
def test_scale_does_not_matter(each_level, scale):
    matrices = [m * scale for m in random_normal((SIDE, 200), (20, 30), (9,), seed=5)]
    check(matrices)
    small, large = random_normal((20, 30), (20, 30), seed=5, dtype=torch.float64)
    check([small * 1e-150, large * 1e150])


def test_rows_apart_and_transposed(each_backend):
    whole = random_normal((300, 400), seed=6)[0]
    check([whole[:SIDE, 7:250], whole[:, :SIDE].mT, whole[::2, ::3]])


def test_same_seed_same_result(each_level, threads):
    if each_level == "reference":
        pytest.skip("the reference leaves the order of sums to torch")
    matrices = random_normal((SIDE, 250), (SIDE, 250), (30, 20), seed=7)
    first = sm.svd_topk(matrices, 3, seed=5)
    assert torch.equal(first, sm.svd_topk(matrices, 3, seed=5))
    assert not torch.equal(first, sm.svd_topk(matrices, 3, seed=6))


def test_a_finer_rtol(each_backend):
    check(random_normal((SIDE, 200), (50, 60), seed=8), rtol=1e-4)
    check([with_spectrum(SIDE, 260, DECAY), with_spectrum(50, 60, DECAY[:50])], rtol=1e-8)


def test_what_does_not_settle_goes_to_svdvals_and_says_so(each_backend, monkeypatch):
    monkeypatch.setattr(krylov, "MAX_STEPS", 3)
    easy, hard = with_spectrum(250, SIDE, [1.0, 0.5, 0.2]), random_normal((250, SIDE), seed=9, dtype=torch.float64)[0]
    with pytest.warns(UserWarning, match=rf"1 of 2 .*matrices\[1\] of shape \[250, {SIDE}\]"):
        result, bound = sm.svd_topk([easy, hard], 3, return_bound=True)
    assert torch.allclose(result[1], truth(hard, 3), rtol=1e-12) and bound[1].max() < 1e-10


def test_random_matrices_settle(each_backend):
    """A flat spectrum, the slowest to settle, needs no fall-back."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(random_normal((SIDE, SIDE), (2 * SIDE, SIDE), (170, 600), seed=10))


def test_not_finite_is_named(each_backend):
    for value in (torch.nan, torch.inf, -torch.inf):
        for sides in ((20, 30), (SIDE, 250), (1, 30)):
            matrices = random_normal(sides, (40, 30), sides, (SIDE, 260), seed=11)
            for matrix in matrices[2:]:
                matrix[0, 4] = value
            with pytest.raises(ValueError, match=rf"matrices\[2\] of shape \[{sides[0]}, {sides[1]}\] holds NaN"):
                sm.svd_topk(matrices, 3)


def test_errors_name_the_argument():
    matrix = torch.ones(3, 4)
    for error, message, arguments in (
        (ValueError, "k is 0", ([matrix], 0)),
        (ValueError, "rtol 2", ([matrix], 1, 2)),
        (ValueError, r"matrices has shape \[3, 4\]", (matrix, 1)),
        (TypeError, r"matrices\[1\] is torch.int64", ([matrix, matrix.long()], 1)),
    ):
        with pytest.raises(error, match=message):
            sm.svd_topk(*arguments)


@strategies.composite
def matrices_of_any_kind(draw):
    """Matrices of one random shape: dense, of low rank, with clusters or a long tail, at any scale."""
    m, n = draw(strategies.integers(1, 60)), draw(strategies.integers(1, 60))
    if draw(strategies.booleans()):  # above the direct threshold
        m, n = m + 165, n + 165
    rank = draw(strategies.integers(1, min(m, n)))
    kind = draw(strategies.sampled_from(("dense", "power", "geometric", "steps", "flat")))
    seed, exponent = draw(strategies.integers(0, 2**20)), draw(strategies.integers(-25, 25))
    i = torch.arange(rank, dtype=torch.float64)
    values = {
        "power": (1 + i) ** -draw(strategies.floats(0.01, 3)),
        "geometric": draw(strategies.floats(0.3, 0.999)) ** i,
        "steps": 0.5 ** (i // draw(strategies.integers(1, 12))),
        "flat": 1 - 0.1 * i / rank,
    }.get(kind)
    matrix = random_normal((m, n), seed=seed)[0].double() if values is None else with_spectrum(m, n, values, seed)
    dtype = draw(strategies.sampled_from((torch.float32, torch.float64)))
    return (matrix * 10.0**exponent).to(dtype), draw(strategies.sampled_from((1, 3, 3, 3, 5)))


@hypothesis.settings(max_examples=400, deadline=None, derandomize=True, database=None)
@hypothesis.given(matrices_of_any_kind())
def test_errors_lie_within_their_bounds(case):
    matrix, k = case
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*did not settle")  # a warning is no wrong result
        check([matrix], k=k)
