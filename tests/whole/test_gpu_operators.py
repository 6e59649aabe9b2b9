"""What only a GPU can show of operators: graph capture, huge tensors, long rows, repeats, sanitised runs."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, assert_close, packed, random_normal, running_on

import samerge_ext as sm
from samerge_ext import reference
from samerge_ext.ops import krylov

pytestmark = pytest.mark.gpu
SETTINGS = ("kl", 2.0, 2.0, 0.0)


@pytest.fixture
def room():
    """A function that skips the test where fewer gigabytes than it names are free; returns what it used."""

    def need(gigabytes):
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info()[0] < gigabytes * 2**30:
            pytest.skip(f"needs {gigabytes} GB of device memory")

    yield need
    torch.cuda.empty_cache()


def truth(student, teacher, row_scale, settings=SETTINGS):
    return reference.softmax_kl(student.double(), teacher.double(), None, None, row_scale.double(), None, *settings)


@pytest.mark.parametrize("loss, beta", (("kl", 0.0), ("kl", 0.5), ("kl", 1.0), ("cross_entropy", 0.0), ("entropy", 0.0)))
def test_losses_can_be_captured(on_gpu, loss, beta):
    student, teacher = random_normal((64, 5000), (1, 64, 5000), seed=0)
    arguments = (None if loss == "entropy" else teacher, None, None, torch.ones(64), loss, 2.0, 2.0, beta)
    capture_and_replay(lambda: torch.ops.samerge.softmax_kl_grad(student, *arguments), student)


def test_packed_operators_can_be_captured(on_gpu):
    base, task_vectors, coefficients, block_layer = packed(5, [3, 1, 200])
    capture_and_replay(lambda: [sm.weighted_sum(base, task_vectors, coefficients, block_layer)], coefficients)
    capture_and_replay(lambda: [sm.coefficient_grad(base, task_vectors, block_layer, 3)], base)


def test_lanczos_steps_can_be_captured():
    """All steps up to a check as one graph, which the composed steps of other backends are not."""
    with running_on("cuda"):
        matrices, (start,) = random_normal(*[(300, 200)] * 3, seed=0), random_normal((200, 8), seed=1)
        basis, projected = torch.zeros(3, 40, 208), torch.zeros(3, 32, 32, dtype=torch.float64)
        basis[:, :8, :200] = torch.linalg.qr(start)[0].mT
        scale = torch.ones(3, dtype=torch.float64)
        steps = lambda: krylov._lanczos(matrices, [], scale, basis, projected, 8, 0, 4)
        capture_and_replay(lambda: [steps(), basis.clone(), projected.clone()], matrices[1])


def capture_and_replay(call, input):
    """A graph captured once gives, for other inputs, what a call gives, bit for bit."""
    call()  # compiles, tunes
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    input.mul_(0.5).add_(0.25)
    graph.replay()
    for replayed, called in zip(captured, call(), strict=True):
        assert torch.equal(replayed, called)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("teachers", (1, 3))
@pytest.mark.parametrize("columns", (32000, 50257, 128256, 262144))
def test_long_rows(on_gpu, columns, teachers, dtype):
    """Shares of a row in clusters, rows that no vector access fits, rows too long for shared memory."""
    student, teacher = (3 * x for x in random_normal((5, columns), (teachers, 5, columns), seed=columns))
    student, teacher, row_scale = student.to(dtype), teacher.to(dtype), torch.linspace(-1, 2, 5)
    losses, grad = torch.ops.samerge.softmax_kl_grad(student, teacher, None, None, row_scale, *SETTINGS)
    expected = truth(student, teacher, row_scale)
    assert_close(losses, expected[0], "losses")
    assert_close(grad, expected[1], "grad")
    again = torch.ops.samerge.softmax_kl_grad(student, teacher, None, None, row_scale, *SETTINGS)
    assert torch.equal(again[0], losses) and torch.equal(again[1], grad)


def test_many_blocks_repeat_to_the_bit(on_gpu):
    grad, task_vectors, _, block_layer = packed(8, [1, 6000, 7, 2000], tasks=torch.bfloat16)
    first = sm.coefficient_grad(grad, task_vectors, block_layer, 4)
    assert all(torch.equal(first, sm.coefficient_grad(grad, task_vectors, block_layer, 4)) for _ in range(20))
    expected = reference.coefficient_grad(grad.double(), task_vectors.double(), block_layer, 4)
    assert_close(first, expected, at_least=(grad.double().norm() * 8**0.5).item())


def test_more_than_2_to_the_31_numbers(on_gpu, room):
    room(24)
    blocks = 2**21 + 3
    n = blocks * 1024
    base, task_vectors = torch.empty(n, dtype=torch.bfloat16).normal_(), torch.empty(2, n, dtype=torch.bfloat16).normal_()
    block_layer = (torch.arange(blocks) >= blocks - 2).int()
    coefficients = torch.tensor([[0.5, -1.0], [0.25, 2.0]])
    merged = sm.weighted_sum(base, task_vectors, coefficients, block_layer)
    contracted = sm.coefficient_grad(base, task_vectors, block_layer, 2)
    sums = torch.zeros(2, 2, dtype=torch.float64)
    for first in range(0, n, 2**27):
        some = slice(first, min(first + 2**27, n))
        layers = block_layer[first // 1024 : -(-some.stop // 1024)]
        expected = torch.empty(some.stop - first)
        reference.weighted_sum(expected, base[some], task_vectors[:, some], coefficients, layers)
        assert_close(merged[some], expected.double(), f"numbers from {first}")
        sums += reference.coefficient_grad(base[some].double(), task_vectors[:, some].double(), layers, 2)
    assert_close(contracted, sums, at_least=n**0.5)


def test_more_than_2_to_the_31_logits(on_gpu, room):
    room(24)
    rows, columns = 2**14 + 5, 2**17
    student = torch.empty(rows, columns, dtype=torch.bfloat16).normal_()
    teacher = torch.empty(1, rows, columns, dtype=torch.bfloat16).normal_()
    losses, grad = torch.ops.samerge.softmax_kl_grad(student, teacher, None, None, torch.ones(rows), *SETTINGS)
    for some in (slice(0, 4), slice(rows - 8, rows)):
        expected = truth(student[some], teacher[:, some], torch.ones(rows)[some])
        assert_close(losses[some], expected[0])
        assert_close(grad[some], expected[1])
    assert losses.isfinite().all()


SMALL_CALLS = """
import torch, samerge_ext as sm
torch.manual_seed(0)
with sm.use_backend("cuda"):
    layers = torch.tensor([0, 0, 2], dtype=torch.int32, device="cuda")
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for tasks in (1, 8, 11):
            base, vectors = torch.randn(3072, device="cuda").to(dtype), torch.randn(tasks, 3072, device="cuda").to(dtype)
            sm.weighted_sum(base, vectors, torch.ones(tasks, 3, device="cuda", dtype=wide), layers)
            sm.coefficient_grad(base, vectors, layers, 3)
        for columns in (7, 1000, 5003, 40960, 131072):
            student = torch.randn(3, columns, device="cuda").to(dtype)
            teacher = torch.randn(2, 3, columns, device="cuda").to(dtype)
            sm.softmax_kl_with_grad(student, teacher)
            sm.argmax_cross_entropy_with_grad(student, teacher)
            sm.entropy_with_grad(student)
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ("memcheck", "racecheck"))
def test_sanitized(tool):
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    if reason := sm.available()["cuda"]:
        pytest.skip(reason)
    command = [sanitizer, f"--tool={tool}", "--error-exitcode=9", "--kernel-regex=kns=samerge", sys.executable, "-c", SMALL_CALLS]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=400)
    if "Device not supported" in result.stdout + result.stderr:
        pytest.skip("compute-sanitizer does not support this device")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
