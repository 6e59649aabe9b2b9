"""Data-free merges from file to file: `samerge merge` beside mergekit-yaml, whole commands on the same folders.

    python benchmarks/files.py --folder DIR [--mergekit .../bin/mergekit-yaml] [--device cuda] [--rounds 3] [--method ties …]
                               [--layers 20] [--vocabulary 32000] [--ranks 2] [--save-to FILE]

Makes a base and four experts, a Llama of 317 M random numbers in bf16, 3.2 GB in all; they are used again where they are there.
slerp merges one of them.
The commands take turns, and every one finds the files in the page cache. Time is from start to end of the process, memory
its peak resident set, in which mapped and touched files count. mergekit is no dependency: without it only ours is timed.
With --device cuda both merge on a GPU too, as commands of their own; that has not been run yet.

With --ranks they are also merged by so many processes at a time, which must write the files that one writes, byte by byte.

Values agree where they differ by at most one rounding to bf16 of the largest of the numbers they are made from. mergekit breaks
ties with a threshold of TIES or breadcrumbs by the order of a sort; numbers that lie on it are counted apart. mergekit also
rounds weights, products and sums to bf16: how many numbers of each are off the sum in fp64 by more than one rounding is counted
too.

What DARE drops is random: there the change of the weights is compared with what it is on average, the change without dropping.
slope: its regression on that, 1 where the mean is kept. spread: the mean square of what remains, over that which independent
draws at this density have, 1 where every number is dropped by itself. unchanged: the share of numbers that are the base's, which
is all that is compared of DELLA.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from report import environment, table
from torch import Tensor

from samerge_ext.checkpoints.folder import open_checkpoint
from samerge_ext.checkpoints.saving import save_checkpoint
from samerge_ext.elementwise.magnitudes import kept_count
from samerge_ext.methods.breadcrumbs import GAMMA

EXPERTS = ("a", "b", "c", "d")
WIDTH, MLP = 1024, 2736
DENSITY = 0.2
RECIPES = {
    "task_arithmetic": {"weight": 0.3},
    "ties": {"weight": 1.0, "density": DENSITY},
    "dare_linear": {"weight": 0.3, "density": DENSITY},
    "breadcrumbs": {"weight": 0.3, "density": DENSITY},
    "della": {"weight": 1.0, "density": DENSITY},
    "slerp": {},
}
SHARED = {"slerp": {"t": 0.4}}


def shapes(layers: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    found = {"model.embed_tokens.weight": (vocabulary, WIDTH)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        found |= {f"{layer}self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"}
        found |= {f"{layer}mlp.{name}_proj.weight": (MLP, WIDTH) for name in ("gate", "up")}
        found |= {f"{layer}mlp.down_proj.weight": (WIDTH, MLP)}
        found |= {f"{layer}{name}_layernorm.weight": (WIDTH,) for name in ("input", "post_attention")}
    return found | {"model.norm.weight": (WIDTH,), "lm_head.weight": (vocabulary, WIDTH)}


def experts_of(method: str) -> tuple[str, ...]:
    return EXPERTS[:1] if method == "slerp" else EXPERTS


def make_folders(folder: Path, layers: int, vocabulary: int) -> None:
    configuration = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    for seed, name in enumerate(("base", *EXPERTS)):
        if (folder / name).exists():
            continue

        def tensors(seed=seed):
            for i, (tensor, shape) in enumerate(shapes(layers, vocabulary).items()):
                pretrained = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(i))
                change = 0.002 * torch.randn(shape, generator=torch.Generator().manual_seed(1000 * seed + i))
                yield tensor, (pretrained + change * bool(seed)).bfloat16()

        files = {"config.json": json.dumps(configuration)}
        save_checkpoint(folder / name, tensors(), extra_files=files)


def write_recipe(folder: Path, method: str) -> Path:
    lines = [f"merge_method: {method}", f"base_model: {folder / 'base'}", "dtype: bfloat16"]
    lines += [f"parameters: {SHARED.get(method, {})}", "models:"]
    for name in experts_of(method):
        lines += [f"  - model: {folder / name}", f"    parameters: {RECIPES[method]}"]
    path = folder / f"{method}.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def run(command: list[str], out: Path) -> tuple[float, float]:
    """Seconds and peak MB of a command that writes ``out``."""
    shutil.rmtree(out, ignore_errors=True)
    for name in ("base", *EXPERTS):  # a turn takes long enough for the kernel to drop what nobody reads
        for file in (out.parent / name).glob("*.safetensors"):
            with open(file, "rb") as stream:
                while stream.read(1 << 24):
                    pass
    os.sync()  # what the turn before wrote is not this one's to wait for
    log = out.with_suffix(".log")
    with open(log, "w") as file:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        peak = 0
        while process.poll() is None:  # rusage would count this process's own memory, from before the child's exec
            peak = _peak_kib(process.pid) or peak
            time.sleep(0.02)
        seconds = time.perf_counter() - started
    if process.returncode:
        sys.exit(f"{command[0]} failed:\n{log.read_text()[-4000:]}")
    return seconds, peak * 1024 / 1e6


def by_ranks(command: list[str], folder: Path, method: str, ranks: int) -> dict:
    """Merges by one process and by ranks, into files of 100 MB: how many of the same bytes, and in what seconds."""
    outs = {count: folder / f"{method}-by-{count}" for count in (1, ranks)}
    seconds = {}
    for count, out in outs.items():
        shutil.rmtree(out, ignore_errors=True)
        options = [str(out), "--shard-size", "100MB", "--quiet", "--no-report"]
        started = time.perf_counter()
        processes = [
            subprocess.Popen([*command, *options, *(("--rank", str(rank), "--ranks", str(count)) if count > 1 else ())])
            for rank in range(count)
        ]
        if any([process.wait() for process in processes]):
            sys.exit(f"{method} by {count} failed")
        seconds[count] = time.perf_counter() - started
    digests = [_digests(out) for out in outs.values()]
    if digests[0] != digests[1]:
        sys.exit(f"{method}: other bytes by {ranks} ranks than by one process: {digests}")
    found = {"method": method, "ranks": ranks, "files_of_the_same_bytes": len(digests[0])}
    return found | {"seconds_by_one": seconds[1], "seconds_by_ranks": seconds[ranks]}


def _digests(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _peak_kib(pid: int) -> int | None:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)  # a process that ended has none


def agreement(folder: Path, method: str, ours: Path, theirs: Path) -> dict[str, int]:
    """How many of theirs are equal to ours, within one rounding, on TIES's threshold, and none of these; and off the truth."""
    counts = dict.fromkeys(("numbers", "equal", "one_rounding", "on_the_threshold", "differ"), 0)
    models = [open_checkpoint(path) for path in (folder / "base", *(folder / name for name in experts_of(method)), ours, theirs)]
    for name in models[0].names:
        base, *experts, a, b = (model.read(name).flatten() for model in models)
        changes = torch.stack([expert - base for expert in experts])  # [T, n]
        largest = torch.stack([base.abs(), *changes.abs(), a.abs(), b.abs()]).amax(0).float()
        rounding = torch.exp2(torch.frexp(largest).exponent - 8.0)  # the last of bf16's 8 bits
        equal = a == b
        close = (a.float() - b.float()).abs() <= rounding
        tied = on_thresholds(changes, method)
        counts["numbers"] += a.numel()
        counts["equal"] += int(equal.sum())
        counts["one_rounding"] += int((close & ~equal).sum())
        counts["on_the_threshold"] += int((tied & ~close).sum())
        counts["differ"] += int((~close & ~tied).sum())
        if method == "task_arithmetic":
            weight = RECIPES[method]["weight"]
            truth = base.double() + weight * sum(expert.double() - base.double() for expert in experts)
            counts["off_truth"] = counts.get("off_truth", 0) + int(((b.double() - truth).abs() > rounding).sum())
    return counts


def statistics(folder: Path, method: str, outs: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Slope, spread and unchanged share of DARE's results by command."""
    weight = RECIPES[method]["weight"]
    models = [open_checkpoint(path) for path in (folder / "base", *(folder / name for name in EXPERTS))]
    merged = {command: open_checkpoint(out) for command, out in outs.items()}
    found = {command: dict.fromkeys(("slope", "spread", "unchanged"), 0.0) for command in outs}
    numbers, squares, variance = 0, 0.0, 0.0
    for name in models[0].names:
        base, *experts = (model.read(name).flatten() for model in models)
        task_vectors = torch.stack([expert - base for expert in experts]).float()  # [T, n], rounded to bf16 by both
        mean = weight * task_vectors.sum(0)
        numbers += mean.numel()
        squares += float(mean.square().sum(dtype=torch.float64))
        variance += weight**2 * (1 / DENSITY - 1) * float(task_vectors.square().sum(dtype=torch.float64))
        for command, sums in found.items():
            change = merged[command].read(name).flatten().float() - base.float()
            sums["slope"] += float((change * mean).sum(dtype=torch.float64))
            sums["spread"] += float((change - mean).square().sum(dtype=torch.float64))
            sums["unchanged"] += float((change == 0).sum())
    totals = {"slope": squares, "spread": variance, "unchanged": numbers}
    return {command: {key: sums[key] / totals[key] for key in totals} for command, sums in found.items()}


def unchanged(folder: Path, outs: dict[str, Path]) -> dict[str, dict[str, float]]:
    """The share of numbers that are the base's by command."""
    base, shares = open_checkpoint(folder / "base"), {}
    for command, out in outs.items():
        merged = open_checkpoint(out)
        same = sum(int((merged.read(name) == base.read(name)).sum()) for name in base.names)
        shares[command] = {"unchanged": same / sum(base.shape(name).numel() for name in base.names)}
    return shares


def on_thresholds(changes: Tensor, method: str) -> Tensor:  # [T, n] -> [n]
    """Which numbers are as large as the smallest that TIES or breadcrumbs keeps of a task vector, or the smallest it drops as too
    large."""
    numel = changes.shape[1]
    outliers = int(GAMMA * numel)
    counts = {"ties": [kept_count(DENSITY, numel)], "breadcrumbs": [outliers, outliers + int(DENSITY * numel)]}.get(method, [])
    magnitudes, on = changes.abs().float(), torch.zeros(numel, dtype=torch.bool)
    for count in filter(None, counts):
        smallest = magnitudes.kthvalue(numel - count + 1).values  # [T]
        on |= (magnitudes == smallest[:, None]).any(0)
    return on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="for models and results, 6 GB")
    parser.add_argument("--mergekit", type=Path, help="the executable mergekit-yaml, version 0.1.5")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: on a GPU beside the CPU")
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, help="processes that merge together, too")
    parser.add_argument("--method", choices=RECIPES, action="append", help="task_arithmetic and ties by default")
    parser.add_argument("--save-to", type=Path, help="a JSON file")
    options = parser.parse_args()
    folder = options.folder.resolve()
    make_folders(folder, options.layers, options.vocabulary)
    numbers = sum(torch.Size(shape).numel() for shape in shapes(options.layers, options.vocabulary).values())
    rows, results = [], []
    for method in options.method or ("task_arithmetic", "ties"):
        recipe = write_recipe(folder, method)
        commands = {"samerge": [str(Path(sys.executable).with_name("samerge")), "merge", str(recipe)]}
        if options.ranks:
            results.append(by_ranks(commands["samerge"], folder, method, options.ranks))
            print(results[-1], flush=True)
        if options.mergekit:
            commands["mergekit"] = [str(options.mergekit), "--no-copy-tokenizer", "--quiet", str(recipe)]
        if options.device == "cuda":
            on_gpu = {"samerge": ["--device", "cuda"], "mergekit": ["--cuda"]}
            commands |= {f"{name}-cuda": [*command, *on_gpu[name]] for name, command in commands.items()}
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for _ in range(options.rounds):
            for name, command in commands.items():
                out = folder / f"{method}-{name}"
                found[name].append(run([*command, str(out)], out))
        seconds = {name: median(time for time, _ in runs) for name, runs in found.items()}
        outs = {name: folder / f"{method}-{name}" for name in commands}
        if method.startswith("dare"):
            what, agrees = "statistics", statistics(folder, method, outs)
        elif method == "della":
            what, agrees = "statistics", unchanged(folder, outs)
        else:
            what, agrees = "agreement", {name: agreement(folder, method, outs["samerge"], out) for name, out in outs.items()}
        for name, runs in found.items():
            peak = max(megabytes for _, megabytes in runs)
            row = {"method": method, "command": name, "seconds": f"{seconds[name]:.1f}", "peak MB": f"{peak:.0f}"}
            rows.append(row | {"times ours": f"{seconds[name] / seconds['samerge']:.1f}"})
            result = {"method": method, "command": name, "seconds": [t for t, _ in runs], "peak_mb": peak}
            results.append(result | {what: agrees[name]})
            print(f"{method}, {name}: {agrees[name]}")
    print(table(rows))
    if options.save_to:
        about = f"{len(EXPERTS)} experts of {numbers / 1e6:.0f} M numbers, bf16"
        content = {"benchmark": about, "environment": environment(options.device), "rows": results}
        options.save_to.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
