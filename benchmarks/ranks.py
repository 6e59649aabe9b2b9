"""A learned merge by several processes on one machine: memory of a rank, planned and measured; bytes sent; seconds per step.

    python benchmarks/ranks.py            # 290 M parameters, 4 experts, 1, 2 and 4 ranks; 4 GB of disk and 15 GB of memory

A model of Llama's shape with random weights, which are in a packed file that is written first. Every rank is a process with one
thread; gloo joins them. A rank's peak is its process's largest resident memory (VmHWM), Python, torch and transformers included.
Bytes are counted where they are given to the collectives; those of the formula are of docs/distributed.md, with the tied output
matrix, which two units have, twice. Seconds are of the slowest rank, the median of the steps after the first; beside them the
seconds in which a rank computed, whatever else the machine did.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from random_llama import SHAPES, Shape, llama, write_packed
from report import environment

import samerge_ext as sm
from samerge_ext.budget.holding import PLAN_FILE
from samerge_ext.budget.plan import Plan, Way
from samerge_ext.checkpoints.sealed import read_sealed_object
from samerge_ext.learning import loop as learning
from samerge_ext.memory import peak_resident_bytes
from samerge_ext.packing import ranks as collectives
from samerge_ext.sizes import show_bytes

RESULTS = Path(__file__).parent / "results"
EXPERTS, PASSES = 4, 2


def measure(arguments: argparse.Namespace) -> dict:
    """What one rank finds, in this process."""
    torch.set_num_threads(1)
    shape, streamed, folder = shape_of(arguments), arguments.way == "streamed", arguments.meet
    store = dist.FileStore(str(folder / "store"), arguments.ranks)
    dist.init_process_group("gloo", store=store, rank=arguments.rank, world_size=arguments.ranks)
    generator = torch.Generator().manual_seed(1)
    batches = {t: [torch.randint(shape.vocabulary, (shape.batch, shape.tokens), generator=generator)] for t in shape.tasks}
    times, received = [], []
    learning.make_passes = timed(learning.make_passes, times, counted(received))
    Plan.choose = lambda self, *_: next(way for way in self.ways if way.store == "device" and way.streamed == streamed)
    packed = sm.PackedWeights.open(packed_path(arguments), verify=False)
    whole = packed.base.nbytes + packed.task_vectors.nbytes
    share = packed.shard().in_memory()
    settings = {"memory_budget": "1000TB", "checkpoint_dir": folder / "state", "progress": False, "learning_rate": 1e-2}
    config = sm.SAMergingConfig(steps=arguments.steps, **settings)
    result = sm.samerging(llama(shape), share, batches, logits, config=config)
    way = Way(**read_sealed_object(folder / "state" / PLAN_FILE)["way"])
    found = {
        "plan": asdict(way),
        "measured_bytes": peak_resident_bytes(),
        "stores": share.base.nbytes + share.task_vectors.nbytes,
        "stores_of_all": whole,
        "received_per_step": received[-1],
        "received_by_the_formula": by_the_formula(shape, share, arguments.ranks, streamed),
        "seconds_of_steps": times,
        "coefficients": result.coefficients.flatten().tolist(),
    }
    dist.destroy_process_group()
    return found


def logits(module: Any, ids: torch.Tensor, task: str) -> torch.Tensor:
    return module(input_ids=ids).logits[:, -1]


def timed(
    make_passes: Callable[..., Any], times: list[tuple[float, float]], bytes_so_far: Callable[[], int]
) -> Callable[..., Any]:
    """Passes whose seconds and received bytes are noted step by step."""

    def make(*arguments: Any) -> Callable[..., Any]:
        passes = make_passes(*arguments)

        def run(*inputs: Any) -> Any:
            dist.barrier()
            bytes_so_far()
            started = time.perf_counter(), time.process_time()
            outputs = passes(*inputs)
            times.append((time.perf_counter() - started[0], time.process_time() - started[1]))
            bytes_so_far()
            return outputs

        return run

    return make


def counted(received: list[int]) -> Callable[[], int]:
    """Counts what the ranks gather and scatter from now on; returns a function that adds what came since its last call."""
    so_far = 0

    def counting(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(out: torch.Tensor, sent: torch.Tensor, **options: Any) -> Any:
            nonlocal so_far
            of_all, size = max(out.nbytes, sent.nbytes), dist.get_world_size()
            so_far += of_all // size * (size - 1)
            return collective(out, sent, **options)

        return call

    collectives._all_gather = counting(collectives._all_gather)
    collectives._reduce_scatter = counting(collectives._reduce_scatter)

    def since() -> int:
        nonlocal so_far
        received.append(so_far)
        so_far = 0
        return received[-1]

    return since


def by_the_formula(shape: Shape, share: sm.PackedWeights, ranks: int, streamed: bool) -> float:
    """Bytes that come to a rank in a step, of docs/distributed.md."""
    numbers, tied = share.layout.numel, shape.vocabulary * shape.hidden
    turns = -(-shape.experts // ranks)
    sent = 3 * turns * (numbers + tied) if streamed else 2 * numbers
    return PASSES * sent * share.base.dtype.itemsize * (ranks - 1) / ranks


def shape_of(arguments: argparse.Namespace) -> Shape:
    return replace(SHAPES[arguments.shape], experts=EXPERTS)


def packed_path(arguments: argparse.Namespace) -> Path:
    return arguments.work / f"{arguments.shape}-{EXPERTS}-bf16.packed"


def world(arguments: argparse.Namespace, ranks: int, way: str) -> dict:
    """The row of so many ranks, each in a process of its own: what the one takes that takes most."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--shape", arguments.shape, "--work", str(arguments.work), "--meet", folder]
        command += ["--way", way, "--ranks", str(ranks), "--steps", str(arguments.steps)]
        alone = {**os.environ, "OMP_NUM_THREADS": "1"}
        started = [[*command, "--rank", str(rank)] for rank in range(ranks)]
        processes = [subprocess.Popen(each, stdout=subprocess.PIPE, text=True, env=alone) for each in started]
        printed = [process.communicate()[0] for process in processes]
        if any(process.returncode for process in processes):
            raise SystemExit(f"{ranks} ranks, {way}: a rank failed")
    found = [json.loads(each.splitlines()[-1]) for each in printed]
    most = max(found, key=lambda each: each["measured_bytes"])
    assert all(each["coefficients"] == most["coefficients"] for each in found)
    of_steps = [[max(each) for each in zip(*of_step, strict=True)] for of_step in zip(*(x["seconds_of_steps"] for x in found))]
    seconds, computed = (median(of_step) for of_step in zip(*of_steps[1:], strict=True))
    of_slowest = {"seconds_of_steps": of_steps, "seconds_per_step": seconds, "computed_per_step": computed}
    return {"ranks": ranks, "way": way, **most, **of_slowest}


def shown(row: dict) -> str:
    """A row of the table of docs/distributed.md."""
    planned = row["plan"]["device_bytes"]
    cells = [
        str(row["ranks"]),
        row["way"],
        show_bytes(row["stores"]),
        f"{row['stores'] * row['ranks'] / row['stores_of_all']:.4f}",
    ]
    cells += [show_bytes(planned), show_bytes(row["measured_bytes"]), f"{row['measured_bytes'] / planned:.2f}"]
    by_formula = row["received_by_the_formula"]
    cells += [show_bytes(row["received_per_step"]), f"{row['received_per_step'] / by_formula:.4f}" if by_formula else ""]
    cells += [format(row[key], ".1f") for key in ("seconds_per_step", "computed_per_step")]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="300M")
    parser.add_argument("--work", type=Path, default=Path(".cache-large-models"), help="folder of the packed file")
    parser.add_argument("--worlds", default="1,2,4", help="numbers of ranks")
    parser.add_argument("--ways", default="streamed,resident", help="how they hold the model")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path, default=RESULTS / "ranks-cpu.json", help="JSON to write")
    for internal, kind in (("--rank", int), ("--ranks", int), ("--way", str), ("--meet", Path)):
        parser.add_argument(internal, type=kind, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        print(json.dumps(measure(arguments)))
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    if not packed_path(arguments).exists():
        write_packed(packed_path(arguments), shape_of(arguments), "bf16", "cpu")
    print(
        "| ranks | held | stores | of a W-th | planned | measured | of it | received | of the formula | s per step | computed |"
    )
    print(f"|---:|---|{'---:|' * 9}")
    rows = []
    for way in arguments.ways.split(","):
        for ranks in map(int, arguments.worlds.split(",")):
            rows.append(world(arguments, ranks, way))
            print(shown(rows[-1]), flush=True)
    kept = [{key: value for key, value in row.items() if key != "coefficients"} for row in rows]
    content = {"shape": arguments.shape, "experts": EXPERTS, "environment": environment("cpu"), "rows": kept}
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
