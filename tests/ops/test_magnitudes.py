"""The exact selection of the largest magnitudes, row by row and piece by piece, on every backend."""

import pytest
import torch
from helpers import INTERPRETED, largest_kept, random_normal

from samerge_ext import backend
from samerge_ext.elementwise.magnitudes import LargestMagnitudes, kept_count
from samerge_ext.reference.count_digits import BITS

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
SIZES = (1, 1500) if INTERPRETED else (1, 5, 20_000)


def rows(size, dtype, seed=0):
    """Three rows: rounded numbers; one value at every seventh place; mostly zeros of both signs."""
    wide = random_normal((3, size), seed=seed, dtype=torch.float64)[0]
    wide[0] = (8 * wide[0]).round() / 8
    wide[1, ::7] = wide[1, size // 2].clone()
    wide[2, wide[2].abs() < 1] *= 0
    return wide.to(dtype)


def bits(numbers):
    return numbers.view(BITS[numbers.itemsize])


def select(numbers, counts, piece, in_place=False):
    largest = LargestMagnitudes(counts, numbers.shape[1], numbers.dtype)
    for _ in range(largest.rounds):
        for part in numbers.split(piece, 1):
            largest.look(part)
        largest.next_round()
    trimmed = numbers.clone() if in_place else torch.empty_like(numbers)
    for out, part in zip(trimmed.split(piece, 1), (trimmed if in_place else numbers).split(piece, 1), strict=True):
        largest.trim(out, part)
    return trimmed


def expected(numbers, counts):
    """Zeros are kept as they are where there are not as many other numbers as are to be kept."""
    kept = torch.stack([largest_kept(row, count) for row, count in zip(numbers, counts, strict=True)])
    short = numbers.count_nonzero(1) < torch.tensor(counts)
    return torch.where(kept | short[:, None], numbers, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("piece", [7776, 1 << 20])
def test_exactly_the_largest_are_kept(each_level, dtype, size, piece):
    """Also where many are equal, to the bit."""
    numbers = rows(size, dtype)
    for density in (0.2,) if INTERPRETED else (0.01, 0.2, 0.99):
        counts = [kept_count(density, size)] * 3
        assert torch.equal(bits(select(numbers, counts, piece)), bits(expected(numbers, counts))), density


@pytest.mark.parametrize("dtype", DTYPES)
def test_pieces_may_begin_anywhere_and_rows_lie_apart(each_level, dtype):
    wide = torch.full((3, 3000), torch.nan, dtype=dtype)
    wide[:, 501:2501] = rows(2000, dtype)
    counts = [100, 300, 500]
    assert torch.equal(bits(select(wide[:, 501:2501], counts, 333)), bits(expected(rows(2000, dtype), counts)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_may_be_trimmed_where_they_lie(each_level, dtype):
    numbers, counts = rows(5000, dtype), [1000, 700, 30]
    assert torch.equal(select(numbers, counts, 2048, in_place=True), expected(numbers, counts))


def test_every_row_has_its_own_count(each_level):
    """None of a row, all of it, more than there are, and all but one."""
    numbers = rows(1500, torch.float32)
    for counts in ([0, 1500, 25], [1500, 1500, 1500], [2000, 0, 1499]):
        assert torch.equal(bits(select(numbers, counts, 600)), bits(expected(numbers, counts)))


@pytest.mark.parametrize("first", [0, 1023, 1024, 70_000])
def test_equal_numbers_are_kept_in_order(each_level, first):
    """All are equal but one, and some more, or all but some, are kept, across the tiles that blocks take."""
    if INTERPRETED and first > 10_000:
        pytest.skip("minutes for Triton's interpreter")
    numbers = torch.full((2, first + 1100), -0.25)
    numbers[:, first] = 0.5
    for count in (1, 2, first + 2, first + 1099):
        trimmed = select(numbers, [count, count], 1 << 20)
        assert torch.equal(trimmed, expected(numbers, [count, count]))


def test_digits_beyond_16_bits_of_count(each_level):
    """More numbers with one digit than 16 bits can count, which two digits share a word for."""
    if INTERPRETED:
        pytest.skip("Triton's interpreter counts in 64 bits")
    size = 200_000
    numbers = torch.full((1, size), 1.5)
    numbers[0, : size // 2] += 2.0**-20
    assert torch.equal(select(numbers, [size // 2 + 3], size), expected(numbers, [size // 2 + 3]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_nan_and_inf_are_refused(each_level, dtype, bad):
    numbers = rows(1000, dtype)
    numbers[1, 700] = bad
    with pytest.raises(ValueError, match="NaN or Inf"):
        select(numbers, [1, 1, 1], 500)
    kept = [5, 1000, 5]
    assert torch.equal(select(numbers, kept, 500)[[0, 2]], expected(numbers, kept)[[0, 2]]), "it is in a row that is kept whole"


def test_nothing_is_seen(each_backend):
    empty = torch.empty(2, 0)
    assert select(empty, [3, 0], 10).shape == (2, 0)
    assert select(torch.empty(0, 4), [], 10).shape == (0, 4)


def test_what_does_not_fit_is_refused():
    numbers, keys = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)
    counts, cpu = torch.zeros(2, 1 << 16, dtype=torch.int64), backend.kernel
    with pytest.raises(ValueError, match="keys must be int64"):
        cpu("count_digits", numbers)(counts, numbers, keys.int(), keys, 16)
    with pytest.raises(ValueError, match="counts must be int64"):
        cpu("next_digit", numbers)(counts[:, :9], keys, keys, 9, False)
    with pytest.raises(ValueError, match="ties must be int64"):
        cpu("trim", numbers)(numbers, numbers, keys, keys[:1])
    with pytest.raises(ValueError, match="out must have the shape"):
        cpu("trim", numbers)(numbers[:, :4], numbers, keys, keys)
