"""The whole of StatsMerging on eight experts of MiniLM's shape: samerge_ext beside a literal rewrite of the published way.

    python benchmarks/statsmerging.py [--steps 4] [--save-to benchmarks/results]

The rewrite follows the paper's description: every expert is held in full; in every forward the statistics of all their weights
are computed anew, singular values by torch.linalg.svdvals; the merge is an autograd graph from the predicted λ, which all
tasks' losses go back through. (The published code itself trains no predictor, so its first gradient could not be compared.) Both
take the same network, batches and optimiser; their first losses and gradients must agree before any time is printed.

The experts are the demo's, as benchmarks/experts.py finds them, else random ones of the same shape. Texts are random tokens and
heads random directions: neither changes the work. Each candidate runs in a process of its own, whose peak memory counts all but
the imports. A step is the median between optimiser steps; the rest of the time is what comes before the first and after the last.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from experts import expert_folders, experts_folder
from published import merged_layers
from report import environment
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.optimizer import register_optimizer_step_pre_hook

import samerge_ext as sm
from samerge_ext.demo.experts import load_folder
from samerge_ext.memory import PeakMemory
from samerge_ext.methods.statsmerging import learner_settings

TASKS, TEXTS, TOKENS, CLASSES = 8, 2, 40, 20  # texts per task and step, as the demo's full variant has them
PUBLISHED_STEPS = 500
CANDIDATES = ("samerge cpu", "published")
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-3  # relative; of the gradient by all parameters of the network, L2


def encode(module: Callable, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.normalize(module(**batch).last_hidden_state.mean(1), dim=-1)  # [B, hidden]


@dataclass
class Problem:
    base: Path
    experts: dict[str, Path]
    steps: int

    def __post_init__(self):
        generator = torch.Generator().manual_seed(0)
        config = json.loads((self.base / "config.json").read_text())
        tokens = lambda: torch.randint(config["vocab_size"], (TEXTS, TOKENS), generator=generator)
        self.batches = {task: [{"input_ids": tokens(), "attention_mask": torch.ones(TEXTS, TOKENS)}] for task in self.experts}
        self.heads = {task: torch.randn(config["hidden_size"], CLASSES, generator=generator) for task in self.experts}
        self.config = sm.StatsMergingConfig(steps=self.steps, progress=False)

    def head(self, features: Tensor, task: str) -> Tensor:
        return features @ self.heads[task]


def samerge(x: Problem) -> float:
    """-> the first step's loss"""
    packed = sm.PackedWeights.from_folders(x.base, x.experts)
    logits = sm.models.SharedEncoder(encode, x.head)
    return sm.statsmerging(load_folder(x.base), packed, x.batches, logits, config=x.config).history[0]["loss"]


def published(x: Problem) -> float:
    """-> the first step's loss"""
    module = load_folder(x.base).requires_grad_(False)
    experts = {task: load_folder(folder).requires_grad_(False) for task, folder in x.experts.items()}
    base = dict(module.named_parameters())
    task_vectors = [[w - base[name] for name, w in expert.named_parameters()] for expert in experts.values()]
    losses, learner = [], None
    for step in range(x.steps):
        rows = [[_statistics(w) for w in expert.parameters()] for expert in experts.values()]
        statistics = torch.stack([torch.stack(row) for row in rows])  # [T, L, 6]
        if learner is None:
            settings, start = learner_settings(x.config, tuple(base)), x.config.initial_coefficient
            learner = sm.StatsMergeLearner.made_for(statistics, settings, start=start, seed=x.config.seed)
            optimizer = torch.optim.Adam(learner.parameters(), lr=x.config.learning_rate)
        merged = dict(zip(base, merged_layers(list(base.values()), task_vectors, learner(statistics)), strict=True))
        loss = torch.zeros(())
        for task, (batch,) in x.batches.items():
            label = x.head(encode(experts[task], batch), task).argmax(-1)
            features = encode(lambda merged=merged, **inputs: functional_call(module, merged, (), inputs), batch)
            loss = loss + nn.functional.cross_entropy(x.head(features, task), label)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = x.config.learning_rate * x.config.decay_at(step, x.steps)
        optimizer.step()
        losses.append(loss.item())
    return losses[0]


def _statistics(weight: Tensor) -> Tensor:  # -> [6]
    matrix = weight.flatten(1) if weight.dim() > 1 else weight[None]
    sigma = torch.linalg.svdvals(matrix)[:3]
    moments = torch.stack([weight.mean(), weight.var(correction=0), weight.norm()])
    return torch.cat([moments, nn.functional.pad(sigma, (0, 3 - len(sigma)))])


def run(candidate: str, x: Problem) -> dict:
    """What one process measures."""
    load_folder(x.base)  # imports what it needs
    stamps, gradient = [], []

    def before_a_step(optimizer, *_):
        stamps.append(perf_counter())
        if len(stamps) == 1:
            gradient.extend(torch.cat([p.grad.flatten() for p in optimizer.param_groups[0]["params"]]).tolist())

    register_optimizer_step_pre_hook(before_a_step)
    with PeakMemory("cpu") as peak:
        started = perf_counter()
        loss = {"samerge cpu": samerge, "published": published}[candidate](x)
        total = perf_counter() - started
    step = median(later - earlier for earlier, later in zip(stamps, stamps[1:]))
    return {
        "candidate": candidate,
        "total_s": total,
        "step_s": step,
        "rest_s": total - x.steps * step,
        "extrapolated_s": total + (PUBLISHED_STEPS - x.steps) * step,
        "peak_bytes": peak.rise,
        "loss": loss,
        "gradient": gradient,
    }


def random_experts(folder: Path) -> None:
    """A base and experts of MiniLM's shape, as folders."""
    from safetensors.torch import save_file
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    base = BertModel(config).state_dict()
    for name in ("base", *(f"task{t}-seed0" for t in range(TASKS))):
        config.save_pretrained(folder / name)
        change = 0.0 if name == "base" else 1e-3
        weights = {key: w + change * torch.randn_like(w) if w.is_floating_point() else w for key, w in base.items()}
        save_file(weights, folder / name / "model.safetensors")


def compare(ours: dict, theirs: dict) -> tuple[float, float]:
    """Relative errors of the first loss and gradient."""
    a, b = (torch.tensor(found.pop("gradient"), dtype=torch.float64) for found in (ours, theirs))
    errors = abs(ours["loss"] - theirs["loss"]) / abs(theirs["loss"]), ((a - b).norm() / b.norm()).item()
    if not (errors[0] <= LOSS_TOLERANCE and errors[1] <= GRADIENT_TOLERANCE):
        sys.exit(f"first loss and gradient differ by {errors[0]:.1e} and {errors[1]:.1e}: no time is given for a wrong result")
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="at least 2")
    parser.add_argument("--save-to", type=Path, metavar="FOLDER", help="write statsmerging-cpu.json there")
    parser.add_argument("--run", nargs=2, metavar=("CANDIDATE", "FOLDER"), help="one candidate in this process, as JSON")
    arguments = parser.parse_args()
    if arguments.run:
        candidate, folder = arguments.run
        base, experts = expert_folders(Path(folder))
        print(json.dumps(run(candidate, Problem(base, experts, arguments.steps))))
        return
    with tempfile.TemporaryDirectory() as made:
        folder, kind = experts_folder(), "the demo's"
        found = expert_folders(folder)
        if not found or len(found[1]) != TASKS:
            folder, kind = Path(made), "random"
            random_experts(folder)
        results = []
        for candidate in CANDIDATES:
            command = [sys.executable, __file__, "--steps", str(arguments.steps), "--run", candidate, str(folder)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results.append(json.loads(output.splitlines()[-1]))
    loss_error, gradient_error = compare(*results)
    about = {"experts": f"{TASKS} of MiniLM's shape, {kind}", "texts_per_task": TEXTS, "tokens": TOKENS, "steps": arguments.steps}
    errors = {"loss_error": loss_error, "gradient_error": gradient_error, "extrapolated_to_steps": PUBLISHED_STEPS}
    print(f"{about['experts']}; {TEXTS} texts of {TOKENS} tokens per task and step; {torch.get_num_threads()} threads")
    print(f"first loss and gradient agree to {loss_error:.1e} and {gradient_error:.1e}\n")
    print(f"| | step, s | {arguments.steps} steps, s | {PUBLISHED_STEPS} steps, s (extrapolated) | peak, MiB |")
    print("|---|---:|---:|---:|---:|")
    for found in results:
        times = f"{found['step_s']:.2f} | {found['total_s']:.1f} | {found['extrapolated_s']:.0f}"
        print(f"| {found['candidate']} | {times} | {found['peak_bytes'] / 2**20:.0f} |")
    if arguments.save_to:
        text = json.dumps({**environment("cpu"), **about, **errors, "results": results}, indent=1)
        (arguments.save_to / "statsmerging-cpu.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
