"""Dropping numbers at random: the same ones on every backend, and the others rescaled and rounded once."""

import pytest
import torch
from helpers import random_normal

from samerge_ext import backend, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STRETCH = 1 << 16
SIZES = (5, 1001, STRETCH + 3)


def arguments(size, dtype, density=(0.3, 1.0, 0.0, 0.9)):
    numbers = random_normal((len(density), size), seed=size, dtype=torch.float64)[0].to(dtype)
    generator = torch.Generator("cpu").manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (len(density), -(-size // STRETCH)), generator=generator, device="cpu")
    thresholds = [round(d * 2**31) for d in density]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    factors = torch.tensor([1 / d if d else 1.0 for d in density], dtype=wide)
    return numbers, bits.to(torch.int32).to(numbers.device), torch.tensor(thresholds), factors


def dropped(numbers, *rest, out=None):
    out = torch.empty_like(numbers) if out is None else out
    backend.kernel("drop", numbers)(out, numbers, *rest)
    return out


def truth(numbers, keys, thresholds, factors):
    """The definition, in Python's integers, of every number of every row."""
    result = []
    for row, of_row, threshold in zip(numbers.tolist(), keys.tolist(), thresholds.tolist(), strict=True):
        for i, number in enumerate(row):
            mixed = (i % STRETCH * 0x9E3779B9 + of_row[i // STRETCH]) % 2**32
            mixed = (mixed ^ mixed >> 16) * 0x85EBCA6B % 2**32
            mixed = (mixed ^ mixed >> 13) * 0xC2B2AE35 % 2**32
            kept = (mixed ^ mixed >> 16) >> 1 < threshold
            result.append(number if kept else 0.0)
    kept = torch.tensor(result, dtype=factors.dtype).view(numbers.shape)
    return (kept * factors[:, None]).to(numbers.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_is_the_definition(dtype):
    given = arguments(STRETCH + 50, dtype, density=(0.3,))
    out = torch.empty_like(given[0])
    reference.drop(out, *given)
    assert torch.equal(out, truth(*given))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_the_same_numbers_everywhere(each_level, dtype, size):
    given = arguments(size, dtype)
    expected = torch.empty_like(given[0])
    reference.drop(expected, *given)
    assert torch.equal(dropped(*given), expected)
    in_place = given[0].clone()
    assert torch.equal(dropped(in_place, *given[1:], out=in_place), expected)


@pytest.mark.parametrize("offset", [1, 4])
def test_rows_may_lie_apart_and_begin_anywhere(each_level, offset):
    numbers, *rest = arguments(2000, torch.bfloat16)
    wide = torch.full((2, 4, 2100), torch.nan, dtype=torch.bfloat16)
    wide[0, :, offset : offset + 2000] = numbers
    out = dropped(wide[0, :, offset : offset + 2000], *rest, out=wide[1, :, offset : offset + 2000])
    assert torch.equal(out, dropped(numbers, *rest))
    assert wide[1, :, :offset].isnan().all() and wide[1, :, offset + 2000 :].isnan().all()


def test_what_does_not_fit_is_refused():
    numbers, keys, thresholds, factors = arguments(STRETCH + 1, torch.float32)
    drop = backend.kernel("drop", numbers)
    with pytest.raises(ValueError, match=r"keys must be int32 \[4, 2\]"):
        drop(numbers, numbers, keys[:, :1], thresholds, factors)
    with pytest.raises(ValueError, match="thresholds must be int64"):
        drop(numbers, numbers, keys, thresholds.int(), factors)
    with pytest.raises(ValueError, match="factors must be"):
        drop(numbers, numbers, keys, thresholds, factors.double())
    with pytest.raises(ValueError, match="out must have the shape"):
        drop(numbers.half(), numbers, keys, thresholds, factors)
