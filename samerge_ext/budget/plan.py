"""Which way to hold a merged model fits a memory budget: predicted from a dry run, before any work."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from socket import gethostname
from typing import Any

import torch
from torch import nn

from samerge_ext.budget.dry_run import DryRun, dry_run
from samerge_ext.budget.rehearsed_ranks import RehearsedRanks
from samerge_ext.learning.config import LearningConfig
from samerge_ext.learning.loop import check_spread
from samerge_ext.learning.nested import map_tensors
from samerge_ext.learning.passes import Logits
from samerge_ext.learning.turns import part_of_batch
from samerge_ext.memory import machine_bytes, resident_bytes
from samerge_ext.merged.model import MergedModel
from samerge_ext.packing.factors import LORA
from samerge_ext.packing.layout import BLOCK
from samerge_ext.packing.packed_weights import PackedWeights
from samerge_ext.packing.ranks import Ranks
from samerge_ext.packing.shards import Shards, Spread, own
from samerge_ext.packing.stores import empty_like, on_host
from samerge_ext.sizes import parse_bytes, show_bytes

PLAN_FILE = "plan.json"  # in a run's checkpoint_dir
SMALLEST_PIECE = 1 << 18  # numbers; below, reading a piece costs more than its bytes
# What the process takes beyond tensors once the model has run: libraries' workspaces, memory that the allocator keeps.
OVERHEAD = 96 << 20

# Vectors [H] that learning heads takes beyond their gradients, as measured: what they were, are and were at best, the optimiser's
# two, and either those of a SAM step or what is being saved.
HEAD_VECTORS = 18

PLACES = {"device": "memory", "host": "host memory", "file": "a packed file", "factors": "LoRA factors"}


class MemoryBudgetError(ValueError):
    """No way to hold the merged model fits the budget. The message says what would."""


@dataclass(frozen=True)
class Way:
    """A way to hold base, task vectors and merged model, and what it takes; of several ranks what the one takes that takes most.

    store: where base and task vectors are: "device", "host" (pinned memory beside a GPU) or "file"; "factors" are on the
        device, and multiplied out piece by piece.
    streamed: merged unit by unit. piece: numbers that are staged at a time.
    device_bytes, host_bytes: predicted peaks; on the CPU one and the same, the whole process's resident memory.
    moved: bytes that come to the device from host memory or the file, per step.
    received: bytes that come to a rank from the others, per step.
    """

    store: str
    streamed: bool
    piece: int | None
    device_bytes: int
    host_bytes: int
    moved: int
    received: int = 0

    @property
    def name(self) -> str:
        if not self.streamed:
            return "resident"
        staged = f", {self.piece / 2**20:.3g} Mi numbers at a time" if self.piece else ""
        return f"streamed from {PLACES[self.store]}{staged}"

    def make(self, module: nn.Module, packed: PackedWeights, coefficients: float, device: torch.device) -> MergedModel:
        """The model, held this way."""
        if self.store == "host" and isinstance(packed.task_vectors, Spread):
            base: Any = packed.base
            packed = replace(packed, base=base.on_host(), task_vectors=packed.task_vectors.on_host())
        elif self.store in ("device", "host"):
            packed = packed.in_memory(device if self.store == "device" else "cpu")
        elif self.store == "factors":
            packed = packed.in_memory(device, keep_factors=True)
        store = packed.store(device=device, piece=self.piece) if self.streamed else None
        return MergedModel(module, packed, coefficients, streamed=self.streamed, store=store)


@dataclass(frozen=True)
class Plan:
    """All ways, the fastest first. available: those that need nothing but what is packed as it is.

    ranks, nodes: over how many processes weights are spread, on how many machines, each of which has as many. of_host: what a
    process has of its machine's memory, by default all of it.
    """

    ways: tuple[Way, ...]
    device: torch.device
    available: frozenset[str]
    ranks: int = 1
    nodes: int = 1
    of_host: int | None = None

    def choose(self, budget: int | str, host_budget: int | str | None = None) -> Way:
        """The fastest way whose peaks fit: on the device and, beside a GPU, on the host, by default the memory that it has.

        Raises MemoryBudgetError where none does, ValueError for a host_budget where the model runs on the host itself.
        """
        if host_budget is not None and self.device.type == "cpu":
            raise ValueError("host_memory_budget is for a merge on a GPU; on the CPU memory_budget is for the whole process")
        limit = parse_bytes(budget)
        of_host = machine_bytes() if self.of_host is None else self.of_host
        host_limit = of_host if host_budget is None else parse_bytes(host_budget, "host_memory_budget")
        excess = {way: self._excess(way, limit, host_limit) for way in self.ways}
        fitting = [way for way in self.ways if not excess[way]]
        chosen = next((way for way in fitting if way.store in self.available), None)
        if chosen is not None:
            return chosen
        if fitting:
            advice = f"{fitting[0].name} would: keep the weights in a packed file, PackedWeights.from_folders(..., file=PATH)"
        else:
            least = min(self.ways, key=lambda way: (way.device_bytes, way.host_bytes))
            advice = (
                f"the least is {self._with_host(least.device_bytes, least.host_bytes)}; smaller batches, fewer tasks_per_batch, "
                f"{'more ranks, ' if self.ranks > 1 else ''}or task vectors in fewer bits (task_vector_dtype=) take less"
            )
        lines = [f"  {way.name}: {text} too much" for way, text in excess.items() if text]
        given = self._with_host(limit, host_limit)
        merge = f"a rank of this merge by {self.ranks}" if self.ranks > 1 else "this merge"
        raise MemoryBudgetError("\n".join([f"memory_budget={given} is not enough for {merge}:", *lines, advice]))

    def from_other_nodes(self, way: Way) -> int:
        """Of the bytes that come to a rank, those that come from other machines: every rank sends as many."""
        return way.received * (self.ranks - self.ranks // self.nodes) // max(1, self.ranks - 1)

    def _with_host(self, on_device: int, on_host: int) -> str:
        device = show_bytes(on_device)
        return device if self.device.type == "cpu" else f"{device} with {show_bytes(on_host)} on the host"

    def _excess(self, way: Way, limit: int, host_limit: int) -> str:
        """What a way takes, and by how much it misses; empty where it fits."""
        if way.device_bytes > limit:
            return f"{show_bytes(way.device_bytes)}, {show_bytes(way.device_bytes - limit)}"
        if self.device.type != "cpu" and way.host_bytes > host_limit:
            return f"{show_bytes(way.host_bytes)} of the host's memory, {show_bytes(way.host_bytes - host_limit)}"
        return ""


def plan(
    module: nn.Module,
    packed: PackedWeights,
    batches: Mapping[str, Sequence[Any]],
    logits: Logits,
    config: LearningConfig,
    *,
    teachers: bool = True,
    heads: Mapping[str, nn.Module] | None = None,
    ranks: int = 1,
    nodes: int = 1,
) -> Plan:
    """Predicts what every way to learn coefficients takes.

    Activations are those of a dry run on tensors without memory, with each task's largest batch. On the CPU a peak is that of
    the process, what it holds already included.

    packed: on any device, or in a file. batches: task -> its calibration batches. config.device: where the model will run, by
    default where packed is. teachers: their logits are kept. heads: modules by task, for what config.train_heads names.
    ranks, nodes: by how many processes on how many machines, where ``packed`` is what they would shard(). Of a share they are
        known, and all ranks call this: they plan alike, for the one that takes most.
    Raises ValueError for a GPU where torch is built without it, for ranks that are not as many on every node, and for
        settings that are not learned by ranks.
    """
    device = torch.device(config.device or packed.layout.block_layer.device)
    if device.type != "cpu" and torch.accelerator.current_accelerator() is None:
        raise ValueError(f"device='{device}': torch is built without GPUs here, and cannot plan for one; install one that is not")
    check_nodes(ranks, nodes)
    is_spread, size = packed.shards is not None or ranks > 1, max(ranks, packed.ranks.size)
    if is_spread:
        check_spread(config)
        batches = {
            task: [part_of_batch(batch, row, packed.num_tasks, Ranks(None, row, size))[0] for batch in batches[task]]
            for row, task in enumerate(packed.tasks)
        }
    largest = {task: max(held, key=_numel) for task, held in batches.items()}
    run = partial(dry_run, device=device, tasks_per_batch=config.tasks_per_batch, precision=config.precision)
    rank = config.rank if config.granularity == "rank" else 0
    loss = getattr(config, "loss", "kl") if teachers else "entropy"
    top_k = getattr(config, "teacher_top_k", None) if teachers else None
    run = partial(run, loss=loss, top_k=top_k, train_heads=config.train_heads, heads=heads, rank=rank)
    # Ranks beyond the last task run as much as others do, or less.
    members = [RehearsedRanks(None, number, size) for number in range(min(size, packed.num_tasks))] if is_spread else [None]
    runs = [[run(module, packed, largest, logits, streamed=way, member=member) for way in (False, True)] for member in members]
    kept = 0
    for dry, _ in runs:
        answers = (dry.answers[task] * sum(map(_numel, batches[task])) // max(1, _numel(largest[task])) for task in dry.answers)
        kept = max(kept, HEAD_VECTORS * dry.heads + (sum(answers) if teachers else 0))
    resident, streamed = map(_most, zip(*runs, strict=True))
    numel = packed.layout.numel if members[0] is None else Shards(packed.layout, members[0]).numel
    passes = 2 if config.sam == "paper" else 1
    # What is only described can be packed either way.
    held, base = _held(module, packed, device), own(packed.base)
    available = {"device", "host", "factors", *(("file",) if not on_host(base) or base.is_meta else ())}
    of_host = None if size == 1 else machine_bytes() * nodes // ranks
    if packed.shards is not None:
        held, of_host = _agreed(packed.ranks, packed.layout.block_layer.device, held)
    ways = _ways(packed, numel, device, resident, streamed, kept, held, passes, searched=rank > 0)
    return Plan(tuple(ways), device, frozenset(available), size, nodes, of_host)


def check_nodes(ranks: int, nodes: int) -> None:
    """Raises ValueError for ranks that are not as many on every node."""
    if not 1 <= nodes <= ranks or ranks % nodes:
        raise ValueError(f"{ranks} ranks on {nodes} nodes: every node has as many; give a multiple of the nodes as ranks")


def _most(runs: Sequence[DryRun]) -> DryRun:
    """What the rank takes that takes most."""
    fetched = max((run.fetched for run in runs), key=lambda fetched: max((length for _, length, _ in fetched), default=0))
    peak, heads, received = (max(getattr(run, name) for run in runs) for name in ("peak", "heads", "received"))
    return DryRun(peak=peak, heads=heads, fetched=fetched, received=received)


def _held(module: nn.Module, packed: PackedWeights, device: torch.device) -> int:
    """What this process holds, without the module's weights, which make room, and without base and task vectors."""
    of_module = {id(p): p for p in module.parameters() if p.device.type == "cpu"}.values()
    # A view of a flat tensor frees nothing, nor does what stands for a parameter of a streamed model.
    freed = sum(p.nbytes for p in of_module if p.untyped_storage().nbytes() == p.nbytes)
    base, task_vectors = own(packed.base), own(packed.task_vectors)
    return resident_bytes() - freed + OVERHEAD - sum(each.nbytes for each in (base, task_vectors) if _is_on_the_host(each))


def _agreed(ranks: Ranks, device: torch.device, held: int) -> tuple[int, int]:
    """The most that a rank holds already, and the least that one has of its machine's memory beside the others there."""
    known = torch.tensor([held, machine_bytes(), zlib.crc32(gethostname().encode())], device=device)
    of_ranks = ranks.gather(known)().tolist()
    machines = [machine for _, _, machine in of_ranks]
    return max(each[0] for each in of_ranks), min(memory // machines.count(machine) for _, memory, machine in of_ranks)


def _ways(
    packed: PackedWeights,
    numel: int,
    device: torch.device,
    resident: DryRun,
    streamed: DryRun,
    kept: int,
    held: int,
    passes: int,
    searched: bool,
) -> Iterator[Way]:
    """numel: of the base, or of a rank's own of it. held: see `_held`.
    searched: for components, whose matrices are fetched one by one and may be written into either buffer."""
    task_vectors = own(packed.task_vectors)
    factored = packed.task_vector_form == LORA and not on_host(task_vectors)
    # Of a number of a product, which is multiplied out before it is in its place.
    product_bytes = getattr(packed.task_vectors, "dtype", torch.float32).itemsize if factored else 0
    of_base = empty_like(own(packed.base), numel, "meta").nbytes
    whole = of_base + empty_like(task_vectors, numel, "meta").nbytes
    stored = of_base + task_vectors.nbytes if factored else whole
    read = of_base if factored else whole  # of a file, in a pass
    on_cpu = device.type == "cpu"

    def way(store: str, run: DryRun, piece: int | None = None, moved: int = 0) -> Way:
        buffers = 2 * (piece or 0)
        if piece is not None and on_cpu and not searched:
            buffers = written_of_buffers(streamed.fetched, piece)
        staged = -(-buffers * whole // max(1, numel))
        staged += (piece or 0) * product_bytes
        there = {"device": whole, "factors": stored, "file": stored - of_base if factored else 0}.get(store, 0)
        # On the CPU the process's memory counts.
        on_device = run.peak + kept + staged + there + (held if on_cpu else 0)
        between = staged if store == "file" and not on_cpu else 0
        on_host_too = on_device if on_cpu else held + between + (stored if store == "host" else 0)
        return Way(store, run is streamed, piece, on_device, on_host_too, moved, passes * run.received)

    stores = ("factors", "file") if factored else ("file",) if on_cpu else ("host", "file")
    yield way("device", resident)
    yield way("device", streamed)
    for store in stores:
        for piece in _pieces(max((length for _, length, _ in streamed.fetched), default=BLOCK)):
            numbers = sum(length * (1 + (again and length > piece)) for _, length, again in streamed.fetched)
            yield way(store, streamed, piece, 0 if store == "factors" else passes * numbers * read // max(1, numel))


def written_of_buffers(fetched: Sequence[Sequence[int]], piece: int) -> int:
    """Numbers of the two buffers that are ever written: in the process's memory nothing else counts.

    Runs go into one and the other in turn, and whole ones are the same in every pass: where there are evenly many, those of one
    buffer may all be short.
    """
    lengths = [length for _, length, _ in fetched]
    if len(fetched) > 1 and fetched[-1][:2] == fetched[0][:2]:
        lengths.pop()  # it is still there when the next pass begins
    if piece < max(lengths, default=0) or len(lengths) % 2:
        return 2 * piece
    return sum(max(lengths[slot::2], default=0) for slot in (0, 1))


def _is_on_the_host(numbers: Any) -> bool:
    """Whether they are in this process's memory: tensors, or LoRA factors."""
    return numbers.device.type == "cpu" and (on_host(numbers) or numbers.form == LORA)


def _pieces(largest: int) -> Iterator[int]:
    """Whole units, then halves as long as that pays."""
    while True:
        yield largest
        if largest // 2 < SMALLEST_PIECE:
            return
        largest = -(-largest // 2 // BLOCK) * BLOCK


def _numel(batch: Any) -> int:
    sizes: list[int] = []
    map_tensors(lambda tensor: sizes.append(tensor.numel()), batch)
    return sum(sizes)
