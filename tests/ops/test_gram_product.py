"""The kernels below svd_topk and layer_stats: block products with WᵀW, and moments."""

import pytest
import torch
from helpers import INTERPRETED, MOMENTS_TOLERANCE, NARROW, THREADS, assert_close, random_normal
from torch.library import opcheck

from samerge_ext import reference
from samerge_ext.ops import gram_product, moments

SHAPES = [(1, 1), (5, 3), (3, 5), (64, 33), (37, 100), (130, 130), (1, 40), (40, 1)]
ROWS = 5 if INTERPRETED else None  # for moments, which take one row after the other; by default all
LARGE = [] if INTERPRETED else [(700, 384), (384, 700), (20000, 17), (17, 20000), (9, 100003)]


def problem(shape, dtype=torch.float32, base=None, real=torch.float32, batch=3, width=8):
    """matrices, bases, q [B, width, side], scale [B]"""
    numbers = random_normal(*[shape] * 2 * batch, (batch, width, min(shape)), seed=sum(shape), dtype=torch.float64)
    matrices = [w.to(dtype) for w in numbers[:batch]]
    bases = [w.to(base) for w in numbers[batch:-1]] if base else []
    return matrices, bases, numbers[-1].to(real), torch.tensor([1.0, 0.5, 4.0] * batch, dtype=torch.float64)[:batch]


def close(matrices, bases, q, scale):
    expected = reference.gram_product([w.double() for w in matrices], [w.double() for w in bases], q.double(), scale)
    assert_close(gram_product(matrices, bases, q, scale), expected)


def close_moments(matrices, bases=()):
    actual = moments(matrices, list(bases))
    expected = reference.moments(matrices, list(bases))
    scale = expected[:, 3:].clamp(min=1e-300)
    powers = torch.tensor([1.0, 2.0, 1.0, 1.0], device=scale.device)
    room = MOMENTS_TOLERANCE * torch.stack([scale[:, 0], expected[:, 1], expected[:, 2], scale[:, 0]], 1)
    assert ((actual - expected).abs() <= room + 1e-30 * scale**powers).all(), (actual, expected)


def test_the_truth_is_the_equation():
    (w,), _, q, _ = problem((5, 3), torch.float64, real=torch.float64, batch=1)
    two = torch.tensor([2.0], dtype=torch.float64)
    assert_close(reference.gram_product([w], [], q, two), 4 * q @ (w.mT @ w))
    assert_close(reference.gram_product([w.mT], [], q, two), 4 * q @ (w.mT @ w))
    assert_close(reference.gram_product([w], [w], q, two), 16 * q @ (w.mT @ w))


@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
def test_any_shape(each_level, shape):
    close(*problem(shape))
    close(*problem(shape, real=torch.float64))
    close(*problem(shape, width=20))
    matrices, *_ = problem(shape)
    close_moments(matrices)


@pytest.mark.parametrize("base", [None, *NARROW])
@pytest.mark.parametrize("dtype", NARROW)
def test_dtypes_mix(each_level, dtype, base):
    for shape in ((70, 33), (33, 70)):
        close(*problem(shape, dtype, base))
        matrices, bases, q, scale = problem(shape, dtype, base, real=torch.float64)
        close(matrices, bases, q, scale)
        close_moments([w[:ROWS] for w in matrices], [w[:ROWS] for w in bases])


def test_double(each_level):
    for base in (None, torch.float64):
        matrices, bases, q, scale = problem((40, 70), torch.float64, base, real=torch.float64)
        close(matrices, bases, q, scale)
        close_moments(matrices, bases)


def test_rows_may_lie_apart(each_level):
    whole = random_normal((3, 50, 90), seed=1)[0]
    matrices = [w[3:, 5:47] for w in whole]
    _, _, q, scale = problem((47, 42))
    close(matrices, [], q, scale)
    close(matrices, matrices, q, scale)
    close_moments(matrices)


def test_a_mean_far_from_zero_costs_no_digits(each_level):
    numbers = random_normal((30, 1200), seed=2, dtype=torch.float64)[0]
    close_moments([numbers + 1e6, numbers + 1, 1e-6 * numbers])
    close_moments([(numbers * 0.01).float()], [torch.full((30, 1200), 1000.0)])  # a sum that fp32 would round


def test_moments_of_nothing_and_of_what_is_not_finite(each_level):
    assert not moments([torch.empty(0, 7)], []).any()
    spoilt = torch.zeros(5, 40)
    for value in (torch.nan, torch.inf, -torch.inf):
        for place in (0, 117, 199):
            matrix = spoilt.clone()
            matrix.view(-1)[place] = value
            assert not moments([matrix, spoilt], [])[0, 3].isfinite()
    assert moments([spoilt], [])[0, 3] == 0


def test_threads_and_repeats_agree_to_the_bit(each_level, threads):
    if each_level == "reference":
        pytest.skip("the reference leaves the order of sums to torch")
    shape = (200, 30) if INTERPRETED else (3000, 300)
    matrices, bases, q, scale = problem(shape)
    wide = [w.mT.contiguous() for w in matrices]
    results = []
    for count in THREADS:
        threads(count)
        results.append((gram_product(matrices, bases, q, scale), gram_product(wide, bases, q, scale), moments(matrices, [])))
    for some in zip(*results):
        assert all(torch.equal(some[0], other) for other in some)
    alone = gram_product(matrices[:1], [], q[:1], scale[:1])
    assert torch.equal(alone[0], results[0][0][0]), "the result depends on the other matrices"


def test_opcheck(each_backend):
    matrices, bases, q, scale = problem((20, 9), torch.bfloat16, torch.float32)
    opcheck(torch.ops.samerge.gram_product.default, (matrices, bases, q, scale))
    opcheck(torch.ops.samerge.moments.default, (matrices, bases))


def test_errors_name_the_argument():
    matrices, _, q, scale = problem((20, 9))
    cases = [
        (ValueError, r"matrices\[1\] has shape \[9, 20\]", ([matrices[0], matrices[1].mT], [], q, scale)),
        (ValueError, r"dense rows", ([w[:, ::2] for w in matrices], [], q, scale)),
        (TypeError, r"matrices\[2\] is torch.float64", ([*matrices[:2], matrices[2].double()], [], q, scale)),
        (ValueError, r"one for every matrix", (matrices, matrices[:1], q, scale)),
        (ValueError, r"q has shape \[3, 6, 9\]", (matrices, [], q[:, :6], scale)),
        (TypeError, r"q is torch.float32", ([w.double() for w in matrices], [], q, scale)),
    ]
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            gram_product(*arguments)
