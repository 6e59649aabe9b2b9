import pytest
import torch
from helpers import INTERPRETED, NARROW, THREADS, assert_close, packed
from torch.library import opcheck

import samerge_ext as sm
from samerge_ext import reference

GAPS = [1, 0, 3, 0, 9 if INTERPRETED else 150, 2, 0]  # blocks per layer: some without any, one of three segments


def truth(grad, task_vectors, block_layer, num_layers):
    return reference.coefficient_grad(grad.double(), task_vectors.double(), block_layer, num_layers)


def close(result, grad, task_vectors, block_layer, num_layers):
    """Sums of signed products may cancel: the error is measured against the root of the sums of their squares."""
    expected = truth(grad, task_vectors, block_layer, num_layers)
    scale = truth(grad.double().square(), task_vectors.double().square(), block_layer, num_layers).sum().sqrt().item()
    assert_close(result, expected, at_least=scale)


def test_the_truth_is_the_equation():
    grad, task_vectors, _, block_layer = packed(2, [1, 0, 2], base=torch.float64, tasks=torch.float64)
    expected = torch.zeros(2, 3, dtype=torch.float64)
    for t in range(2):
        for i in range(grad.numel()):
            expected[t, block_layer[i // 1024]] += grad[i] * task_vectors[t, i]
    assert_close(truth(grad, task_vectors, block_layer, 3), expected)


@pytest.mark.parametrize("num_tasks", (0, 1, 2, 3, 8, 20, 65))
def test_any_number_of_tasks(each_level, num_tasks):
    grad, task_vectors, _, block_layer = packed(num_tasks, GAPS)
    result = sm.coefficient_grad(grad, task_vectors, block_layer, len(GAPS))
    assert result.dtype == torch.float32
    close(result, grad, task_vectors, block_layer, len(GAPS))
    assert not result[:, [1, 3, 6]].any()


@pytest.mark.parametrize("grad", NARROW)
@pytest.mark.parametrize("tasks", NARROW)
def test_dtypes_mix(each_level, grad, tasks):
    grad, task_vectors, _, block_layer = packed(5, [2, 1], base=grad, tasks=tasks)
    close(sm.coefficient_grad(grad, task_vectors, block_layer, 2), grad, task_vectors, block_layer, 2)


def test_double(each_level):
    grad, task_vectors, _, block_layer = packed(5, GAPS, base=torch.float64, tasks=torch.float64)
    close(sm.coefficient_grad(grad, task_vectors, block_layer, 7), grad, task_vectors, block_layer, 7)


def test_empty(each_backend):
    grad, task_vectors, _, block_layer = packed(3, [])
    assert torch.equal(sm.coefficient_grad(grad, task_vectors, block_layer, 2), torch.zeros(3, 2))
    assert sm.coefficient_grad(grad, task_vectors, block_layer, 0).shape == (3, 0)


def test_inputs_need_not_be_contiguous(each_level):
    grad, task_vectors, _, block_layer = packed(4, GAPS)
    spread = torch.empty(4, grad.numel() + 7)
    spread[:, 3:-4] = task_vectors
    for view in (spread[:, 3:-4], task_vectors.t().contiguous().t(), task_vectors[:1].expand(4, -1)):
        result = sm.coefficient_grad(torch.stack([grad, grad], 1)[:, 0], view, block_layer, 7)
        close(result, grad, view, block_layer, 7)
    ones = torch.ones(()).expand(grad.numel())  # what the backward of a sum passes on
    close(sm.coefficient_grad(ones, task_vectors, block_layer, 7), ones, task_vectors, block_layer, 7)


def test_threads_and_repeats_agree_to_the_bit(each_level, threads):
    if each_level == "reference":
        pytest.skip("the reference leaves the order of sums to torch")
    grad, task_vectors, _, block_layer = packed(8, [10, 1, 5] if INTERPRETED else [100, 1, 500], tasks=torch.bfloat16)
    results = []
    for count in THREADS:
        threads(count)
        results.append(sm.coefficient_grad(grad, task_vectors, block_layer, 3))
    assert all(torch.equal(results[0], result) for result in results)


def test_gradcheck(each_backend):
    grad, task_vectors, _, block_layer = packed(2, [1, 1], base=torch.float64, tasks=torch.float64)
    mix = torch.randn(2048, 5, dtype=torch.float64)  # a few directions keep the Jacobian small

    def contract(direction):
        return sm.coefficient_grad(mix @ direction, task_vectors, block_layer, 2).square()

    assert torch.autograd.gradcheck(contract, torch.randn(5, dtype=torch.float64, requires_grad=True))


def test_opcheck(each_backend):
    grad, task_vectors, _, block_layer = packed(2, [1, 2], base=torch.bfloat16)
    op = torch.ops.samerge.coefficient_grad.default
    opcheck(op, (grad, task_vectors, block_layer, 3))
    opcheck(op, (grad.clone().requires_grad_(), task_vectors, block_layer, 3))


def test_compile(each_backend):
    grad, task_vectors, _, block_layer = packed(2, [1, 2])
    compiled = torch.compile(sm.coefficient_grad, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(grad, task_vectors, block_layer, 2), sm.coefficient_grad(grad, task_vectors, block_layer, 2))


def test_errors_name_the_argument():
    grad, task_vectors, _, block_layer = packed(2, [1, 2])
    cases = [
        (ValueError, r"grad has shape \[1, 3072\]", (grad[None], task_vectors, block_layer, 2)),
        (ValueError, r"task_vectors has shape \[3072\]", (grad, task_vectors[0], block_layer, 2)),
        (TypeError, r"task_vectors is torch.float64 but grad", (grad, task_vectors.double(), block_layer, 2)),
        (ValueError, r"task_vectors requires grad", (grad, task_vectors.clone().requires_grad_(), block_layer, 2)),
    ]
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            sm.coefficient_grad(*arguments)
