"""Products of rows with a head, as linear_softmax_kl takes them: by the package's loops where there are some."""

import pytest
import torch
from helpers import INTERPRETED, NARROW, THREADS, assert_close, random_normal
from torch.testing import assert_close as assert_equal_to_the_bit

from samerge_ext import backend
from samerge_ext.ops.head_products import Head

SHAPES = [(1, 1, 1), (1, 5, 7), (7, 49, 33), (6, 600, 16), (17, 48, 2048), (33, 515, 40)]  # rows, classes, width
LARGE = [] if INTERPRETED else [(113, 700, 1030), (200, 97, 64)]


def problem(rows, classes, width, hidden=torch.float32, head=torch.float32):
    """A head [V, H], its bias, hidden states [R, H], the gradient by logits [R, V]."""
    shapes = ((classes, width), (classes,), (rows, width), (rows, classes))
    numbers = random_normal(*shapes, seed=rows, dtype=torch.float64)
    return [x.to(dtype) for x, dtype in zip(numbers, (head, head, hidden, hidden), strict=True)]


def products(weight, bias, hidden, grad):
    """Logits and the gradient by hidden states, the logits in rows that lie apart."""
    head = Head(weight, bias, hidden)
    head.widen_into(hidden.new_empty(head.slab_bytes // head.wide.itemsize, dtype=head.wide))
    room = torch.full((len(hidden), len(weight) + 3), torch.nan, dtype=head.wide)
    out = head.logits(hidden.to(head.wide), room[:, : len(weight)])
    assert room[:, len(weight) :].isnan().all(), "written behind the logits"
    return out, head.hidden_grad(grad.to(head.wide))


def check(weight, bias, hidden, grad):
    logits, hidden_grad = products(weight, bias, hidden, grad)
    assert_close(logits, hidden.double() @ weight.double().t() + bias.double(), "logits")
    assert_close(hidden_grad, grad.double() @ weight.double(), "gradient")


@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
def test_any_shape(each_level, shape):
    check(*problem(*shape))


@pytest.mark.parametrize("hidden", NARROW)
@pytest.mark.parametrize("head", NARROW)
def test_dtypes_mix(each_level, hidden, head):
    check(*problem(20, 133, 50, hidden, head))


def test_double(each_level):
    check(*problem(9, 600, 70, torch.float64, torch.float64))


def test_rows_may_lie_apart(each_level):
    weight, bias, hidden, grad = problem(20, 133, 50)
    check(weight[:, 3:40], bias, hidden[:, 3:40], grad)
    check(weight[1::2], bias[1::2], hidden, grad[:, :66])
    check(weight.t().contiguous().t(), bias, hidden, grad)  # whose columns are dense


def test_what_is_not_finite_stays_in_its_row(each_level):
    weight, bias, hidden, grad = problem(8, 60, 20)
    hidden[3, 7], grad[5, 50] = torch.nan, torch.inf
    logits, hidden_grad = products(weight, bias, hidden, grad)
    assert (~logits.isfinite()).any(1).tolist() == [row == 3 for row in range(8)]
    assert (~hidden_grad.isfinite()).any(1).tolist() == [row == 5 for row in range(8)]


def test_threads_and_other_rows_change_no_bit(each_level, threads):
    if each_level in ("reference", "cuda", "triton"):
        pytest.skip("a library's order of sums depends on both")
    weight, bias, hidden, grad = problem(60, 1500, 300)
    whole = products(weight, bias, hidden, grad)
    for count in THREADS:
        threads(count)
        for rows in (slice(0, 60), slice(0, 16), slice(7, 8)):
            found = products(weight, bias, hidden[rows], grad[rows])
            assert_equal_to_the_bit(found, tuple(x[rows] for x in whole), rtol=0, atol=0)


def test_no_rows(each_level):
    weight, bias, hidden, grad = problem(4, 30, 5)
    logits, hidden_grad = products(weight, bias, hidden[:0], grad[:0])
    assert logits.shape == (0, 30) and hidden_grad.shape == (0, 5)


@pytest.mark.skipif(backend.available()["cpu"] is not None, reason="needs the extension")
def test_the_loops_keep_inside_their_memory():
    weight, _, hidden, grad = problem(4, 30, 5)
    transposed, add = backend._C.rows_times_transposed_cpu, backend._C.add_rows_times_cpu
    cases = [
        (ValueError, r"out must be \[R, V\]", lambda: transposed(torch.empty(4, 29), hidden, weight)),
        (ValueError, r"out must be \[R, V\]", lambda: transposed(torch.empty(4, 30), hidden[:, :4], weight)),
        (ValueError, r"out must be \[R, H\]", lambda: add(torch.empty(3, 5), grad, weight)),
        (ValueError, r"dense rows", lambda: add(torch.empty(5, 4).t(), grad, weight)),
        (TypeError, r"rows and out must be Float", lambda: transposed(torch.empty(4, 30), hidden.double(), weight)),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
