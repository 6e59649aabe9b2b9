import pytest
import torch
from helpers import INTERPRETED, NARROW, assert_close, need_backend, packed
from torch.library import opcheck

import samerge_ext as sm
from samerge_ext import reference

GAPS = [1, 0, 3, 7 if INTERPRETED else 70, 2]  # blocks per layer, one layer without any


def truth(base, task_vectors, coefficients, block_layer):
    out = torch.empty(base.numel(), dtype=torch.float64)
    reference.weighted_sum(out, base.double(), task_vectors.double(), coefficients.double(), block_layer)
    return out


def test_the_truth_is_the_equation():
    base, task_vectors, coefficients, block_layer = packed(3, [1, 2], base=torch.float64, tasks=torch.float64)
    expected = base.clone()
    for t in range(3):
        for i in range(base.numel()):
            expected[i] += coefficients[t, block_layer[i // 1024]] * task_vectors[t, i]
    assert_close(truth(base, task_vectors, coefficients, block_layer), expected)


@pytest.mark.parametrize("num_tasks", (0, 1, 2, 3, 8, 20, 65))
def test_any_number_of_tasks(each_level, num_tasks):
    inputs = packed(num_tasks, GAPS)
    assert_close(sm.weighted_sum(*inputs), truth(*inputs))


@pytest.mark.parametrize("base", NARROW)
@pytest.mark.parametrize("tasks", NARROW)
def test_dtypes_mix(each_level, base, tasks):
    inputs = packed(5, [2, 1], base=base, tasks=tasks)
    result = sm.weighted_sum(*inputs)
    assert result.dtype == base
    assert_close(result, truth(*inputs))
    for dtype in NARROW:
        out = torch.empty(3 * 1024, dtype=dtype)
        assert sm.weighted_sum(*inputs, out=out) is out
        assert_close(out, truth(*inputs), f"out, {dtype}")


def test_double(each_level):
    inputs = packed(5, GAPS, base=torch.float64, tasks=torch.float64)
    assert_close(sm.weighted_sum(*inputs), truth(*inputs))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_storing_rounds_as_torch_does(each_level, dtype):
    """Every exponent, ties, subnormals, overflow, infinities and NaN, through a sum that adds nothing."""
    if INTERPRETED:
        pytest.skip("Triton's interpreter does not round as a GPU does")
    bits = torch.arange(0, 2**32, 4093, dtype=torch.int64)
    ties = torch.arange(2**16, dtype=torch.int64) * 2**16 + 2**15
    half_ties = torch.arange(2**16).short().view(torch.float16).float()
    half_ties = torch.stack([half_ties.view(torch.int32) + delta for delta in (-1, 0, 2**12 - 1, 2**12, 2**12 + 1)])
    special = torch.tensor([0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF], dtype=torch.int64)
    numbers = torch.cat([bits, ties, half_ties.flatten().long() & 0xFFFFFFFF, special])
    numbers = torch.nn.functional.pad(numbers, (0, -numbers.numel() % 1024)).int().view(torch.float32)
    blocks = numbers.numel() // 1024
    layers = torch.zeros(blocks, dtype=torch.int32)
    out = torch.empty_like(numbers, dtype=dtype)
    sm.weighted_sum(numbers, torch.zeros(0, numbers.numel()), torch.zeros(0, 1), layers, out=out)
    torch.testing.assert_close(out, numbers.to(dtype), rtol=0, atol=0, equal_nan=True)

    stored = torch.arange(2**16).short().view(dtype)
    wide = torch.empty(2**16)
    sm.weighted_sum(stored, torch.zeros(0, 2**16), torch.zeros(0, 1), torch.zeros(64, dtype=torch.int32), out=wide)
    torch.testing.assert_close(wide, stored.float(), rtol=0, atol=0, equal_nan=True)


def test_empty(each_backend):
    inputs = packed(3, [])
    assert sm.weighted_sum(*inputs).shape == (0,)
    assert sm.weighted_sum(*inputs, out=torch.empty(0)).shape == (0,)
    inputs = packed(3, [0, 0])
    inputs[2].requires_grad_()
    sm.weighted_sum(*inputs).sum().backward()
    assert torch.equal(inputs[2].grad, torch.zeros(3, 2))


def test_inputs_need_not_be_contiguous(each_level):
    base, task_vectors, coefficients, block_layer = packed(4, GAPS)
    expected = truth(base, task_vectors, coefficients, block_layer)
    spread = torch.empty(4, base.numel() + 7)
    spread[:, 3:-4] = task_vectors
    strided = torch.stack([base, base], 1)[:, 0]
    layers = torch.stack([block_layer, block_layer], 1)[:, 0]
    result = sm.weighted_sum(strided, spread[:, 3:-4], coefficients.t().contiguous().t(), layers)
    assert_close(result, expected, "rows apart")
    assert_close(sm.weighted_sum(base, task_vectors.t().contiguous().t(), coefficients, block_layer), expected, "columns")
    one = task_vectors[:1].expand(4, -1)
    assert_close(sm.weighted_sum(base, one, coefficients, block_layer), truth(base, one, coefficients, block_layer))


def test_threads_and_repeats_agree_to_the_bit(each_backend, threads):
    inputs = packed(8, [10, 5, 7] if INTERPRETED else [100, 50, 107], tasks=torch.bfloat16)
    threads(1)
    one = sm.weighted_sum(*inputs)
    threads(3)
    assert torch.equal(one, sm.weighted_sum(*inputs)) and torch.equal(one, sm.weighted_sum(*inputs))


def test_many_numbers(each_backend):
    inputs = packed(2, [30, 1, 10] if INTERPRETED else [3000, 1, 1000], tasks=torch.bfloat16)
    assert_close(sm.weighted_sum(*inputs), truth(*inputs))


def test_gradients(each_backend):
    inputs = packed(3, [1, 0, 2])
    inputs[0].requires_grad_(), inputs[2].requires_grad_()
    factor = torch.randn(3 * 1024)
    sm.weighted_sum(*inputs).backward(factor)
    assert_close(inputs[2].grad, reference.coefficient_grad(factor.double(), inputs[1].double(), inputs[3], 3))
    assert torch.equal(inputs[0].grad, factor)


def test_gradcheck(each_backend):
    base, task_vectors, coefficients, block_layer = packed(2, [1, 1], base=torch.float64, tasks=torch.float64)
    pick = torch.randn(4, 2048, dtype=torch.float64)  # a few sums of the output keep the Jacobian small

    def sums(coefficients):
        return pick @ sm.weighted_sum(base, task_vectors, coefficients, block_layer).square()

    assert torch.autograd.gradcheck(sums, coefficients.requires_grad_())
    assert torch.autograd.gradgradcheck(sums, coefficients)


def test_opcheck(each_backend):
    base, task_vectors, coefficients, block_layer = packed(2, [1, 2], base=torch.bfloat16)
    op = torch.ops.samerge.weighted_sum.default
    opcheck(op, (base, task_vectors, coefficients, block_layer))
    opcheck(op, (base.clone().requires_grad_(), task_vectors, coefficients.clone().requires_grad_(), block_layer))
    out = torch.zeros(3 * 1024)
    opcheck(torch.ops.samerge.weighted_sum_out.default, (out, base, task_vectors, coefficients, block_layer))


def test_compile(each_backend):
    base, task_vectors, coefficients, block_layer = packed(2, [1, 2])

    def merge(coefficients, out):
        sm.weighted_sum(base, task_vectors, coefficients.detach(), block_layer, out=out)
        return sm.weighted_sum(base, task_vectors, coefficients, block_layer).square().sum() + out.sum()

    results = []
    for function in (merge, torch.compile(merge, fullgraph=True, backend="aot_eager")):
        leaf, out = coefficients.clone().requires_grad_(), torch.zeros_like(base)
        function(leaf, out).backward()
        results.append((leaf.grad, out))
    assert_close(results[1][0], results[0][0].double())
    assert_close(results[1][1], results[0][1].double())


def test_autograd_notices_a_second_merge(each_backend):
    base, task_vectors, coefficients, block_layer = packed(2, [1, 2])
    flat = torch.zeros_like(base)
    weight = torch.nn.Parameter(flat[:1024].view(32, 32))  # shares the memory and the version counter
    sm.weighted_sum(base, task_vectors, coefficients, block_layer, out=flat)
    x = torch.randn(4, 32, requires_grad=True)
    (x @ weight).sum().backward()
    loss = (x @ weight).sum()
    version = flat._version
    sm.weighted_sum(base, task_vectors, coefficients, block_layer, out=flat)
    assert flat._version == weight._version == version + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_out_refuses_autograd():
    inputs = packed(2, [1])
    inputs[2].requires_grad_()
    with pytest.raises(RuntimeError, match="not differentiable.*no_grad"):
        sm.weighted_sum(*inputs, out=torch.empty(1024))
    with torch.no_grad():
        assert not sm.weighted_sum(*inputs, out=torch.empty(1024)).isnan().any()
    with torch.inference_mode():
        assert not sm.weighted_sum(*inputs, out=torch.empty(1024)).isnan().any()


def test_errors_name_the_argument():
    base, task_vectors, coefficients, block_layer = packed(2, [1, 2])
    cases = [
        (ValueError, r"base has shape \[3071\]", (base[1:], task_vectors, coefficients, block_layer)),
        (ValueError, r"task_vectors has shape \[2, 1024\]", (base, task_vectors[:, :1024], coefficients, block_layer)),
        (ValueError, r"coefficients has shape \[1, 2\]", (base, task_vectors, coefficients[:1], block_layer)),
        (TypeError, r"coefficients is torch.float64", (base, task_vectors, coefficients.double(), block_layer)),
        (ValueError, r"block_layer has shape \[2\]", (base, task_vectors, coefficients, block_layer[:2])),
        (TypeError, r"block_layer is torch.int64", (base, task_vectors, coefficients, block_layer.long())),
        (TypeError, r"task_vectors is torch.float64 but base", (base, task_vectors.double(), coefficients, block_layer)),
        (TypeError, r"base is torch.int32", (base.int(), task_vectors, coefficients, block_layer)),
        (ValueError, r"task_vectors requires grad", (base, task_vectors.clone().requires_grad_(), coefficients, block_layer)),
        (ValueError, r"meta", (base, task_vectors, coefficients.to("meta"), block_layer)),
        (ValueError, r"out has shape", (base, task_vectors, coefficients, block_layer, base[:1024].clone())),
        (ValueError, r"out has shape", (base, task_vectors, coefficients, block_layer, torch.empty(3 * 1024, 2)[:, 0])),
    ]
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            sm.weighted_sum(*arguments)


def test_block_layer_is_checked():
    need_backend("cpu")
    base, task_vectors, coefficients, block_layer = packed(2, [1, 2])
    with sm.use_backend("cpu"):
        with pytest.raises(ValueError, match=r"block_layer\[1\] is 1.*0 ... 0"):
            sm.weighted_sum(base, task_vectors, coefficients[:, :1], block_layer)
        with pytest.raises(ValueError, match=r"block_layer\[2\] is 0.*non-decreasing"):
            sm.weighted_sum(base, task_vectors, coefficients, block_layer.flip(0))
        with pytest.raises(ValueError, match=r"block_layer\[0\] is -1"):
            sm.coefficient_grad(base, task_vectors, block_layer - 1, 2)


@pytest.mark.skipif(INTERPRETED, reason="a large output takes an interpreter minutes")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("offset", (0, 1))
def test_a_large_output_is_that_of_its_parts(each_level, dtype, offset):
    """Results too large for the caches are stored past them where they are aligned (offset 0): the same numbers to the bit."""
    blocks = 33 * 2**20 // dtype.itemsize // 512
    base, task_vectors, coefficients, block_layer = packed(1, [blocks // 2, blocks - blocks // 2], base=dtype, tasks=dtype)
    out = torch.full((len(base) + offset,), torch.nan, dtype=dtype)[offset:]
    sm.weighted_sum(base, task_vectors, coefficients, block_layer, out=out)
    for part in (slice(0, 1000), slice(blocks - 1000, blocks)):
        some = slice(part.start * 1024, part.stop * 1024)
        expected = sm.weighted_sum(base[some], task_vectors[:, some], coefficients, block_layer[part])
        assert torch.equal(out[some], expected)
    assert not out.isnan().any()
