"""Triton kernels without a GPU: interpreted on the CPU through the operator tests, and compiled to machine code."""

import os
import subprocess
import sys

import pytest
from helpers import INTERPRETED, ROOT

triton = pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels cannot be compiled")

FLOATS = {"fp32": "*fp32", "bf16": "*bf16", "fp64": "*fp64"}
TYPES = (*FLOATS.values(), "fp64", "*i16", "*i32", "*i64", "*i8", "*u8", "i32", "i64")


def test_operators_interpreted():
    """All numeric operator tests, and planted faults, in a process whose kernels are interpreted from the start, and watched."""
    of_rows = ["softmax_kl", "softmax_kl_calls", "linear_softmax_kl"]
    operators = ["weighted_sum", "coefficient_grad", "codes", "elected_sum", "magnitudes", "drop", *of_rows, "gram_product"]
    tests = [*(f"tests/ops/test_{op}.py" for op in operators), "tests/whole/test_interpreted_triton.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-k", "triton and not (opcheck or compile or gradcheck)", *tests]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    passed = int(result.stdout.rsplit(" passed", 1)[0].split()[-1])
    assert passed > 100, result.stdout[-1000:]


def compile_kernel(kernel, capability, num_warps=4, **arguments):
    """The kernel's cubin; an argument is a type such as "*fp32", or a value known when it is compiled."""
    types = {name: argument if argument in TYPES else "constexpr" for name, argument in arguments.items()}
    constants = {(i,): arguments[n] for i, n in enumerate(types) if types[n] == "constexpr"}
    assert list(types) == kernel.arg_names
    source = triton.compiler.ASTSource(kernel, types, constants)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": num_warps}).asm["cubin"]


@pytest.mark.parametrize("capability", (80, 90))
@pytest.mark.parametrize("dtype", FLOATS)
def test_packed_kernels_compile(capability, dtype):
    from samerge_ext.kernels import coefficient_grad, elected_sum, weighted_sum

    numbers, wide = FLOATS[dtype], "*fp64" if dtype == "fp64" else "*fp32"
    assert compile_kernel(
        elected_sum._elected_sum,
        capability,
        out=numbers,
        base=numbers,
        task_vectors=numbers,
        weights=wide,
        scale=wide,
        task_stride="i64",
        num_tasks=20,
        NORMALIZE=True,
        BLOCK=1024,
    )
    shape = {"num_tasks": 20, "GROUP": 8, "BLOCK": 1024}
    assert compile_kernel(
        weighted_sum._weighted_sum.fn,
        capability,
        out=numbers,
        base=numbers,
        task_vectors=numbers,
        coefficients=wide,
        block_layer="*i32",
        num_layers="i32",
        task_stride="i64",
        **shape,
    )
    assert compile_kernel(
        coefficient_grad._sum_blocks,
        capability,
        block_sums=wide,
        grad=numbers,
        task_vectors=numbers,
        task_stride="i64",
        num_blocks="i32",
        **shape,
    )
    assert compile_kernel(
        coefficient_grad._sum_layers,
        capability,
        out=wide,
        block_sums=wide,
        block_layer="*i32",
        num_blocks="i32",
        num_layers="i32",
        WIDTH=1024,
    )


@pytest.mark.parametrize("capability", (80, 90))
@pytest.mark.parametrize("bytes", (2, 4, 8))
def test_selecting_kernels_compile(capability, bytes):
    from samerge_ext.kernels import count_digits, drop, launch, next_digit, trim

    bits, width = {2: "*i16", 4: "*i32", 8: "*i64"}[bytes], {"WIDTH": 8 * bytes, "BLOCK": launch.BLOCK}
    of_rows, sizes = {"keys": "*i64", "ties": "*i64"}, {"count": "i32", "tiles": "i32"}
    for shift in {0, 8 * bytes - 16}:
        assert compile_kernel(
            count_digits._count_digits,
            capability,
            counts="*i64",
            bits=bits,
            **of_rows,
            stride="i64",
            **sizes,
            SHIFT=shift,
            **width,
        )
    assert compile_kernel(
        next_digit._next_digit, capability, counts="*i64", **of_rows, infinity="i32", LAST=True, DIGITS=1 << 16, SPAN=launch.SPAN
    )
    assert compile_kernel(trim._count_equal, capability, kept="*i64", bits=bits, **of_rows, stride="i64", **sizes, **width)
    assert compile_kernel(trim._share_ties, capability, kept="*i64", ties="*i64", tiles="i32", BLOCK=launch.BLOCK)
    assert compile_kernel(
        trim._trim, capability, out=bits, bits=bits, keys="*i64", kept="*i64", out_stride="i64", stride="i64", **sizes, **width
    )
    numbers, wide = {2: "*bf16", 4: "*fp32", 8: "*fp64"}[bytes], "*fp64" if bytes == 8 else "*fp32"
    assert compile_kernel(
        drop._drop,
        capability,
        out=numbers,
        numbers=numbers,
        keys="*i32",
        thresholds="*i64",
        factors=wide,
        out_stride="i64",
        stride="i64",
        key_stride="i64",
        **sizes,
        STRETCH=drop.STRETCH,
        BLOCK=launch.BLOCK,
    )


@pytest.mark.parametrize("capability", (80, 90))
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", (8, 4))
def test_kernels_on_codes_compile(capability, dtype, bits):
    from samerge_ext.kernels import coefficient_grad, launch, weighted_sum

    numbers, wide = FLOATS[dtype], "*fp64" if dtype == "fp64" else "*fp32"
    stored = {"codes": "*i8" if bits == 8 else "*u8", "scales": "*bf16"}
    strides = {"code_stride": "i64", "scale_stride": "i64"}
    shape = {"num_tasks": 20, "BITS": bits, "TASKS": 8, "BLOCK": launch.BLOCK, "GROUP": launch.GROUP}
    assert compile_kernel(
        weighted_sum._weighted_sum_of_codes,
        capability,
        out=numbers,
        base=numbers,
        **stored,
        coefficients=wide,
        block_layer="*i32",
        num_layers="i32",
        **strides,
        **shape,
    )
    assert compile_kernel(
        coefficient_grad._sum_blocks_of_codes,
        capability,
        block_sums=wide,
        grad=numbers,
        **stored,
        **strides,
        num_blocks="i32",
        **shape,
    )


@pytest.mark.parametrize("capability", (80, 90))
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("loss", ("kl", "reverse_kl", "jsd", "cross_entropy", "entropy"))
def test_softmax_kl_compiles(capability, dtype, loss):
    from samerge_ext.kernels import launch, softmax_kl

    numbers, wide = FLOATS[dtype], "*fp64" if dtype == "fp64" else "*fp32"
    alone = loss == "entropy"
    assert compile_kernel(
        softmax_kl._softmax_kl,
        capability,
        losses=wide,
        grad=numbers,
        student=numbers,
        teacher=None if alone else numbers,
        teacher_weights=None if alone else wide,
        num_classes="*i64",
        row_scale=wide,
        student_stride="i32",
        teacher_stride="i32",
        teacher_row_stride="i32",
        num_columns="i32",
        student_temperature="fp64",
        teacher_temperature="fp64",
        beta="fp64",
        SAME_TEMPERATURE=True,
        LOSS=loss,
        TEACHERS=0 if alone else 3,
        WIDTH=1 if alone else 4,
        **launch.row_tile(40000),
    )


@pytest.mark.parametrize("capability", (80, 90))
@pytest.mark.parametrize("numbers", ("*fp32", "*bf16", "*fp64"))
@pytest.mark.parametrize("tall", (True, False))
def test_matrix_kernels_compile(capability, numbers, tall):
    from samerge_ext.kernels import gram_product, launch, moments

    matrices = {"matrices": "*i64", "bases": "*i64", "matrix_type": numbers, "base_type": numbers}
    shape = {"m": "i32", "n": "i32", "matrix_stride": "i64", "base_stride": "i64"}
    for wide in {"*fp64"} | ({"*fp32"} if numbers != "*fp64" else set()):
        of_q = {"q": wide, "scale": "*fp64"}
        assert compile_kernel(
            gram_product._multiply,
            capability,
            partials=wide,
            **matrices,
            **of_q,
            **shape,
            width="i32",
            chunk="i32",
            ADD_BASE=True,
            TALL=tall,
            VECTORS=launch.VECTORS,
            PANEL=launch.PANEL,
            TILE=launch.TILE,
        )
    assert compile_kernel(
        moments._segments,
        capability,
        partials="*fp64",
        **matrices,
        **shape,
        ADD_BASE=tall,
        SEGMENT=launch.SEGMENT,
        BLOCK=launch.BLOCK,
    )
