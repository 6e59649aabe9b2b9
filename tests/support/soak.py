"""Random plans and random kills: every merge stays within its memory budget or is refused, and whatever is killed continues to
the same numbers.

    python tests/support/soak.py --plans 200 --kills 100        # make soak
"""

import argparse
import copy
import os
import random
import signal
import tempfile
import time
import traceback
from pathlib import Path

import torch
from safetensors.torch import save_file
from streaming import Model, logits

import samerge_ext as sm
from samerge_ext.budget.plan import MemoryBudgetError, plan
from samerge_ext.memory import PeakMemory, resident_bytes
from samerge_ext.packing.quantised import FORMATS

# λ of two ways to hold a model, relative: sums in another order, over steps that amplify it.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}


def problem(seed: int, folder: Path):
    """Random model, experts in folders, calibration and dtypes."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    width, blocks = draw.choice([16, 64, 256]), draw.randint(1, 6)
    dtype = draw.choice([torch.float64, torch.float32])
    base = Model(width, blocks).to(dtype).eval()
    tasks = [f"task{t}" for t in range(draw.randint(1, 5))]
    save(base, folder / "base.safetensors")
    for task in tasks:
        expert = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter += 0.3 / width**0.5 * torch.randn_like(parameter)
        save(expert, folder / f"{task}.safetensors")
    settings = {"dtype": dtype}
    if dtype == torch.float32 and draw.random() < 0.5:
        settings["task_vector_dtype"] = draw.choice([torch.bfloat16, torch.float16, *FORMATS])
    batches = {t: [torch.randint(37, (draw.randint(1, 64), 5)) for _ in range(draw.randint(1, 3))] for t in tasks}
    module = Model(width, blocks).to(dtype).eval()
    experts = {task: folder / f"{task}.safetensors" for task in tasks}
    return draw, module, (folder / "base.safetensors", experts), settings, batches


def save(module, path: Path) -> None:
    save_file({n: t.clone() for n, t in module.state_dict().items() if n != "head.weight"}, path)


def merge(module, packed, batches, **settings):
    config = sm.SAMergingConfig(progress=False, steps=3, learning_rate=1e-3, **settings)
    return sm.samerging(copy.deepcopy(module), packed, batches, logits, config=config).coefficients


def one_plan(seed: int) -> str:
    """A merge under a random budget; says what came of it."""
    with tempfile.TemporaryDirectory() as folder:
        draw, module, folders, settings, batches = problem(seed, Path(folder))
        expected = merge(module, sm.PackedWeights.from_folders(*folders, **settings), batches)
        file = Path(folder) / "packed" if draw.random() < 0.7 else None
        packed = sm.PackedWeights.from_folders(*folders, **settings, file=file)
        ways = plan(module, packed, batches, logits, sm.SAMergingConfig()).ways
        budget = int(draw.choice(ways).device_bytes * draw.uniform(0.97, 1.1))
        with PeakMemory() as peak:
            before = resident_bytes()
            try:
                found = merge(module, packed, batches, memory_budget=budget)
            except MemoryBudgetError:
                return "refused"
        assert before + peak.rise <= budget, f"seed {seed}: {before + peak.rise} bytes, the budget was {budget}"
        error = ((found - expected).norm() / expected.norm()).item()
        assert error <= TOLERANCE[settings["dtype"]], f"seed {seed}: λ differs by {error}"
        return "ran"


def one_run_with_kills(seed: int, kills: int) -> int:
    """A merge in a process that is killed again and again; returns how often. Its λ must be that of a quiet run, bit by bit."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        draw, module, folders, settings, batches = problem(seed, folder)
        held = draw.choice([{"streamed": True}, {"streamed": False}, {"memory_budget": "100GB"}])

        def run(name: str) -> None:
            packed = sm.PackedWeights.from_folders(*folders, **settings, file=folder / f"{name}.packed")
            found = merge(module, packed, batches, checkpoint_dir=folder / name, checkpoint_every=1, **held)
            torch.save(found, folder / f"{name}.partial")
            os.replace(folder / f"{name}.partial", folder / f"{name}.pt")

        started = time.monotonic()
        assert in_a_process(run, "quiet") == 0
        seconds = time.monotonic() - started
        done = 0
        while done < kills and not (folder / "killed.pt").exists():
            done += in_a_process(run, "killed", draw.uniform(0, seconds)) == -signal.SIGKILL
        assert (folder / "killed.pt").exists() or in_a_process(run, "killed") == 0
        assert torch.equal(torch.load(folder / "killed.pt"), torch.load(folder / "quiet.pt")), f"seed {seed}"
        return done


def in_a_process(function, argument, seconds: float | None = None) -> int:
    """Runs it in a fork, killed after so many seconds; returns its exit code, or minus the signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function(argument)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)  # no harm where it has ended: it is not waited for yet
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def many_kills(kills: int, seed: int = 0) -> None:
    """So many, in runs from this seed on; in a process that has made no backward pass, which a fork may not follow."""
    torch.set_num_threads(1)  # a fork has no other threads
    done = 0
    while done < kills:
        done += one_run_with_kills(seed, min(8, kills - done))
        seed += 1
        print(f"{done} kills; runs continued to the same bits up to seed {seed - 1}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--plans", type=int, default=200)
    parser.add_argument("--kills", type=int, default=100)
    arguments = parser.parse_args()
    many_kills(arguments.kills)
    outcomes = []
    for seed in range(arguments.plans):
        outcomes.append(one_plan(seed))
        print(f"plan {seed}: {outcomes[-1]}", flush=True)
    print({outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))}, f"{arguments.kills} kills")


if __name__ == "__main__":
    main()
