"""A SAMerging step on CLIP ViT-B/32 of random weights, beside bare passes of the model and the published loop.

    samerge cpu (cuda, triton)    a SAM step, all tasks as one batch: SharedEncoder
    samerge tasks_per_batch=1     the same, one task at a time
    samerge plain logits          a SAM step with a plain logits function
    published                     the published step, rewritten literally
    bare, by task                 two forward and backward passes of the model, task by task, nothing else

The yardstick is two bare passes on all images as one batch, or task by task for what runs so. A candidate's first gradient is
compared with that of plain autograd in fp64. Peak memory is that of two steps beyond the packed weights (all of it, for bare
passes); on the CPU it is taken in a fresh process, `python benchmarks/bench_merging.py CASE CANDIDATE`, which prints it in bytes.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
from ceiling import Yardstick
from inputs import error_of
from published import PublishedMerge, softmax_log_kl
from torch import Tensor, nn
from torch.func import functional_call

import samerge_ext as sm
from samerge_ext import reference
from samerge_ext.learning.passes import losses_and_gradient
from samerge_ext.learning.prefetch import Input
from samerge_ext.learning.sam import sam_gradient
from samerge_ext.memory import PeakMemory
from samerge_ext.ops.softmax_kl import softmax_kl_with_grad
from samerge_ext.packing.layout import Layout

CLASSES = 100
MODELS = {  # what differs from the defaults of CLIPVisionConfig, which are ViT-B's
    "ViT-B/32": {"patch_size": 32},
    "tiny": {"patch_size": 32, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2},
}
TOLERANCE = {"fp32": 1e-5, "tf32": 2e-2, "bf16": 2e-2}  # of the gradient by λ; measured on a CPU: 6e-7 and, in bf16, 4e-3


@dataclass(frozen=True)
class Merging:
    model: str
    tasks: int
    batch: int  # images per task
    precision: str  # of the passes: fp32, tf32 or, by autocast, bf16

    def __str__(self) -> str:
        return f"{self.model} T{self.tasks} batch {self.batch} {self.precision}"

    def tolerance(self, is_ours: bool) -> float:
        return TOLERANCE[self.precision]

    def needed_bytes(self, device: str) -> int:
        """Of the packed weights, and 40 models for all that takes turns."""
        return 350_000_000 * (self.tasks + 40) if self.model == "ViT-B/32" else 0

    def build(self, device: str) -> Problem:
        return Problem(self, device)


def merging_cases(device: str, size: str) -> list[Merging]:
    if size == "tiny":
        return [Merging("tiny", 3, 2, "fp32")]
    if device == "cuda":
        return [Merging("ViT-B/32", 8, 16, precision) for precision in ("tf32", "bf16")]
    return [Merging("ViT-B/32", 8, 4, "fp32")]


class Problem:
    """Random images, heads and teacher logits for every task, and packed weights."""

    def __init__(self, case: Merging, device: str):
        self.case, self.device = case, device
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(shape, generator=generator).to(device)
        width = self.module().config.hidden_size
        self.tasks = [f"task{t}" for t in range(case.tasks)]
        self.images = [draw(case.batch, 3, 224, 224) for _ in self.tasks]
        self.heads = [draw(width, CLASSES) / width**0.5 for _ in self.tasks]
        self.teachers = [draw(case.batch, CLASSES) for _ in self.tasks]

    def module(self) -> nn.Module:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        torch.manual_seed(0)
        return CLIPVisionModel(CLIPVisionConfig(**MODELS[self.case.model])).eval().to(self.device)

    @cached_property
    def packed(self) -> sm.PackedWeights:
        """The module's weights and random task vectors, written straight into the store."""
        parameters = dict(self.module().named_parameters())
        shapes, dtypes = [p.shape for p in parameters.values()], [p.dtype for p in parameters.values()]
        layout = Layout.build(list(parameters), shapes, dtypes, [True] * len(parameters), self.device)
        base = torch.zeros(layout.numel, device=self.device)
        task_vectors = torch.zeros(len(self.tasks), layout.numel, device=self.device)
        for name, view in layout.views(base).items():
            view.copy_(parameters[name].detach())
        for row in task_vectors:
            for view in layout.views(row).values():
                view.normal_(std=1e-3)
        return sm.PackedWeights(layout, tuple(self.tasks), base, task_vectors)

    def encode(self, module: Callable, images: Tensor) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.case.precision == "bf16"):
            return module(images).pooler_output.to(images.dtype)

    def head(self, features: Tensor, task: str) -> Tensor:
        return features @ self.heads[self.tasks.index(task)]

    def at_precision(self, step: Callable[[], Tensor | None]) -> Callable[[], Tensor | None]:
        """The step with products of fp32 matrices in TF32 where the case says so."""

        def run():
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("high" if self.case.precision == "tf32" else "highest")
            try:
                return step()
            finally:
                torch.set_float32_matmul_precision(before)

        return run

    @cached_property
    def _truth(self) -> Tensor:
        """The gradient by λ [T, L] at λ = 0.3, in fp64."""
        layout, block_layer = self.packed.layout, self.packed.layout.block_layer
        coefficients = self.packed.coefficients(0.3).double()
        merged = torch.empty_like(self.packed.base, dtype=torch.float64)
        reference.weighted_sum(merged, self.packed.base.double(), self.packed.task_vectors, coefficients, block_layer)
        weights = {name: view.requires_grad_() for name, view in layout.views(merged).items()}
        features = functional_call(self.module().double(), weights, torch.cat(self.images).double()).pooler_output
        rows = zip(features.chunk(len(self.tasks)), self.heads, self.teachers, strict=True)
        sum(softmax_log_kl(some @ head.double(), teacher.double()) for some, head, teacher in rows).backward()
        gradient = torch.zeros_like(merged)
        for name, view in layout.views(gradient).items():
            view.copy_(weights[name].grad)
        return reference.coefficient_grad(gradient, self.packed.task_vectors, block_layer, layout.num_layers)

    def error_of(self, gradient: Tensor | None) -> float:
        """Of the first gradient by λ; bare passes have none."""
        return 0.0 if gradient is None else error_of(gradient, self._truth)


def bare(x: Problem, by_task: bool):
    module, weight = x.module(), torch.cat(x.heads, 1)
    groups = x.images if by_task else [torch.cat(x.images)]

    def step():
        for _ in range(2):
            module.zero_grad(set_to_none=False)
            for images in groups:
                (x.encode(module, images) @ weight).square().mean().backward()

    return x.at_precision(step)


def sam_step(x: Problem, shared: bool = True, tasks_per_batch: int | None = None):
    model = sm.MergedModel(x.module(), x.packed, 0.3)
    plain = lambda module, images, task: x.head(x.encode(module, images), task)
    logits = sm.models.SharedEncoder(x.encode, x.head) if shared else plain
    learned = model.coefficients.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([learned], lr=1e-3, weight_decay=5e-4)
    inputs = dict(zip(x.tasks, map(Input, x.images, x.teachers), strict=True))
    weights = dict.fromkeys(x.tasks, 1.0)

    def gradient_at(coefficients):
        return losses_and_gradient(
            model,
            coefficients.detach(),
            inputs,
            logits,
            softmax_kl_with_grad,
            task_weights=weights,
            tasks_per_batch=tasks_per_batch,
        )

    def step():
        _, first, learned.grad = sam_gradient(gradient_at, learned.detach(), rho=0.07)
        optimizer.step()
        return first

    return x.at_precision(step)


def ours(x: Problem):
    return sam_step(x)


def published(x: Problem):
    loop = PublishedMerge(x.module(), [list(x.packed.layout.views(row).values()) for row in x.packed.task_vectors], 0.3)
    return x.at_precision(lambda: loop.step(x.images, x.heads, x.teachers, x.encode))


CASES = merging_cases
CANDIDATES = {
    "samerge tasks_per_batch=1": lambda x: sam_step(x, tasks_per_batch=1),
    "samerge plain logits": lambda x: sam_step(x, shared=False),
    "published": published,
    "bare, by task": lambda x: bare(x, by_task=True),
}
BY_TASK = ("samerge tasks_per_batch=1", "samerge plain logits")


@pytest.fixture(scope="module")
def yardstick(x):
    return Yardstick("bare, one batch", 1, bare(x, by_task=False))


@pytest.fixture(scope="module")
def bare_by_task(x):
    return Yardstick("bare, by task", 1, bare(x, by_task=True))


def bench_merging(x, candidate, measure, yardstick, bare_by_task):
    held_against = bare_by_task if candidate in BY_TASK else yardstick
    measure(candidate, work=1, error_of=x.error_of, yardstick=held_against, peak=lambda: peak_bytes(x, candidate))


def peak_bytes(x: Problem, candidate: str) -> int:
    if x.device == "cuda" or x.case.model == "tiny":
        return peak_of_two_steps(x, candidate)
    command = [sys.executable, __file__, str(x.case), candidate]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def peak_of_two_steps(x: Problem, candidate: str) -> int:
    """Beyond what is held already, in this process."""
    with PeakMemory(x.device) as peak:
        step = CANDIDATES.get(candidate, ours)(x)
        step()
        step()
    return peak.rise


def main(case: str, candidate: str) -> None:
    (found,) = (known for known in merging_cases("cpu", "full") if str(known) == case)
    x = Problem(found, "cpu")
    if not candidate.startswith("bare"):
        x.packed  # noqa: B018  made before the peak is watched
    print(peak_of_two_steps(x, candidate))


if __name__ == "__main__":
    main(*sys.argv[1:])
