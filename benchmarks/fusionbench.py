"""FusionBench's layer-wise AdaMerging of eight ViT-B/32 on its own wrapper and on samerge_ext's in its place.

    PYTHONPATH=. .cache-fusion-bench/bin/python benchmarks/fusionbench.py [--batch 4] [--steps 20] [--turns 1]
        [--save-to benchmarks/results]

with the environment that `make test-fusion-bench` makes. The algorithm is FusionBench's LayerWiseAdaMergingAlgorithm, unmodified;
images, heads and experts are random, which does not change the work. Before anything is timed, both learn twenty steps of a
smaller ViT in fp64 and must agree in every weight; the first gradients of what is timed must agree too. How far apart the weights
and merged models are that both learn in fp32 while they are timed is printed, but for the biases of keys: their gradient is zero
but for rounding, of which Adam makes steps of full length, and they do not change what the model answers.

Candidates take turns, each time in a process of its own. A step is the median CPU time, of all threads, between the optimiser's
steps; what comes before the first step, where memory is touched for the first time, is given by itself. Memory is how far the
process rose above the nine models that it was given: as the system's allocator has it, and, in one more turn, with an allocator
that returns every tensor's memory when it is freed (MALLOC_MMAP_THRESHOLD_), so that only what is alive counts.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import subprocess
import sys
import tempfile
from itertools import cycle
from pathlib import Path
from statistics import median
from time import process_time

import torch
from report import environment
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from samerge_ext.integrations import fusion_bench
from samerge_ext.memory import PeakMemory

TASKS, CLASSES, START, RATE = 8, 100, 0.3, 1e-3
STEPS, ALIVE_STEPS, SMALL_STEPS = 20, 2, 20
CANDIDATES = ("samerge", "FusionBench")
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
WEIGHTS_TOLERANCE = 1e-5  # absolute, of weights that models in fp64 learn
KEY_BIAS, EVERY = ".k_proj.bias", 997  # of merged models every 997th number is compared
GRADIENT_TOLERANCE = 1e-4  # relative L2, of the first gradient in fp32
RETURNED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def models(small: bool) -> tuple[nn.Module, list[nn.Module]]:
    """A base and random experts."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    base = CLIPVisionModel(CLIPVisionConfig(patch_size=32, **(SMALL if small else {})))
    base = base.double() if small else base
    experts = [copy.deepcopy(base) for _ in range(TASKS)]
    with torch.no_grad():
        for parameter in (p for expert in experts for p in expert.parameters()):
            parameter.add_(torch.randn_like(parameter), alpha=1e-2 if small else 1e-3)
    return base, experts


class Pool:
    """What the algorithm asks of a pool of models; each is handed out once."""

    def __init__(self, base: nn.Module, experts: list[nn.Module]):
        self.model_names = [f"task{t}" for t in range(len(experts))]
        self._models = {"_pretrained_": base, **dict(zip(self.model_names, experts, strict=True))}

    def load_model(self, name: str) -> nn.Module:
        return self._models.pop(name)


def adamerging(pool: Pool, batch: int, steps: int, dtype: torch.dtype) -> tuple[Tensor, nn.Module]:
    """FusionBench's algorithm on random images; -> merge_weight [T, L], the merged model"""
    import lightning
    from fusion_bench.method.adamerging.layer_wise_adamerging import LayerWiseAdaMergingAlgorithm
    from lightning.fabric.loggers import Logger
    from omegaconf import DictConfig

    class NoLogger(Logger):
        name, version, root_dir = "none", 0, "."
        log_dir = tempfile.mkdtemp()
        log_hyperparams = log_metrics = lambda self, *args, **kwargs: None

    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(dtype)
    width = pool._models["_pretrained_"].config.hidden_size
    heads = {task: draw(width, CLASSES) / width**0.5 for task in pool.model_names}
    images = {task: cycle([(draw(batch, 3, 224, 224), None)]) for task in pool.model_names}

    class Algorithm(LayerWiseAdaMergingAlgorithm):
        def get_shuffled_test_loader_iter(self, task):
            return images[task]

        def compute_logits(self, module, images, task):
            return module(images)[1] @ heads[task]

        def save_merging_weights(self, file_path, merging_weights):
            learned.append(merging_weights.detach().clone())

    learned: list[Tensor] = []
    settings = {"optimizer": "adam", "lr": RATE, "init_values": START, "max_steps": steps, "save_merging_weights": True}
    settings |= {"weights": None, "clamp_weights": False, "tie_weights": True, "strict": False}
    algorithm = Algorithm(DictConfig(settings))
    algorithm.fabric = lightning.Fabric(accelerator="cpu", devices=1, loggers=NoLogger())
    with contextlib.redirect_stdout(sys.stderr):
        merged = algorithm.run(pool)
    return learned[0], merged


def run(candidate: str, batch: int, steps: int, small: bool) -> dict:
    """What one process measures."""
    pool, stamps, gradient = Pool(*models(small)), [], []
    layers = [name for name, _ in pool._models["_pretrained_"].named_parameters()]
    counted = [layer for layer, name in enumerate(layers) if not name.endswith(KEY_BIAS)]

    def before_a_step(optimizer, *_):
        stamps.append(process_time())
        if len(stamps) == 1:
            gradient.extend(optimizer.param_groups[0]["params"][0].grad.flatten().tolist())

    register_optimizer_step_pre_hook(before_a_step)
    bytes_of_model = sum(p.numel() * p.itemsize for p in pool._models["_pretrained_"].parameters())
    with fusion_bench.accelerate() if candidate == "samerge" else contextlib.nullcontext():
        with PeakMemory("cpu") as peak:
            started = process_time()
            weights, model = adamerging(pool, batch, steps, torch.float64 if small else torch.float32)
    merged = dict(model.named_parameters())
    return {
        "candidate": candidate,
        "step_cpu_s": median(later - earlier for earlier, later in zip(stamps, stamps[1:])),
        "until_first_step_cpu_s": stamps[0] - started,
        "peak_bytes": peak.rise,
        "peak_models": peak.rise / bytes_of_model,
        "gradient": gradient,
        "weights": weights.flatten().tolist(),
        "counted_weights": weights[:, counted].flatten().tolist(),
        "merged": torch.cat([merged[layers[layer]].flatten()[::EVERY] for layer in counted]).tolist(),
    }


def in_a_process(candidate: str, batch: int, steps: int, *more: str, **variables: str) -> dict:
    command = [sys.executable, __file__, "--batch", str(batch), "--steps", str(steps), "--run", candidate, *more]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **variables}).stdout
    return json.loads(output.splitlines()[-1])


def difference(found: dict[str, dict], key: str) -> tuple[float, float]:
    """The largest, and the relative L2 one, between what the candidates have under a key."""
    ours, theirs = (torch.tensor(found[candidate][key], dtype=torch.float64) for candidate in CANDIDATES)
    return (ours - theirs).abs().max().item(), ((ours - theirs).norm() / theirs.norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4, help="images per task and step")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--steps", type=int, default=STEPS, help="of which the first is not timed; at least 2")
    parser.add_argument("--save-to", type=Path, metavar="FOLDER", help="write fusion-bench-cpu.json there, or add a batch to it")
    parser.add_argument("--run", metavar="CANDIDATE", help="one candidate in this process, as JSON")
    parser.add_argument("--small", action="store_true", help="with --run: the smaller model in fp64")
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(run(arguments.run, arguments.batch, arguments.steps, arguments.small)))
        return
    batch, steps = arguments.batch, arguments.steps
    small = {name: in_a_process(name, batch, SMALL_STEPS, "--small") for name in CANDIDATES}
    weights_error = difference(small, "weights")[0]
    if not weights_error <= WEIGHTS_TOLERANCE:
        sys.exit(f"weights learned in fp64 differ by {weights_error:.1e}: no time is given for a wrong result")
    turns = [{name: in_a_process(name, batch, steps) for name in CANDIDATES} for _ in range(arguments.turns)]
    alive = {name: in_a_process(name, batch, ALIVE_STEPS, **RETURNED_AT_ONCE) for name in CANDIDATES}
    gradient_error = max(difference(turn, "gradient")[1] for turn in turns)
    if not gradient_error <= GRADIENT_TOLERANCE:
        sys.exit(f"first gradients differ by {gradient_error:.1e}: no time is given for a wrong result")
    moved = (torch.tensor(small["samerge"]["weights"]) - START).abs().max().item()
    about = {
        "model": f"ViT-B/32, T = {TASKS}", "batch": batch, "steps": steps, "turns": arguments.turns,
        "weights_error_fp64": weights_error, "weights_moved_fp64": moved, "gradient_error": gradient_error,
        "weights_error": max(difference(turn, "counted_weights")[0] for turn in turns),
        "merged_error": max(difference(turn, "merged")[0] for turn in turns),
    }  # fmt: skip
    print(f"{about['model']}, {batch} images per task, {torch.get_num_threads()} threads; {SMALL_STEPS} steps in fp64")
    print(f"agree to {weights_error:.1e} (of {moved:.1e}), first gradients in fp32 to {gradient_error:.1e};")
    learned, merged = about["weights_error"], about["merged_error"]
    print(f"weights learned in {steps} steps in fp32 to {learned:.1e}, merged models to {merged:.1e}\n")
    print("| | CPU seconds a step | until the first step | peak, models | of what is alive |")
    print("|---|---:|---:|---:|---:|")
    rows = []
    for name in CANDIDATES:
        keys = ("step_cpu_s", "until_first_step_cpu_s", "peak_models", "peak_bytes")
        row = {key: median(turn[name][key] for turn in turns) for key in keys}
        row |= {"candidate": name, "peak_models_alive": alive[name]["peak_models"]}
        row["steps_of_turns_cpu_s"] = [turn[name]["step_cpu_s"] for turn in turns]
        rows.append(row)
        times = f"{row['step_cpu_s']:.2f} | {row['until_first_step_cpu_s']:.1f}"
        print(f"| {name} | {times} | {row['peak_models']:.1f} | {row['peak_models_alive']:.1f} |")
    if arguments.save_to:
        import importlib.metadata

        file = arguments.save_to / "fusion-bench-cpu.json"
        others = [r for r in json.loads(file.read_text())["runs"] if r["batch"] != batch] if file.exists() else []
        versions = {name: importlib.metadata.version(name) for name in ("fusion-bench", "transformers")}
        held = {**environment("cpu"), **versions, "runs": [*others, {**about, "results": rows}]}
        file.write_text(json.dumps(held, indent=1) + "\n")


if __name__ == "__main__":
    main()
