"""A SAMerging step on CLIP ViT-B/32: time and peak memory beside bare passes of the model and the published loop.

    python benchmarks/bench_merging.py [--rounds 5] [--json benchmarks/results/NAME.json]

Random weights, T tasks, `batch` images per task, fp32. All candidates take turns in one process, so that a busy machine
slows all of them; what is quoted are medians. Peak memory is taken in a fresh process per candidate and counted beyond
the packed weights (beyond nothing, for the bare passes).

    bare, one batch      two forward and backward passes of the model on the T·batch images, nothing else
    bare, by task        the same, task by task
    shared encoder       a SAM step of samerge_ext, all tasks as one batch
    plain logits         a SAM step of samerge_ext with a plain logits function
    tasks_per_batch=1    a SAM step of samerge_ext through SharedEncoder, one task at a time
    published            the published step, rewritten literally
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from measure import environment, interleaved, print_table
from torch import Tensor, nn

import samerge_ext as sm
from samerge_ext.layout import Layout
from samerge_ext.memory import PeakMemory
from samerge_ext.ops.softmax_kl import softmax_kl_with_grad
from samerge_ext.passes import losses_and_gradient
from samerge_ext.sam import sam_gradient

CLASSES = 100


def vision_model() -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(CLIPVisionConfig(patch_size=32)).eval()  # the defaults are ViT-B's


class Problem:
    """Random images, heads and teacher logits for every task."""

    def __init__(self, tasks: int, batch: int):
        generator = torch.Generator().manual_seed(0)
        self.tasks = [f"task{t}" for t in range(tasks)]
        self.images = [torch.randn(batch, 3, 224, 224, generator=generator) for _ in self.tasks]
        self.heads = [torch.randn(768, CLASSES, generator=generator) / 768**0.5 for _ in self.tasks]
        self.teachers = [torch.randn(batch, CLASSES, generator=generator) for _ in self.tasks]

    def encode(self, module: Callable, images: Tensor) -> Tensor:
        return module(images).pooler_output

    def head(self, features: Tensor, task: str) -> Tensor:
        return features @ self.heads[self.tasks.index(task)]


def packed_weights(module: nn.Module, tasks: int) -> sm.PackedWeights:
    """The module's weights and random task vectors, written straight into the store."""
    parameters = dict(module.named_parameters())
    shapes, dtypes = [p.shape for p in parameters.values()], [p.dtype for p in parameters.values()]
    layout = Layout.build(list(parameters), shapes, dtypes, [True] * len(parameters))
    base, task_vectors = torch.zeros(layout.numel), torch.zeros(tasks, layout.numel)
    torch.manual_seed(1)
    for name, view in layout.views(base).items():
        view.copy_(parameters[name].detach())
    for row in task_vectors:
        for view in layout.views(row).values():
            view.normal_(std=1e-3)
    return sm.PackedWeights(layout, tuple(f"task{t}" for t in range(tasks)), base, task_vectors)


def bare(problem: Problem, module: nn.Module, by_task: bool) -> Callable[[], None]:
    groups = problem.images if by_task else [torch.cat(problem.images)]
    weight = torch.cat(problem.heads, 1)

    def step():
        for _ in range(2):
            module.zero_grad(set_to_none=False)
            for images in groups:
                (problem.encode(module, images) @ weight).square().mean().backward()

    return step


def ours(problem: Problem, module: nn.Module, packed: sm.PackedWeights, shared: bool, tasks_per_batch=None):
    model = sm.MergedModel(module, packed)
    if shared:
        logits = sm.models.SharedEncoder(problem.encode, problem.head)
    else:

        def logits(module, images, task):
            return problem.head(problem.encode(module, images), task)

    learned = model.coefficients.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([learned], lr=1e-3, weight_decay=5e-4)
    inputs = dict(zip(problem.tasks, zip(problem.images, problem.teachers, strict=True), strict=True))
    weights = dict.fromkeys(problem.tasks, 1.0)

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
        _, _, learned.grad = sam_gradient(gradient_at, learned.detach(), rho=0.07)
        optimizer.step()

    return step


def published(problem: Problem, module: nn.Module, packed: sm.PackedWeights):
    from published import PublishedMerge

    loop = PublishedMerge(module, [packed.layout.views(row) for row in packed.task_vectors], 0.3)
    return lambda: loop.step(problem.images, problem.heads, problem.teachers, problem.encode)


CANDIDATES: dict[str, Callable] = {
    "bare, one batch": lambda problem, packed: bare(problem, vision_model(), by_task=False),
    "bare, by task": lambda problem, packed: bare(problem, vision_model(), by_task=True),
    "shared encoder": lambda problem, packed: ours(problem, vision_model(), packed, shared=True),
    "plain logits": lambda problem, packed: ours(problem, vision_model(), packed, shared=False),
    "tasks_per_batch=1": lambda problem, packed: ours(problem, vision_model(), packed, shared=True, tasks_per_batch=1),
    "published": lambda problem, packed: published(problem, vision_model(), packed),
}


def peak_beyond_packed(name: str, tasks: int, batch: int) -> int:
    """Bytes, measured in this process, that two steps of a candidate need beyond the packed weights."""
    packed = None if name.startswith("bare") else packed_weights(vision_model(), tasks)
    problem = Problem(tasks, batch)
    with PeakMemory() as peak:
        step = CANDIDATES[name](problem, packed)
        step()
        step()
    return peak.rise


def peak_in_fresh_process(name: str, tasks: int, batch: int) -> int:
    command = [sys.executable, __file__, "--memory-of", name, "--tasks", str(tasks), "--batch", str(batch)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4, help="images per task")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", choices=CANDIDATES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(peak_beyond_packed(options.memory_of, options.tasks, options.batch))
        return

    peaks = {name: peak_in_fresh_process(name, options.tasks, options.batch) for name in CANDIDATES}
    problem, packed = Problem(options.tasks, options.batch), packed_weights(vision_model(), options.tasks)
    timings = interleaved({name: make(problem, packed) for name, make in CANDIDATES.items()}, options.rounds)
    model_bytes = packed.base.nbytes
    rows = [
        {
            "candidate": name,
            **timings[name],
            "ratio_to_bare_one_batch": timings[name]["median_s"] / timings["bare, one batch"]["median_s"],
            "ratio_to_bare_by_task": timings[name]["median_s"] / timings["bare, by task"]["median_s"],
            "peak_models": peaks[name] / model_bytes,
            # weights and gradient are what both a bare run and a merged model must hold
            "peak_less_two_models": peaks[name] / model_bytes - 2,
        }
        for name in CANDIDATES
    ]
    millions = packed.layout.num_parameters / 1e6
    title = f"SAM step, CLIP ViT-B/32 ({millions:.1f} M), T = {options.tasks}, batch {options.batch} per task, fp32"
    print_table(title, rows)
    if options.json:
        options.json.write_text(json.dumps({"benchmark": title, "environment": environment(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
