"""A recipe by the processes that torchrun starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from samerge_ext.elementwise.ranks import Rank
from samerge_ext.packing.packed_weights import PackedWeights
from samerge_ext.packing.ranks import ALONE, Ranks
from samerge_ext.packing.stores import known_device

# For which ranks wait for each other: as long as the first one may pack alone. A rank that ends is noticed at once.
TIMEOUT = 2 * 3600.0  # seconds


@contextmanager
def ranks_of_torchrun(device: str | None, timeout: float | None = None) -> Iterator[Ranks]:
    """The processes that torchrun started, joined while the block runs; this one alone where it started none.

    device: of the recipe; "cuda" is a GPU of its own for every process. timeout: seconds that they wait for each other, two hours
    by default. Raises ValueError for one GPU of all of them, and for a timeout that is none, or of one process.
    """
    if timeout is not None and timeout <= 0:
        raise ValueError(f"timeout={timeout}; expected a number of seconds > 0")
    if not dist.is_torchelastic_launched():
        if timeout is not None:
            raise ValueError(f"timeout={timeout:g}: one process waits for no other; leave it out, or start several by torchrun")
        yield ALONE
        return
    on = known_device(device or "cpu")
    if on.index is not None and on.type == "cuda":
        raise ValueError(f"device={device!r} is one GPU for all ranks; give cuda, and every rank takes one of its own")
    if on.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout or TIMEOUT))
    yield Ranks.of(None, on)
    dist.destroy_process_group()  # after an error the process ends, and others may never come


def rank_of_torchrun() -> Rank:
    """Which of torchrun's processes this is, for methods that go from file to file, whose ranks need no group; alone where
    torchrun started none."""
    return Rank(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if dist.is_torchelastic_launched() else Rank()


def share_of_folders(
    base: str | Path, experts: list[tuple[str, Path]], file: Path, ranks: Ranks, device: str | None, **packing: Any
) -> PackedWeights:
    """This rank's share of model folders, for ``device``. The first rank packs them into ``file``, unless that is there already,
    and all read their own part of it; LoRA factors, where these are kept, are every rank's."""
    device = device or "cpu"
    if ranks.is_first:
        PackedWeights.from_folders(base, experts, file=file, **packing)
    ranks.wait()
    packed = replace(PackedWeights.open(file, device=device, verify=False), conversion=packing["conversion"])
    return packed.shard(ranks.group)
