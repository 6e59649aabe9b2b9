"""Every operator on a GPU against the bandwidth of its memory, beside torch.compile and, where installed, Liger-Kernel.

    python benchmarks/bench_gpu.py [--json benchmarks/results/NAME.json] [--quick]

A large copy gives the bandwidth of this run. Each backend's result is first compared with the fp64 reference on a part of the
same inputs (a wrong one gets no time), then timed with CUDA events on random data much larger than the caches; what is quoted
is the median. "share" is the bytes an operator must move over its time, as a part of the copy's bandwidth.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import triton
from measure import environment, print_table
from torch import Tensor
from triton.testing import do_bench

import samerge_ext as sm
from samerge_ext import reference

BACKENDS = ("cuda", "triton")
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 4e-3}
LAYER_BLOCKS = 576  # a matrix of 768 by 768, most of a ViT-B


def seconds(call: Callable[[], object]) -> float:
    return do_bench(call, warmup=50, rep=300, return_mode="median") / 1e3


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy of 4 GB."""
    source = torch.randint(0, 2**31, (2**29,), dtype=torch.int64, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source))


def check(actual: Tensor, truth: Tensor, dtype: torch.dtype, at_least: float = 0.0) -> None:
    error = (actual.double() - truth).norm().item() / max(truth.norm().item(), at_least)
    if not error < TOLERANCE[dtype]:
        raise AssertionError(f"relative error {error:.2e} exceeds {TOLERANCE[dtype]:.0e}; no time is given for a wrong result")


class Report:
    """Rows of the table, one per operator, shape and candidate."""

    def __init__(self, bandwidth: float):
        self.bandwidth, self.rows = bandwidth, []

    def time(self, operator: str, shape: str, candidate: str, moved: int, call: Callable[[], object]) -> None:
        try:
            taken = seconds(call)
        except Exception as error:  # a baseline that fails must not cost the run
            if candidate in BACKENDS:
                raise
            print(f"{operator} {shape}: {candidate} fails: {str(error).splitlines()[0][:100]}")
            return
        speed = moved / taken
        row = {"operator": operator, "shape": shape, "candidate": candidate, "ms": taken * 1e3, "GB/s": speed / 1e9}
        self.rows.append({**row, "share": speed / self.bandwidth})


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda").normal_()


def bench_packed(report: Report, numbers: int, tasks: int, dtype: torch.dtype) -> None:
    blocks = -(-numbers // 1024)
    n, layers = blocks * 1024, -(-blocks // LAYER_BLOCKS)
    block_layer = (torch.arange(blocks, device="cuda") // LAYER_BLOCKS).int()
    base, task_vectors = normal(n, dtype=dtype), normal(tasks, n, dtype=dtype)
    coefficients = normal(tasks, layers, dtype=torch.float32)
    out = torch.full_like(base, torch.nan)
    shape = f"N={n / 1e6:.0f}M T={tasks} {str(dtype)[6:]}"
    some_layers = min(layers, 8)
    part = slice(0, some_layers * LAYER_BLOCKS * 1024)
    some = [t.double() for t in (base[part], task_vectors[:, part], coefficients)]
    merged = torch.empty_like(some[0])
    reference.weighted_sum(merged, *some, block_layer[: some_layers * LAYER_BLOCKS])
    contracted = reference.coefficient_grad(*some[:2], block_layer[: some_layers * LAYER_BLOCKS], some_layers)
    scale = (LAYER_BLOCKS * 1024 * contracted.numel()) ** 0.5  # of sums of products of normal numbers, which cancel

    for backend in BACKENDS:
        with sm.use_backend(backend):
            sm.weighted_sum(base, task_vectors, coefficients, block_layer, out=out)
            check(out[part], merged, dtype)
            assert not out.isnan().any()
            gradient = sm.coefficient_grad(base, task_vectors, block_layer, layers)
            check(gradient[:, :some_layers], contracted, torch.float32, at_least=scale)
            moved = task_vectors.nbytes + 2 * base.nbytes
            merge = functools.partial(sm.weighted_sum, base, task_vectors, coefficients, block_layer, out=out)
            report.time("weighted_sum", shape, backend, moved, merge)
            moved = task_vectors.nbytes + base.nbytes
            contract = functools.partial(sm.coefficient_grad, base, task_vectors, block_layer, layers)
            report.time("coefficient_grad", shape, backend, moved, contract)
    del some, merged
    if tasks == 8 and numbers < 10**9:  # whole layers only, as a view [T, L, numbers of a layer]
        whole = layers - (blocks % LAYER_BLOCKS > 0)
        end = whole * LAYER_BLOCKS * 1024
        x, y = base[:end].view(whole, -1), task_vectors[:, :end].view(tasks, whole, -1)
        weights = coefficients[:, :whole, None].to(dtype)
        merge = torch.compile(lambda: x + (weights * y).sum(0))
        report.time("weighted_sum", shape, "torch.compile", (tasks + 2) * x.nbytes, merge)
        contract = torch.compile(lambda: (x * y).sum(-1, dtype=torch.float32))
        report.time("coefficient_grad", shape, "torch.compile", (tasks + 1) * x.nbytes, contract)


def plain_kl(student: Tensor, teacher: Tensor) -> Tensor:
    p, q = (teacher.float() / 2).log_softmax(-1), (student.float() / 2).log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


def bench_softmax_kl(report: Report, rows: int, columns: int, dtype: torch.dtype) -> None:
    student, teacher = normal(rows, columns, dtype=dtype).mul_(3), normal(rows, columns, dtype=dtype).mul_(3)
    shape = f"({rows}, {columns}) {str(dtype)[6:]}"
    moved = 3 * student.nbytes
    some = slice(rows - 16, rows)
    settings = (None, None, torch.full((16,), 1 / rows, dtype=torch.float64, device="cuda"), "kl", 2.0, 2.0)
    expected = reference.softmax_kl(student[some].double(), teacher[None, some].double(), *settings)
    for backend in BACKENDS:
        with sm.use_backend(backend):
            losses = sm.softmax_kl(student, teacher, reduction="none")
            _, grad = sm.softmax_kl_with_grad(student, teacher)
            check(losses[some], expected[0], torch.float32)
            check(grad[some], expected[1], dtype)
            del grad
            report.time("softmax_kl + grad", shape, backend, moved, lambda: sm.softmax_kl_with_grad(student, teacher))
            report.time("softmax_kl", shape, backend, 2 * student.nbytes, lambda: sm.softmax_kl(student, teacher))
    compiled = torch.compile(plain_kl)

    def backward(loss: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        leaf = student.detach().requires_grad_()
        return lambda: torch.autograd.grad(loss(leaf), leaf)

    report.time("softmax_kl + grad", shape, "torch.compile", moved, backward(lambda s: compiled(s, teacher)))
    try:
        from liger_kernel.transformers import LigerKLDIVLoss
    except ImportError:
        return
    liger = LigerKLDIVLoss(reduction="batchmean")
    from_logits = backward(lambda s: liger((s / 2).log_softmax(-1), (teacher / 2).softmax(-1)))
    report.time("softmax_kl + grad", shape, "Liger, from logits", moved, from_logits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--commit", help="what the sources are, where they were copied here without their repository")
    parser.add_argument("--quick", action="store_true", help="the smaller shapes only")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.cuda.init()
    device = torch.cuda.get_device_name()
    report = Report(copy_bandwidth())
    print(f"{device}: a copy moves {report.bandwidth / 1e12:.2f} TB/s, read and written")

    for dtype in (torch.float32, torch.bfloat16):
        for tasks in (8, 20):
            bench_packed(report, 88_000_000, tasks, dtype)
        bench_softmax_kl(report, 4096, 32000, dtype)
    if not options.quick:
        bench_softmax_kl(report, 8192, 128256, torch.bfloat16)
        for tasks in (8, 20):
            bench_packed(report, 1_000_000_000, tasks, torch.bfloat16)

    about = {"commit": options.commit} if options.commit else {}
    about |= {"device": device, "cuda": torch.version.cuda, "triton": triton.__version__, "copy_bytes_per_s": report.bandwidth}
    name = re.sub(r"\W+", "-", device.removeprefix("NVIDIA ")).strip("-").lower()
    path = options.json or Path(__file__).parent / "results" / f"{name}-{date.today():%Y-%m-%d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": {**environment(), **about}, "rows": report.rows}, indent=1) + "\n")
    print_table(f"{device}, {report.bandwidth / 1e12:.2f} TB/s by copy; written to {path}", report.rows)


if __name__ == "__main__":
    main()
