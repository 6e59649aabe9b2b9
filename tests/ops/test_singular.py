"""Singular vectors by the Gram of the short side beside LAPACK's, at small σ and low rank."""

import pytest
import torch

from samerge_ext.ops import singular
from samerge_ext.ops.singular import FLOOR, polar_factor, singular_vectors

SHAPES = [(9, 9), (40, 12), (12, 40), (1, 7), (7, 1)]


def with_values(shape, sigma, seed=0):
    """A matrix of given singular values, and its vectors."""
    generator = torch.Generator().manual_seed(seed)
    drawn = lambda rows: torch.linalg.qr(torch.randn(rows, len(sigma), generator=generator, dtype=torch.float64))[0]
    left, right = drawn(shape[0]), drawn(shape[1])
    return left * sigma @ right.mT, left, right


def drawn(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [None, 1, 5])
def test_values_and_vectors_are_those_of_the_svd(shape, k):
    matrix = drawn(shape)
    u, s, vh = (part for part in torch.linalg.svd(matrix, full_matrices=False))
    u, s, vh = u[:, :k], s[:k], vh[:k]
    left, sigma, right = singular_vectors(matrix, k)
    assert left.shape == u.shape and sigma.shape == s.shape and right.shape == vh.mT.shape
    torch.testing.assert_close(sigma, s, rtol=1e-12, atol=0)
    torch.testing.assert_close(left * sigma @ right.mT, u * s @ vh, rtol=0, atol=1e-12)
    torch.testing.assert_close(left.mT @ left, torch.eye(len(s), dtype=s.dtype), rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_matrices_are_decomposed_as_they_are_stored(dtype):
    matrix = drawn((30, 8), dtype=dtype)
    for found, exact in zip(singular_vectors(matrix), singular_vectors(matrix.double()), strict=True):
        assert torch.equal(found, exact)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_polar_factor_is_that_of_the_svd(shape):
    matrix = drawn(shape, seed=1)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    factor, sigma = polar_factor(matrix)
    torch.testing.assert_close(factor, u @ vh, rtol=0, atol=1e-11)
    torch.testing.assert_close(sigma, s, rtol=1e-12, atol=0)


@pytest.mark.parametrize("small", [1e-2, 1e-4, 9e-6])
def test_small_values_are_as_exact_as_is_said(small):
    """Off by some ε (σ₁ / σ)²: the polar factor has both vectors of the smallest value."""
    matrix, left, right = with_values((30, 12), torch.logspace(0, float(torch.tensor(small).log10()), 12, dtype=torch.float64))
    factor, _ = polar_factor(matrix)
    error = (factor - left @ right.mT).norm().item()
    assert error < 20 * torch.finfo(torch.float64).eps / small**2
    assert (torch.linalg.svdvals(factor) > 0.9).all()


@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
def test_what_has_no_length_has_no_direction(shape):
    sigma = torch.tensor([3.0, 2.0, 1.0, FLOOR, 1e-9], dtype=torch.float64)
    matrix, left, right = with_values(shape, sigma)
    found = singular_vectors(matrix)
    assert [int(part.norm(dim=0).count_nonzero()) for part in (found[0], found[2])] == [3, 3] and found[1].count_nonzero() == 3
    assert (polar_factor(matrix)[0] - left[:, :3] @ right[:, :3].mT).norm() < 1e-12
    for part in singular_vectors(torch.zeros(shape)):
        assert part.count_nonzero() == 0 and part.isfinite().all()


def test_scale_does_not_matter():
    matrix = drawn((20, 12), dtype=torch.float32)
    torch.testing.assert_close(polar_factor(matrix * 2.0**-100)[0], polar_factor(matrix)[0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("rank", [0, 1, 4, 15])
def test_factors_give_what_their_product_does(rank):
    left, right = drawn((9, rank)), drawn((rank, 12), seed=1)
    found, (u, s, vh) = singular_vectors((left, right)), torch.linalg.svd(left @ right, full_matrices=False)
    count = min(rank, 9)
    assert [part.shape for part in found] == [(9, count), (count,), (12, count)]
    torch.testing.assert_close(found[1], s[:count], rtol=1e-11, atol=0)
    torch.testing.assert_close(found[0] @ found[2].mT, u[:, :count] @ vh[:count], rtol=0, atol=1e-10)


def test_what_is_left_of_something_longer_may_be_nothing():
    rest = 1e-9 * drawn((9, 5))
    assert singular_vectors(rest)[1].count_nonzero() == 5
    for part in (*singular_vectors(rest, beside=1.0), *singular_vectors((rest, torch.eye(5)), beside=torch.tensor(1.0))):
        assert part.count_nonzero() == 0


@pytest.fixture
def decomposed(monkeypatch):
    """Few of many have their own way from a side of 200 on; -> the types in which such a side is decomposed."""
    eigh, found = torch.linalg.eigh, []
    monkeypatch.setattr(singular, "_LARGE", 200)
    monkeypatch.setattr(torch.linalg, "eigh", lambda gram: (len(gram) >= 200 and found.append(gram.dtype)) or eigh(gram))
    return found


@pytest.mark.parametrize(("last", "whole"), [(0.05, False), (1.0, False), (1e-4, True)])
@pytest.mark.parametrize("scale", [1.0, 2.0**-300])
def test_few_of_many_are_those_of_all(decomposed, last, whole, scale):
    """The tenth value is far above what fp32 makes of it, or, of a spectrum that falls steeply, below."""
    values = torch.logspace(0, float(torch.tensor(last).log10()), 10, dtype=torch.float64)
    sigma = torch.cat([values, last * torch.linspace(0.98, 0.0, 190, dtype=torch.float64)])
    matrix, left, right = with_values((210, 200), sigma)
    for of_matrix in (matrix, matrix.mT):
        found = singular_vectors(of_matrix * scale, 10)
        u, v = (left, right) if of_matrix is matrix else (right, left)
        torch.testing.assert_close(found[1] / scale, values, rtol=1e-9, atol=0)
        torch.testing.assert_close(found[0] @ found[2].mT, u[:, :10] @ v[:, :10].mT, rtol=0, atol=1e-7)
        short = min(found[0], found[2], key=len)
        torch.testing.assert_close(short.mT @ short, torch.eye(10, dtype=torch.float64), rtol=0, atol=1e-12)
    assert decomposed == 2 * ([torch.float32, torch.float64] if whole else [torch.float32])


def test_few_of_many_that_are_equal_or_nothing(decomposed):
    for rank, count in ((200, 10), (5, 5), (0, 0)):
        matrix, left, right = with_values((200, 200), torch.ones(rank, dtype=torch.float64))
        for found in (singular_vectors(matrix, 10), singular_vectors(torch.eye(200) * (rank > 0), 10)):
            assert all(part.isfinite().all() for part in found)
        u, s, v = singular_vectors(matrix, 10)
        assert int(s.count_nonzero()) == count
        torch.testing.assert_close(matrix @ v, u * s, rtol=0, atol=1e-12)
        torch.testing.assert_close((v.mT @ v)[:count, :count], torch.eye(count, dtype=torch.float64), rtol=0, atol=1e-12)
