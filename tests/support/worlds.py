"""Worlds of a few ranks: processes that torch.distributed joins on the CPU, meeting in a file."""

import time
from datetime import timedelta
from pathlib import Path

import processes
import torch
import torch.distributed as dist

SECONDS = 300  # within which a world is done, and which a rank waits for the others


def run(function, size: int, folder: Path, *arguments) -> list:
    """What ``function(*arguments)`` returns on every rank of a new world; raises RuntimeError where one ends without."""
    processes_of_ranks = begin(function, size, folder, *arguments)
    end(processes_of_ranks)
    codes = [process.exitcode for process in processes_of_ranks]
    if any(codes):
        raise RuntimeError(f"the ranks ended with {codes}")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(size)]


def begin(function, size: int, folder: Path, *arguments) -> list:
    folder.mkdir(parents=True)
    return [processes.start(_member, function, rank, size, folder, arguments) for rank in range(size)]


def end(started: list) -> None:
    """Waits for all of them, and kills what is left after `SECONDS`."""
    until = time.monotonic() + SECONDS
    for process in started:
        process.join(max(0.0, until - time.monotonic()))
    for process in started:
        if process.is_alive():
            process.kill()
            process.join()


def _member(function, rank: int, size: int, folder: Path, arguments) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=SECONDS))
    try:
        torch.save(function(*arguments), folder / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()
