"""weighted_sum and coefficient_grad on quantised task vectors, dequantised as they are read."""

import pytest
import torch
from helpers import HALF_A_SCALE, INTERPRETED, NARROW, THREADS, assert_close, packed
from torch.library import opcheck

import samerge_ext as sm
from samerge_ext import reference
from samerge_ext.packing.quantised import FORMATS, GROUP, QuantisedTaskVectors

FORMS = tuple(FORMATS)
GAPS = [1, 0, 3, 2 if INTERPRETED else 70, 2]  # blocks per layer, one layer without any


def quantised(form, num_tasks=5, blocks=GAPS, base=torch.float32):
    """base [N], quantised task vectors, coefficients [T, L], block_layer."""
    base, task_vectors, coefficients, block_layer = packed(num_tasks, blocks, base=base)
    scale = torch.logspace(-6, 3, task_vectors.shape[1] // GROUP).repeat_interleave(GROUP)
    return base, QuantisedTaskVectors.of(task_vectors * scale, form), coefficients, block_layer


def merged_truth(base, task_vectors, coefficients, block_layer):
    out = torch.empty(base.numel(), dtype=torch.float64)
    exact = task_vectors.dequantise(torch.float64)
    reference.weighted_sum(out, base.double(), exact, coefficients.double(), block_layer)
    return out


@pytest.mark.parametrize("num_tasks", (0, 1, 2, 3, 8, 11))
@pytest.mark.parametrize("form", ("int8", "int4"))
def test_weighted_sum(each_level, form, num_tasks):
    inputs = quantised(form, num_tasks)
    assert_close(sm.weighted_sum(*inputs), merged_truth(*inputs))


@pytest.mark.parametrize("num_tasks", (0, 1, 2, 3, 8, 11))
@pytest.mark.parametrize("form", ("int8", "int4"))
def test_coefficient_grad(each_level, form, num_tasks):
    grad, task_vectors, _, block_layer = quantised(form, num_tasks)
    contracted_close(grad, task_vectors, block_layer)


def contracted_close(grad, task_vectors, block_layer):
    """Against the root of the sums of the products' squares, since signed products may cancel."""
    result = sm.coefficient_grad(grad, task_vectors, block_layer, len(GAPS))
    exact = task_vectors.dequantise(torch.float64)
    expected = reference.coefficient_grad(grad.double(), exact, block_layer, len(GAPS))
    squares = reference.coefficient_grad(grad.double().square(), exact.square(), block_layer, len(GAPS))
    assert_close(result, expected, at_least=squares.sum().sqrt().item())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("base", NARROW)
def test_dtypes_mix(each_level, base, form):
    inputs = quantised(form, base=base)
    result = sm.weighted_sum(*inputs)
    assert result.dtype == base
    assert_close(result, merged_truth(*inputs))
    for dtype in NARROW:
        out = torch.empty_like(inputs[0], dtype=dtype)
        assert sm.weighted_sum(*inputs, out=out) is out
        assert_close(out, merged_truth(*inputs), f"out, {dtype}")
    contracted_close(inputs[0], inputs[1], inputs[3])


@pytest.mark.parametrize("form", FORMS)
def test_double(each_level, form):
    base, task_vectors, coefficients, block_layer = quantised(form, base=torch.float64)
    assert_close(
        sm.weighted_sum(base, task_vectors, coefficients, block_layer),
        merged_truth(base, task_vectors, coefficients, block_layer),
    )
    contracted_close(base, task_vectors, block_layer)


@pytest.mark.parametrize("form", FORMS)
def test_views_of_a_range_are_read_where_they_lie(each_level, form):
    base, task_vectors, coefficients, block_layer = quantised(form)
    some = slice(2 * 1024, 7 * 1024)
    part = task_vectors.narrow(some.start, some.stop - some.start)
    assert part.shape == (5, 5 * 1024) and part.codes.data_ptr() != task_vectors.codes.data_ptr()
    whole = sm.weighted_sum(base, task_vectors, coefficients, block_layer)
    assert torch.equal(sm.weighted_sum(base[some], part, coefficients, block_layer[2:7]), whole[some])
    assert torch.equal(part.dequantise(), task_vectors.dequantise()[:, some])
    with pytest.raises(ValueError, match="multiples of 1024"):
        task_vectors.narrow(512, 1024)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(each_backend, form):
    base, task_vectors, coefficients, block_layer = packed(2, [1, 1], base=torch.float64, tasks=torch.float64)
    task_vectors = QuantisedTaskVectors.of(task_vectors, form)
    pick = torch.randn(4, 2048, dtype=torch.float64)  # a few sums of the output keep the Jacobian small

    def sums(coefficients):
        return pick @ sm.weighted_sum(base, task_vectors, coefficients, block_layer).square()

    assert torch.autograd.gradcheck(sums, coefficients.requires_grad_())
    assert torch.autograd.gradgradcheck(sums, coefficients)
    mix = torch.randn(2048, 5, dtype=torch.float64)

    def contract(direction):
        return sm.coefficient_grad(mix @ direction, task_vectors, block_layer, 2).square()

    assert torch.autograd.gradcheck(contract, torch.randn(5, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(each_backend, form):
    base, task_vectors, coefficients, block_layer = quantised(form, 2, [1, 2], base=torch.bfloat16)
    codes, scales, rows = task_vectors.codes, task_vectors.scales, task_vectors.of_rows(coefficients)
    op = torch.ops.samerge
    opcheck(op.weighted_sum.default, (base, codes, rows, block_layer, scales))
    opcheck(op.weighted_sum.default, (base.clone().requires_grad_(), codes, rows.clone().requires_grad_(), block_layer, scales))
    opcheck(op.weighted_sum_out.default, (torch.zeros(3 * 1024), base, codes, rows, block_layer, scales))
    opcheck(op.coefficient_grad.default, (base, codes, block_layer, 3, scales))
    opcheck(op.coefficient_grad.default, (base.clone().requires_grad_(), codes, block_layer, 3, scales))


@pytest.mark.parametrize("form", FORMS)
def test_compile(each_backend, form):
    base, task_vectors, coefficients, block_layer = quantised(form, 2, [1, 2])

    def merge(coefficients):
        return sm.weighted_sum(base, task_vectors, coefficients, block_layer).square().sum()

    gradients = []
    for function in (merge, torch.compile(merge, fullgraph=True, backend="aot_eager")):
        leaf = coefficients.clone().requires_grad_()
        function(leaf).backward()
        gradients.append(leaf.grad)
    assert_close(gradients[1], gradients[0].double())


def test_threads_and_repeats_agree_to_the_bit(each_level, threads):
    if each_level == "reference":
        pytest.skip("the reference leaves the order of sums to torch")
    base, task_vectors, coefficients, block_layer = quantised("int4-residual", 8, [3, 1, 2] if INTERPRETED else [100, 1, 500])
    results = []
    for count in THREADS:
        threads(count)
        merged = sm.weighted_sum(base, task_vectors, coefficients, block_layer)
        results.append((merged, sm.coefficient_grad(base, task_vectors, block_layer, 3)))
    assert all(torch.equal(a, b) for result in results for a, b in zip(results[0], result, strict=True))


def test_empty(each_backend):
    base, task_vectors, coefficients, block_layer = packed(3, [0, 0])
    store = QuantisedTaskVectors.of(task_vectors, "int4")
    assert sm.weighted_sum(base, store, coefficients, block_layer).shape == (0,)
    assert torch.equal(sm.coefficient_grad(base, store, block_layer, 2), torch.zeros(3, 2))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("magnitude", (0.0, 1e-45, 1e-40, 1e-38, 1e-30, 1e30, 3.3e38))
def test_odd_values(each_level, form, magnitude):
    """Zeros, a whole block of them, subnormal and huge numbers, alone and beside ordinary ones."""
    task_vectors = torch.zeros(2, 2048)
    task_vectors[0, 1024:1152] = magnitude
    task_vectors[0, 1200] = -magnitude
    task_vectors[1, 2000] = magnitude
    store = QuantisedTaskVectors.of(task_vectors, form)
    exact = store.dequantise(torch.float64)
    assert not exact[:, :1024].any()
    bound = HALF_A_SCALE * store.scales[:2].double().repeat_interleave(GROUP, 1)
    if store.shared:
        bound += 2e-7 * magnitude
    assert ((exact - task_vectors.double()).abs() <= bound).all()
    coefficients, layers = torch.full((2, 1), 0.5), torch.zeros(2, dtype=torch.int32)
    merged = sm.weighted_sum(torch.ones(2048), store, coefficients, layers)
    assert_close(merged, merged_truth(torch.ones(2048), store, coefficients, layers))
    assert torch.equal(merged[:1024], torch.ones(1024))


def test_errors_name_the_argument():
    base, store, coefficients, block_layer = quantised("int4", 2, [1, 2])
    cases = [
        (ValueError, r"base has shape \[3071\]", (base[1:], store, coefficients, block_layer)),
        (ValueError, r"task_vectors has shape \[2, 512\]", (base, store.narrow(0, 1024), coefficients, block_layer)),
        (ValueError, r"coefficients has shape \[1, 2\].*\[2, 3072\]", (base, store, coefficients[:1], block_layer)),
        (TypeError, r"coefficients is torch.float64", (base, store, coefficients.double(), block_layer)),
        (ValueError, r"task_vectors is on meta", (base, store.to("meta"), coefficients, block_layer)),
        (TypeError, r"base is torch.int32", (base.int(), store, coefficients, block_layer)),
        (TypeError, r"task_vectors is torch.uint8", (base, store.codes.repeat(1, 2), coefficients, block_layer)),
    ]
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            sm.weighted_sum(*arguments)
