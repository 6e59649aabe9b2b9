"""A learned merge within a memory budget, by each way to hold it: planned and measured peak memory, seconds per SAM step.

    python benchmarks/large_models.py                         # ~300 M parameters, 8 experts, CPU; a few minutes, 6 GB of disk
    python benchmarks/large_models.py --device cuda --shape 7B --cap 24GiB --task-vectors int8 --ways host
    python benchmarks/large_models.py --device cuda --shape 1B --cap 24GiB --ways memory,host,file

A model of Llama's shape with random weights. Every way runs in a process of its own, under a budget:

    resident             none
    memory               what its plan says it needs: everything in the device's memory, merged unit by unit
    host, file           likewise, with the weights in pinned memory beside a GPU, or in a packed file, whole units at a time
    quarter              a quarter of what the resident way needs
    own-weights          the same, for a model that comes with weights in memory; the others have none before they are merged
    smallest             what the least way needs: only a packed file, in small pieces, fits

The weights are in a packed file that is written first (6 GB of disk, 42 GB for 7B in int4), but for "host", which makes them in
memory. On the CPU the peak is the process's largest resident memory (VmHWM), Python, torch and transformers included; on a GPU
that of torch's allocator, which --cap limits. What base and task vectors alone move in a step is set beside a copy from where
they are, in the same process and in the same pieces.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch
from random_llama import SHAPES, llama, packed_weights, write_packed
from report import environment
from turns import seconds_on

import samerge_ext as sm
from samerge_ext.budget.plan import PLAN_FILE, Way, plan
from samerge_ext.checkpoints.sealed import read_sealed
from samerge_ext.learning import loop as learning
from samerge_ext.memory import peak_resident_bytes
from samerge_ext.packing.stores import empty_like, parts
from samerge_ext.sizes import parse_bytes, show_bytes

RESULTS = Path(__file__).parent / "results"
STEPS = 3
COPIED = 256 << 20  # bytes of a copy that is timed


def measure(arguments: argparse.Namespace) -> dict:
    """One way, in this process."""
    shape, device = SHAPES[arguments.shape], torch.device(arguments.device)
    if device.type == "cuda" and arguments.cap:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, parse_bytes(arguments.cap) / total))
    if arguments.plan_only:
        packed = packed_weights(shape, arguments.task_vectors, "meta")
    elif arguments.way == "host":
        packed = packed_weights(shape, arguments.task_vectors, arguments.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        packed = sm.PackedWeights.open(packed_path(arguments), device=device, verify=False)
    generator = torch.Generator().manual_seed(1)
    batches = {t: [torch.randint(shape.vocabulary, (shape.batch, shape.tokens), generator=generator)] for t in shape.tasks}
    # The tasks share all of the model: one batch of all of them, so that every unit is merged twice a pass, not twice a task.
    logits = sm.models.SharedEncoder(lambda module, ids: module(input_ids=ids).logits[:, -1], lambda rows, task: rows)
    settings = {"steps": STEPS, "learning_rate": 1e-2, "progress": False, "device": str(device)}
    if arguments.plan_only:
        return {"ways": [asdict(way) for way in plan(llama(shape), packed, batches, logits, sm.SAMergingConfig(**settings)).ways]}

    times = []
    make_passes = learning.make_passes

    def timed_passes(*args):
        passes = make_passes(*args)

        def run(*inputs):
            started = time.perf_counter()
            outputs = passes(*inputs)
            outputs[0].sum().item()  # waits for the device
            times.append(time.perf_counter() - started)
            return outputs

        return run

    learning.make_passes = timed_passes
    state = arguments.work / f"state-{arguments.way}"
    (state / PLAN_FILE).unlink(missing_ok=True)
    (state / "state.pt").unlink(missing_ok=True)
    budgets = {"memory_budget": arguments.budget, "host_memory_budget": arguments.host_budget}
    config = sm.SAMergingConfig(**settings, **budgets, checkpoint_dir=state)
    module = llama(shape, with_weights=arguments.way == "own-weights")
    result = sm.samerging(module, packed, batches, logits, config=config)
    way = Way(**json.loads(read_sealed(state / PLAN_FILE))["way"])
    host_peak = peak_resident_bytes()  # rusage would count the parent's, from before the exec
    return {
        "way": arguments.way,
        "plan": asdict(way),
        "memory_budget": parse_bytes(arguments.budget),
        "planned_bytes": way.device_bytes,
        "measured_bytes": host_peak if device.type == "cpu" else torch.cuda.max_memory_allocated(device),
        "planned_host_bytes": way.host_bytes,
        "measured_host_bytes": host_peak,
        "seconds_per_step": min(times),
        "seconds_of_steps": times,
        "bytes_per_second": copied_per_second(packed, way, device),
        "coefficients": result.coefficients.flatten().tolist(),
    }


def copied_per_second(packed: sm.PackedWeights, way: Way, device: torch.device) -> float:
    """Bytes of a copy from where the weights are, as a way reads them: from the file in its pieces, from pinned memory, or on
    the device, there read and written."""
    if way.store == "file":
        rows = [(numbers, empty_like(numbers, way.piece, "cpu")) for numbers in (packed.base, packed.task_vectors)]
        moved = sum(part.nbytes for _, room in rows for part in parts(room).values())
        starts = range(0, packed.layout.numel - way.piece, way.piece)[:8] or (0,)
        seconds = []
        for start in starts:
            began = time.perf_counter()
            for numbers, room in rows:
                numbers.read_into(start, min(way.piece, packed.layout.numel), room)
            seconds.append(time.perf_counter() - began)
        return moved / median(seconds)
    on_host = way.store == "host"
    source = torch.zeros(COPIED, dtype=torch.uint8, device="cpu" if on_host else device, pin_memory=on_host)
    target = torch.empty(COPIED, dtype=torch.uint8, device=device)
    seconds = median(seconds_on(device.type)(lambda: target.copy_(source, non_blocking=True), 1) for _ in range(5))
    return COPIED * (1 if on_host else 2) / seconds


def packed_path(arguments: argparse.Namespace) -> Path:
    return arguments.work / f"{arguments.shape}-{arguments.task_vectors}.packed"


def in_a_process(arguments: argparse.Namespace, **options) -> dict:
    command = [sys.executable, __file__, "--shape", arguments.shape, "--device", arguments.device, "--work", str(arguments.work)]
    command += ["--task-vectors", arguments.task_vectors]
    command += ["--cap", arguments.cap] if arguments.cap else []
    for key, value in options.items():
        command += [f"--{key.replace('_', '-')}", *([] if value is True else [str(value)])] if value is not None else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def budgets_of(planned: list[Way], on_gpu: bool) -> dict[str, tuple[int | str, int | None]]:
    """Of every way by name: of the device and, where only less of the host keeps the plan from another way, of the host."""
    slack = 1.03  # what the process takes before the plan is not the same to the byte from run to run
    first = {}
    for way in planned:
        first.setdefault(way.store if way.streamed else "resident", way)
    quarter = first["resident"].device_bytes // 4
    between = (first["host"].host_bytes + first["file"].host_bytes) // 2 if on_gpu else None
    return {
        "resident": ("1000TB", None),
        "memory": (int(slack * first["device"].device_bytes), None),
        **({"host": (int(slack * first["host"].device_bytes), None)} if on_gpu else {}),
        "file": (int(slack * first["file"].device_bytes), between),
        "quarter": (quarter, between),
        "own-weights": (quarter, between),
        "smallest": (int(slack * planned[-1].device_bytes), between),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="300M")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cap", help="the most memory that the process may take of a GPU, such as 24GiB")
    parser.add_argument("--task-vectors", choices=("bf16", "int8", "int4"), default="bf16", help="how they are stored")
    parser.add_argument("--work", type=Path, default=Path(".cache-large-models"), help="folder of the packed file")
    parser.add_argument("--ways", default="resident,memory,quarter,own-weights,smallest", help="which, and file and host")
    parser.add_argument("--out", type=Path, help="JSON to write; by default in benchmarks/results")
    for internal in ("--budget", "--host-budget", "--way"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    parser.add_argument("--plan-only", action="store_true", help="print what every way would take")
    arguments = parser.parse_args()
    if arguments.way or arguments.plan_only:
        print(json.dumps(measure(arguments)))
        return

    arguments.work.mkdir(parents=True, exist_ok=True)
    names = arguments.ways.split(",")
    planned = [Way(**way) for way in in_a_process(arguments, plan_only=True)["ways"]]
    budgets = budgets_of(planned, arguments.device == "cuda")
    if unknown := set(names) - budgets.keys():
        parser.error(f"--ways names {', '.join(sorted(unknown))}; on this device there are {', '.join(budgets)}")
    if set(names) - {"host"} and not packed_path(arguments).exists():
        write_packed(packed_path(arguments), SHAPES[arguments.shape], arguments.task_vectors, arguments.device)
    moved = next(way.moved for way in planned if way.moved)  # whole units
    rows = []
    for name in names:
        budget, host_budget = budgets[name]
        row = in_a_process(arguments, way=name, budget=budget, host_budget=host_budget)
        way = Way(**row["plan"])
        row["share"] = (way.moved or moved) / row["seconds_per_step"] / row["bytes_per_second"] if way.streamed else None
        rows.append(row)
        share = "" if row["share"] is None else f", {row['share']:.2f} of {show_bytes(row['bytes_per_second'])}/s"
        print(
            f"{name:11} {show_bytes(row['planned_bytes']):>8} planned {show_bytes(row['measured_bytes']):>8} measured "
            f"{row['seconds_per_step']:8.2f} s/step{share}  {way.name}", flush=True,
        )  # fmt: skip
    out = arguments.out or RESULTS / f"large-models-{arguments.shape}-{arguments.task_vectors}-{arguments.device}.json"
    hidden = {} if arguments.shape == "test" else {"coefficients": None}
    content = {
        "shape": arguments.shape,
        "task_vectors": arguments.task_vectors,
        "environment": environment(arguments.device),
        "planned": [asdict(way) for way in planned],
        "ways": [{key: value for key, value in row.items() if key not in hidden} for row in rows],
    }
    out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
