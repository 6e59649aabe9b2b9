"""The singular vectors of svd_topk: residuals in fp64 against the bounds, and LAPACK's where these say which vectors they are."""

import warnings

import pytest
import torch
from helpers import NARROW, SIGMA_ROUNDING, SIGMA_TOLERANCE, assert_close, random_normal

import samerge_ext as sm
from samerge_ext.ops import krylov

SIDE = 240  # above krylov.DIRECT_SIDE
FALLING = [0.9**i for i in range(SIDE)]


def with_spectrum(m, n, values, dtype=torch.float64):
    u, v = (torch.linalg.qr(side)[0] for side in random_normal((m, len(values)), (n, len(values)), seed=0, dtype=torch.float64))
    return (u * torch.tensor(values, dtype=torch.float64, device=u.device) @ v.mT).to(dtype)


def check(matrices, k=3, rtol=SIGMA_TOLERANCE, **options):
    """Above 1e-6 of the largest value: orthonormal vectors, residuals below bounds, and these below rtol but for rounding."""
    left, sigma, right, bound = sm.svd_topk(matrices, k, rtol=rtol, return_bound=True, vectors=True, **options)
    assert sigma.shape == bound.shape == (len(matrices), k)
    for matrix, u, s, v, allowed in zip(matrices, left, sigma, right, bound, strict=True):
        weight = matrix.double().reshape(matrix.shape[0], -1) if matrix.dim() > 1 else matrix.double().reshape(1, -1)
        assert u.shape == (weight.shape[0], k) and v.shape == (weight.shape[1], k) and u.dtype == v.dtype == sigma.dtype
        scale = weight.abs().max().clamp(min=1e-300)  # so that squares stay in range
        weight, s = weight / scale, s.double() / scale
        count = int((s > krylov.FLOOR * s[0]).sum())
        assert not u[:, count:].any() and not v[:, count:].any()
        for side in (u, v):
            assert_close((side.mT.double() @ side.double())[:count, :count].to(u.dtype), torch.eye(count, device=u.device))
        u, s, v, allowed = u.double()[:, :count], s[:count], v.double()[:, :count], allowed.double()[:count]
        slack = SIGMA_ROUNDING * s[:1]
        for residual in (weight @ v - u * s, weight.mT @ u - v * s):
            assert (residual.norm(dim=0) <= allowed * s + slack).all(), (residual.norm(dim=0) / s, allowed)
        assert ((s - torch.linalg.svdvals(weight.cpu())[:count].to(s)).abs() <= allowed * s + slack).all()
        assert (allowed <= rtol + torch.finfo(sigma.dtype).eps * (1 + s[:1] / s)).all(), allowed
    return left, sigma, right


@pytest.mark.parametrize("dtype", (*NARROW, torch.float64), ids=str)
def test_residuals_lie_within_their_bounds(each_backend, dtype):
    """Random matrices, whose values settle long before their vectors, and falling values; tall, wide, square, small."""
    shapes = (SIDE, SIDE), (SIDE + 8, SIDE), (SIDE, SIDE + 8), (12, 9)
    check([*(matrix.to(dtype) for matrix in random_normal(*shapes, seed=0)), with_spectrum(SIDE, SIDE + 8, FALLING, dtype)])


def test_they_are_those_of_the_whole_decomposition(each_backend):
    k, rtol = 5, 1e-10
    for m, n in ((SIDE + 20, SIDE), (SIDE, SIDE + 20), (30, 40)):
        matrix = with_spectrum(m, n, FALLING[: min(m, n)])
        left, sigma, right = check(matrix[None], k, rtol)
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        nearest = u[:, :k] * s[:k] @ vh[:k]
        # Wedin: an angle is at most residual / gap, and a gap a tenth of a value here.
        assert ((left[0] * sigma[0]) @ right[0].mT - nearest).norm() < 10 * k * rtol * nearest.norm()
        assert ((left[0] * u[:, :k]).sum(0).abs() - 1).abs().max() < 10 * rtol


def test_of_one_tensor_they_are_tensors_and_of_a_list_lists(each_backend):
    stack = random_normal((4, 30, 20), seed=1)[0]
    one, some = sm.svd_topk(stack, 2, vectors=True), sm.svd_topk(list(stack), 2, vectors=True)
    assert [part.shape for part in one] == [(4, 30, 2), (4, 2), (4, 20, 2)] and torch.equal(one[1], some[1])
    for of_one, of_list in ((one[0], some[0]), (one[2], some[2])):
        assert isinstance(of_list, list) and torch.equal(of_one, torch.stack(of_list))
    assert [part.shape for part in sm.svd_topk(torch.empty(0, 3, 4), 2, vectors=True)] == [(0, 3, 2), (0, 2), (0, 4, 2)]
    left, sigma, right, bound = sm.svd_topk([], 2, vectors=True, return_bound=True)
    assert left == right == [] and sigma.shape == bound.shape == (0, 2)


def test_other_dimensions_and_more_than_there_are(each_backend):
    left, _, right = check(random_normal((37,), (6, 3, 4, 4), (), (3, 2), (SIDE, 4), seed=2), k=5)
    assert [(u.shape[0], v.shape[0]) for u, v in zip(left, right)] == [(1, 37), (6, 48), (1, 1), (3, 2), (SIDE, 4)]


def test_what_has_no_length_has_no_direction(each_backend):
    for m, n in ((SIDE, SIDE + 10), (60, 20)):
        low, faint = with_spectrum(m, n, [2.0, 1.0]), with_spectrum(m, n, [1.0, 1e-9])
        left, _, right = check([torch.zeros(m, n, dtype=torch.float64), low, low.float(), faint], k=4)
        assert [int(u.norm(dim=0).count_nonzero()) for u in left] == [0, 2, 2, 1]


def test_rows_apart_and_transposed(each_backend):
    whole = random_normal((300, 400), seed=6)[0]
    check([whole[:SIDE, 7:250], whole[:SIDE, :SIDE].mT, whole[:, :SIDE].mT, whole[::2, ::3]])


@pytest.mark.parametrize("scale", (1e-30, 1e30))
def test_scale_does_not_matter(each_backend, scale):
    check([matrix * scale for matrix in random_normal((SIDE, 200), (20, 30), (9,), seed=5)])
    check([with_spectrum(SIDE, SIDE, FALLING) * scale**5])


def test_small_values_have_vectors_too(each_backend):
    """What fp32 does not settle is searched in fp64; as fp32 vectors they are as near as their rounding."""
    for dtype in (torch.float64, torch.float32):
        check([with_spectrum(SIDE, 300, [1.0, 1e-4, 0.9e-4, 0.5e-4] + [1e-5] * 10, dtype)], k=4)


def test_same_seed_same_result(each_backend, threads):
    if each_backend == "reference":
        pytest.skip("the reference leaves the order of sums to torch")
    matrices = random_normal((SIDE, 250), (30, 20), seed=7)
    first, again, other = (sm.svd_topk(matrices, 3, seed=seed, vectors=True) for seed in (5, 5, 6))
    assert all(torch.equal(a, b) for part in (0, 2) for a, b in zip(first[part], again[part]))
    assert not torch.equal(first[0][0], other[0][0])


def test_what_does_not_settle_is_decomposed_as_a_whole(each_backend, monkeypatch):
    monkeypatch.setattr(krylov, "MAX_STEPS", 3)
    hard = random_normal((250, SIDE), seed=9, dtype=torch.float64)[0]
    with pytest.warns(UserWarning, match=rf"2 of 2 .*matrices\[0\] of shape \[250, {SIDE}\]"):
        check([hard, hard.mT], rtol=1e-11)


def test_no_fall_back_for_random_matrices(each_backend):
    """A flat spectrum, the slowest to settle."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(random_normal((2 * SIDE, SIDE), (200, 600), seed=10), k=8)
