"""One tolerance table, and what the operator tests share: packed inputs, a backend to run on."""

import contextlib
import os
from pathlib import Path

import pytest
import torch

from samerge_ext import backend

ROOT = Path(__file__).parents[2]  # of the source tree

# Relative L2 error against the reference in fp64 on the same stored inputs, by the dtype of the result. The largest errors
# measured over the operator tests, reference and C++ (best level and forced ones): fp64 1.6e-15, fp32 8.1e-7 (the
# reference; 3.9e-7 in C++), fp16 2.9e-4, bf16 3.0e-3, the last two being mostly the rounding of the result.
TOLERANCE = {torch.float64: 5e-15, torch.float32: 1.5e-6, torch.float16: 4e-4, torch.bfloat16: 3.5e-3}

# Largest relative error of a singular value against torch.linalg.svdvals in fp64 at the default rtol, and how far a bound may
# lie below the true error: the truth has its own rounding, at most about 1e-14 of the largest value.
SIGMA_TOLERANCE, SIGMA_ROUNDING = 1e-3, 1e-13
# How much of a matrix's k leading components those that are learned hold, in norm: at least 0.997 of random matrices up to 2,048.
COMPONENTS_SHARE = 0.99
# Moments are kept in fp64; results of layer_stats are rounded to fp32. Absolute, of the largest magnitude or its square.
MOMENTS_TOLERANCE, MOMENTS_TOLERANCE_FP32 = 1e-11, 1e-6
# Largest error of a quantised number, in scales: half a code, and the rounding of number / scale, at most 127, in fp32.
HALF_A_SCALE = 0.5 + 127 * 2**-24
# How far the loss that a tiny model learns may move with its task vectors' storage, relative.
QUANTISED_LOSS = {"int8": 2e-2, "int4": 2e-1, "int4-residual": 2e-1}
# Gradients and learned coefficients of a tiny model that is held in two ways, relative: sums in another order, over some steps.
PATH_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}

# What goes through a whole tiny model, there and back, in two orders of sums: relative L2 error, by dtype.
MODEL_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4}
BF16_COEFFICIENTS = 1e-2  # how far a tiny model's λ may be from those that are learned in fp32

NARROW = (torch.float32, torch.bfloat16, torch.float16)
CPU_LEVELS = ("portable", "avx2", "avx512")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
THREADS = (1, 1) if INTERPRETED else (1, 2, 3, 7, 1)  # Triton's interpreter has one
if INTERPRETED:
    TOLERANCE[torch.bfloat16] *= 2  # Triton's interpreter cuts off what a GPU rounds


def assert_close(actual: torch.Tensor, truth: torch.Tensor, what: str = "result", at_least: float = 0.0) -> None:
    """Compares with the truth in fp64, relative to its L2 norm or to `at_least` where that is larger: sums may cancel."""
    assert actual.shape == truth.shape, f"{what} has shape {list(actual.shape)}, expected {list(truth.shape)}"
    if not truth.numel():
        return
    a, b = actual.detach().double().flatten(), truth.detach().double().flatten()
    infinite = b.isinf()
    assert torch.equal(a[infinite], b[infinite]), f"{what} differs where the truth is infinite"
    a, b = a[~infinite], b[~infinite]
    difference = (a - b).abs()
    error, tolerance = difference.norm().item(), TOLERANCE[actual.dtype] * max(b.norm().item(), at_least)
    if error <= tolerance:
        return
    worst = int(difference.nan_to_num(torch.inf).argmax())
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=0).item()
    raise AssertionError(
        f"{what} ({actual.dtype}): error {error:.3e} exceeds {tolerance:.3e}; worst at {worst}: {a[worst]:.9g} instead of "
        f"{b[worst]:.9g}; cosine {cosine:.9f}"
    )


def assert_alike(actual: torch.Tensor, truth: torch.Tensor, what: str = "result") -> None:
    """Compares two ways through a whole model."""
    assert actual.shape == truth.shape, f"{what} has shape {list(actual.shape)}, expected {list(truth.shape)}"
    error = (actual.double() - truth.double()).norm().item()
    tolerance = MODEL_TOLERANCE[actual.dtype] * truth.double().norm().item()
    assert error <= tolerance, f"{what} ({actual.dtype}): error {error:.3e} exceeds {tolerance:.3e}"


def packed(num_tasks: int, blocks_per_layer: list[int], *, base=torch.float32, tasks=torch.float32, seed=0):
    """base [N], task_vectors [T, N], coefficients [T, L], block_layer [N // 1024]; a layer may have no blocks."""
    layers = torch.arange(len(blocks_per_layer), dtype=torch.int32)
    block_layer = layers.repeat_interleave(torch.tensor(blocks_per_layer, dtype=torch.int64))
    n = 1024 * block_layer.numel()
    accumulator = torch.float64 if base == torch.float64 else torch.float32
    shapes = (n,), (num_tasks, n), (num_tasks, len(blocks_per_layer))
    base_values, task_values, coefficients = random_normal(*shapes, seed=seed, dtype=accumulator)
    return base_values.to(base), task_values.to(tasks), coefficients, block_layer


def random_normal(*shapes: tuple[int, ...], seed: int, dtype=torch.float32) -> list[torch.Tensor]:
    """Tensors on the default device that hold the same numbers on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator, dtype=dtype, device="cpu") for shape in shapes]
    return [tensor.to(torch.get_default_device()) for tensor in tensors]


def largest_kept(numbers: torch.Tensor, count: int) -> torch.Tensor:
    """A mask [n] of the largest magnitudes, of equal ones the first, by a stable sort."""
    order = torch.sort(numbers.abs().double(), descending=True, stable=True).indices
    mask = torch.zeros(numbers.numel(), dtype=torch.bool)
    mask[order[:count]] = True
    return mask


def need_backend(name: str) -> None:
    if reason := backend.available()[name]:
        pytest.skip(f"backend {name}: {reason}")


@contextlib.contextmanager
def running_on(name):
    """One backend; the GPU's make their device the default one, so that a test's tensors are created there."""
    need_backend(name)
    before = torch.get_default_device()
    torch.set_default_device("cuda" if name in ("cuda", "triton") and not INTERPRETED else before)
    try:
        with backend.use_backend(name):
            yield name
    finally:
        torch.set_default_device(before)
