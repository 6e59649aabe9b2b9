"""A learned merge of a language model without its logits: peak memory within a budget, and seconds beside bare passes.

    python benchmarks/language_models.py                      # SmolLM2-135M's shape, 4 experts, CPU; 3 GB of disk, a few minutes

A model with random weights, of which every task has a batch of tokens that are all learned from. Each budget is kept to in a
process of its own that learns two steps; the peak is the process's largest resident memory (VmHWM). In one more process the
passes of a step take turns with bare ones of the same module: forward and backward through its own logits, at given weights,
towards no teacher. Seconds are of the processor, so that other work on the machine counts little.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from random_llama import SHAPES, Shape, llama, packed_weights, write_packed
from report import environment

import samerge_ext as sm
from samerge_ext.budget.plan import PLAN_FILE, Way
from samerge_ext.checkpoints.sealed import read_sealed
from samerge_ext.learning.calibration import Calibration
from samerge_ext.learning.loop import make_passes
from samerge_ext.learning.losses import Divergence, distillation
from samerge_ext.learning.prefetch import Input
from samerge_ext.learning.teaching import lessons
from samerge_ext.memory import peak_resident_bytes
from samerge_ext.sizes import parse_bytes, show_bytes

RESULTS = Path(__file__).parent / "results"
BUDGETS = {"SmolLM2-135M": "2.5GB", "SmolLM2-135M-bf16": "1.5GB"}
TURNS = 3


def make_batches(shape: Shape) -> dict[str, list[dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(1)
    size = (shape.batch, shape.tokens)
    mask = torch.ones(size, dtype=torch.long)
    return {
        task: [{"input_ids": torch.randint(shape.vocabulary, size, generator=generator), "attention_mask": mask}]
        for task in shape.tasks
    }


def within_budget(name: str, work: Path) -> dict:
    """Two steps under the shape's budget, in this process."""
    shape, state = SHAPES[name], work / f"state-{name}"
    for file in (PLAN_FILE, "state.pt"):
        (state / file).unlink(missing_ok=True)
    packed = sm.PackedWeights.open(packed_path(name, work), verify=False)
    settings = {"steps": 2, "sam": "off", "progress": False, "memory_budget": BUDGETS[name], "checkpoint_dir": state}
    config = sm.SAMergingConfig(**settings)
    result = sm.samerging(llama(shape), packed, make_batches(shape), sm.models.causal_lm, config=config)
    way = Way(**json.loads(read_sealed(state / PLAN_FILE))["way"])
    return {
        "shape": name,
        "memory_budget": parse_bytes(BUDGETS[name]),
        "way": way.name,
        "planned_bytes": way.device_bytes,
        "measured_bytes": peak_resident_bytes(),
        "logits_bytes_of_a_task": shape.batch * shape.tokens * shape.vocabulary * shape.dtype.itemsize,
        "loss": result.history[-1]["loss"],
    }


def beside_bare_passes(name: str) -> dict:
    """A step's one pass of all tasks, and bare ones, in turns."""
    shape = SHAPES[name]
    model = sm.MergedModel(llama(shape, with_weights=True), packed_weights(shape, "bf16", "cpu"), 0.3)
    config = sm.SAMergingConfig(sam="off", progress=False)
    calibration = Calibration(make_batches(shape), shape.tasks)
    _, taught = lessons(model, calibration, sm.models.causal_lm, config)
    inputs = {task: Input(calibration.batches[task][0], taught[task][0]) for task in shape.tasks}
    loss_of = lambda student, lesson: distillation(student, lesson[0], Divergence(2.0, 2.0), None)
    passes = make_passes(model, sm.models.causal_lm, loss_of, config)
    point = model.coefficients.detach().flatten()

    def bare() -> None:
        model.zero_gradients()
        for batch, _ in inputs.values():
            sm.models.causal_lm(model.module, batch, "").square().mean().backward()

    calls = {"step": lambda: passes(point, inputs), "bare": bare}
    seconds: dict[str, list[float]] = {call: [] for call in calls}
    for _ in range(TURNS):
        for call, run in calls.items():
            started = time.process_time()
            run()
            seconds[call].append(time.process_time() - started)
    ratios = [step / other for step, other in zip(*seconds.values(), strict=True)]
    return {"shape": name, "seconds": seconds, "of_bare_passes": median(ratios)}


def packed_path(name: str, work: Path) -> Path:
    return work / f"{name}.packed"


def in_a_process(arguments: argparse.Namespace, way: str, name: str) -> dict:
    command = [sys.executable, __file__, "--work", str(arguments.work), f"--{way}", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(".cache-large-models"), help="folder of the packed files")
    parser.add_argument("--out", type=Path, default=RESULTS / "language-models-cpu.json", help="JSON to write")
    for internal in ("--budget", "--bare"):
        parser.add_argument(internal, choices=BUDGETS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.budget or arguments.bare:
        found = within_budget(arguments.budget, arguments.work) if arguments.budget else beside_bare_passes(arguments.bare)
        print(json.dumps(found))
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    content: dict = {"environment": environment("cpu"), "within_budget": []}
    for name in BUDGETS:
        if not packed_path(name, arguments.work).exists():
            write_packed(packed_path(name, arguments.work), SHAPES[name], "bf16", "cpu")
        row = in_a_process(arguments, "budget", name)
        content["within_budget"].append(row)
        planned, measured = show_bytes(row["planned_bytes"]), show_bytes(row["measured_bytes"])
        print(f"{name:18} of {BUDGETS[name]}: {planned} planned, {measured} measured, {row['way']}", flush=True)
    content["beside_bare_passes"] = row = in_a_process(arguments, "bare", next(iter(BUDGETS)))
    print(f"{row['shape']}: a resident pass takes {row['of_bare_passes']:.2f} of bare passes")
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
