"""Random plans, kills and attacks: every merge stays within its memory budget or is refused, whatever is killed continues to the
same numbers, also by ranks (`killed_ranks`), whatever is attacked (`attacks`) ends in the same bytes or tells what to do, and
many merges leave nothing behind.

    python tests/support/soak.py --plans 200 --kills 100 --killed-ranks 20 --rounds 100 --merges 500        # make soak
"""

import argparse
import copy
import gc
import os
import random
import shutil
import signal
import tempfile
import time
import traceback
from pathlib import Path

import attacks
import killed_ranks
import streaming
import torch
from safetensors.torch import save_file
from streaming import Model, logits

import samerge_ext as sm
from samerge_ext.budget.plan import MemoryBudgetError, plan
from samerge_ext.memory import PeakMemory, resident_bytes, trim_heap
from samerge_ext.packing.quantised import FORMATS

# λ of two ways to hold a model, relative: sums in another order, over steps that amplify it.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
FLAT = 32 << 20  # bytes by which a process may grow over hundreds of merges: a kept copy of the models would be more


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
        file = Path(folder) / "packed" if draw.random() < 0.7 else None
        of_components = draw.choice([{}, {"granularity": "rank", "rank": 8}])
        expected = merge(module, sm.PackedWeights.from_folders(*folders, **settings), batches, **of_components)
        packed = sm.PackedWeights.from_folders(*folders, **settings, file=file)
        ways = plan(module, packed, batches, logits, sm.SAMergingConfig(**of_components)).ways
        budget = int(draw.choice(ways).device_bytes * draw.uniform(0.97, 1.1))
        with PeakMemory() as peak:
            before = resident_bytes()
            try:
                found = merge(module, packed, batches, memory_budget=budget, **of_components)
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
        of_components = {"granularity": "rank", "rank": 3}
        ways = [{"streamed": True}, {"streamed": False}, {"memory_budget": "100GB"}, {"streamed": True, **of_components}]
        held = draw.choice(ways)

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


def many_rounds(rounds: int, seconds: float | None = None, seed: int = 0, kind=None) -> None:
    """So many rounds of all attacks from this seed on, and no further one after so many seconds."""
    started = time.monotonic()
    for number in range(seed, seed + rounds):
        print(f"round {number}: {'; '.join(attacks.one_round(number, kind))}", flush=True)
        if seconds is not None and time.monotonic() - started > seconds:
            return


def added_by(merges: int) -> tuple[int, ...]:
    """Bytes of memory, files and threads that so many merges, some of them learned, add after the first fifth of them."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as other:
        data_free = attacks.DataFree(random.Random(0), Path(folder))
        module, batches = streaming.make(1, blocks=1), streaming.make_batches()

        def held() -> tuple[int, ...]:
            gc.collect()
            trim_heap()  # what threads that ended have freed is kept by the allocator, tens of MiB of it
            return (resident_bytes(), len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")))

        for number in range(merges):
            if number == merges // 5:
                before = held()
            out = Path(folder) / "out"
            if number % 25 in (4, 9):
                in_memory, in_file = streaming.packed_twice(Path(other), streaming.make(blocks=1))
                merge(module, in_file if number % 2 else in_memory, batches, streamed=number % 2 == 1)
                del in_memory, in_file
            else:
                data_free.method = ("arithmetic", "ties", "whole", "dare")[number % 4]
                data_free(out)
                shutil.rmtree(out)
        return tuple(end - begin for begin, end in zip(before, held(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seconds", type=float, help="after which no further round of attacks begins")
    parser.add_argument("--merges", type=int, default=500, help="in one process, whose memory stays flat")
    parser.add_argument("--plans", type=int, default=200)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--killed-ranks", type=int, default=20, help="kills of ranks that learn, and of those that merge files")
    arguments = parser.parse_args()
    many_rounds(arguments.rounds, arguments.seconds)
    many_kills(arguments.kills)
    for kind in killed_ranks.KINDS if arguments.killed_ranks else ():
        killed_ranks.many_kills(kind, arguments.killed_ranks)
    if arguments.merges:
        added, files, threads = added_by(arguments.merges)
        print(f"{arguments.merges} merges: {added / 2**20:.1f} MiB, {files} files, {threads} threads more than after a fifth")
        assert added < FLAT and max(files, threads) <= 0
    outcomes = []
    for seed in range(arguments.plans):
        outcomes.append(one_plan(seed))
        print(f"plan {seed}: {outcomes[-1]}", flush=True)
    print({outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))}, f"{arguments.kills} kills")


if __name__ == "__main__":
    main()
