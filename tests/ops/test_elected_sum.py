"""Sign election and the mean of those who agree, against the definition number by number."""

import pytest
import torch
from helpers import NARROW, assert_close, random_normal
from torch.library import opcheck

from samerge_ext import reference
from samerge_ext.ops import elected_sum


def inputs(num_tasks, n, base=torch.float32, tasks=torch.float32, seed=0):
    """Task vectors of which half is trimmed."""
    wide = torch.float64 if base == torch.float64 else torch.float32
    base_values, rows, keep = random_normal((n,), (num_tasks, n), (num_tasks, n), seed=seed, dtype=wide)
    weights = torch.tensor((3 * [0.5, 1.0, -0.25, 2.0, 0.75])[:num_tasks], dtype=wide)  # exact in every dtype
    return base_values.to(base), torch.where(keep > 0, rows, 0).to(tasks), weights


def truth(base, task_vectors, weights, scale=1.0, normalize=True):
    values = (task_vectors * weights.to(task_vectors.dtype)[:, None]).double()
    return reference.elected_sum(base.double(), values / weights.double()[:, None], weights.double(), scale, normalize)


def test_the_truth_is_the_definition():
    base, task_vectors, weights = inputs(4, 1024, torch.float64, torch.float64)
    expected = base.clone()
    for i in range(1024):
        values = [float(w * v) for w, v in zip(weights, task_vectors[:, i])]
        sign = 1 if sum(values) >= 0 else -1
        agree = [t for t, value in enumerate(values) if value * sign > 0]
        if agree:
            expected[i] += 0.7 * sum(values[t] for t in agree) / sum(float(weights[t]) for t in agree)
    assert_close(reference.elected_sum(base, task_vectors, weights, 0.7, True), expected)


@pytest.mark.parametrize("base", NARROW)
@pytest.mark.parametrize("tasks", NARROW)
@pytest.mark.parametrize("normalize", [True, False])
def test_dtypes_mix(each_level, base, tasks, normalize):
    arguments = inputs(5, 3 * 1024, base, tasks)
    result = elected_sum(*arguments, 0.7, normalize)
    assert result.dtype == base
    assert_close(result, truth(*arguments, 0.7, normalize))


@pytest.mark.parametrize("num_tasks", [0, 1, 2, 8, 11])
def test_any_number_of_tasks_and_double(each_level, num_tasks):
    arguments = inputs(num_tasks, 2048, torch.float64, torch.float64)
    assert_close(elected_sum(*arguments), truth(*arguments))


@pytest.mark.parametrize("tasks", NARROW)
def test_vectors_that_cancel_elect_plus(each_level, tasks):
    """A product fused with the addition would leave a residue of either sign."""
    (row,) = random_normal((1024,), seed=3)
    task_vectors = torch.stack([row, -row]).to(tasks)
    result = elected_sum(torch.zeros(1024), task_vectors, torch.tensor([0.3, 0.3]))
    assert torch.equal(result > 0, row != 0), "the positive one counts"


def test_rows_may_lie_apart(each_level):
    base, task_vectors, weights = inputs(3, 2048)
    wide = torch.full((3, 4096), torch.nan)
    wide[:, 1024:3072] = task_vectors
    assert torch.equal(elected_sum(base, wide[:, 1024:3072], weights), elected_sum(base, task_vectors, weights))


def test_a_nan_shows(each_level):
    base, task_vectors, weights = inputs(3, 1024)
    task_vectors[1, 7] = torch.nan
    assert elected_sum(base, task_vectors, weights).isnan().nonzero().flatten().tolist() == [7]


def test_threads_do_not_matter(threads):
    arguments = inputs(4, 200 * 1024, torch.bfloat16, torch.bfloat16)
    threads(1)
    one = elected_sum(*arguments)
    threads(3)
    assert torch.equal(elected_sum(*arguments), one)


def test_what_does_not_fit_is_refused():
    base, task_vectors, weights = inputs(3, 1024)
    with pytest.raises(ValueError, match="multiple of 1024"):
        elected_sum(base[:100], task_vectors, weights)
    with pytest.raises(ValueError, match=r"task_vectors has shape \[3, 512\]"):
        elected_sum(base, task_vectors[:, :512], weights)
    with pytest.raises(ValueError, match=r"weights has shape \[2\]"):
        elected_sum(base, task_vectors, weights[:2])
    with pytest.raises(TypeError, match="weights is torch.float64"):
        elected_sum(base, task_vectors, weights.double())


def test_opcheck():
    opcheck(torch.ops.samerge.elected_sum.default, (*inputs(3, 1024), 0.5, True))
