"""Which way to hold a merged model fits a memory budget: predicted from a dry run, before any work."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from samerge_ext.budget.dry_run import DryRun, dry_run
from samerge_ext.checkpoints.sealed import read_sealed_object, write_sealed
from samerge_ext.learning.config import LearningConfig
from samerge_ext.learning.nested import map_tensors
from samerge_ext.learning.passes import Logits
from samerge_ext.memory import machine_bytes, resident_bytes
from samerge_ext.merged.model import MergedModel
from samerge_ext.packing.factors import FactoredTaskVectors
from samerge_ext.packing.layout import BLOCK
from samerge_ext.packing.packed_weights import PackedWeights
from samerge_ext.packing.stores import on_host
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
    """A way to hold base, task vectors and merged model, and what it takes.

    store: where base and task vectors are: "device", "host" (pinned memory beside a GPU) or "file"; "factors" are on the
        device, and multiplied out piece by piece.
    streamed: merged unit by unit. piece: numbers that are staged at a time.
    device_bytes, host_bytes: predicted peaks; on the CPU one and the same, the whole process's resident memory.
    moved: bytes that come to the device from host memory or the file, per step.
    """

    store: str
    streamed: bool
    piece: int | None
    device_bytes: int
    host_bytes: int
    moved: int

    @property
    def name(self) -> str:
        if not self.streamed:
            return "resident"
        staged = f", {self.piece / 2**20:.3g} Mi numbers at a time" if self.piece else ""
        return f"streamed from {PLACES[self.store]}{staged}"

    def make(self, module: nn.Module, packed: PackedWeights, coefficients: float, device: torch.device) -> MergedModel:
        """The model, held this way."""
        if self.store in ("device", "host"):
            packed = packed.in_memory(device if self.store == "device" else "cpu")
        elif self.store == "factors":
            packed = packed.in_memory(device, keep_factors=True)
        store = packed.store(device=device, piece=self.piece) if self.streamed else None
        return MergedModel(module, packed, coefficients, streamed=self.streamed, store=store)


@dataclass(frozen=True)
class Plan:
    """All ways, the fastest first. available: those that need nothing but what is packed as it is."""

    ways: tuple[Way, ...]
    device: torch.device
    available: frozenset[str]

    def choose(self, budget: int | str, host_budget: int | str | None = None) -> Way:
        """The fastest way whose peaks fit: on the device and, beside a GPU, on the host, by default the memory that it has.

        Raises MemoryBudgetError where none does, ValueError for a host_budget where the model runs on the host itself.
        """
        if host_budget is not None and self.device.type == "cpu":
            raise ValueError("host_memory_budget is for a merge on a GPU; on the CPU memory_budget is for the whole process")
        limit = parse_bytes(budget)
        host_limit = machine_bytes() if host_budget is None else parse_bytes(host_budget, "host_memory_budget")
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
                "or task vectors in fewer bits (task_vector_dtype=) take less"
            )
        lines = [f"  {way.name}: {text} too much" for way, text in excess.items() if text]
        given = self._with_host(limit, host_limit)
        raise MemoryBudgetError("\n".join([f"memory_budget={given} is not enough for this merge:", *lines, advice]))

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
) -> Plan:
    """Predicts what every way to learn coefficients takes.

    Activations are those of a dry run on tensors without memory, with each task's largest batch. On the CPU a peak is that of
    the process, what it holds already included.

    packed: on any device, or in a file. batches: task -> its calibration batches. config.device: where the model will run, by
    default where packed is. teachers: their logits are kept. heads: modules by task, for what config.train_heads names.
    Raises ValueError for a GPU where torch is built without it.
    """
    device = torch.device(config.device or packed.layout.block_layer.device)
    if device.type != "cpu" and torch.accelerator.current_accelerator() is None:
        raise ValueError(f"device='{device}': torch is built without GPUs here, and cannot plan for one; install one that is not")
    largest = {task: max(held, key=_numel) for task, held in batches.items()}
    run = partial(dry_run, device=device, tasks_per_batch=config.tasks_per_batch, precision=config.precision)
    rank = config.rank if config.granularity == "rank" else 0
    loss = getattr(config, "loss", "kl") if teachers else "entropy"
    top_k = getattr(config, "teacher_top_k", None) if teachers else None
    run = partial(run, loss=loss, top_k=top_k, train_heads=config.train_heads, heads=heads, rank=rank)
    resident, streamed = (run(module, packed, largest, logits, streamed=way) for way in (False, True))
    kept = HEAD_VECTORS * resident.heads
    for task, held in batches.items() if teachers else ():
        kept += resident.answers[task] * sum(map(_numel, held)) // max(1, _numel(largest[task]))
    passes = 2 if config.sam == "paper" else 1
    # What is only described can be packed either way.
    available = {"device", "host", "factors", *(("file",) if not on_host(packed.base) or packed.base.is_meta else ())}
    ways = _ways(module, packed, device, resident, streamed, kept, passes, searched=rank > 0)
    return Plan(tuple(ways), device, frozenset(available))


def planned_way(
    module: nn.Module,
    packed: PackedWeights,
    batches: Mapping[str, Sequence[Any]],
    logits: Logits,
    config: LearningConfig,
    *,
    teachers: bool,
    heads: Mapping[str, nn.Module] | None = None,
) -> Way:
    """The way for ``config.memory_budget``. A run that continues from its checkpoint_dir goes on the way it began: another one
    would sum in another order, and end at other last digits."""
    path = Path(config.checkpoint_dir) / PLAN_FILE if config.checkpoint_dir else None
    budgets = {name: getattr(config, name) for name in ("memory_budget", "host_memory_budget")}
    if path is not None and path.exists():
        begun = read_sealed_object(path)
        if all(begun.get(name) == budget for name, budget in budgets.items()):
            return Way(**begun["way"])
    way = plan(module, packed, batches, logits, config, teachers=teachers, heads=heads).choose(*budgets.values())
    if path is not None:
        write_sealed(path, json.dumps({**budgets, "way": asdict(way)}).encode())
    return way


def _ways(
    module: nn.Module,
    packed: PackedWeights,
    device: torch.device,
    resident: DryRun,
    streamed: DryRun,
    kept: int,
    passes: int,
    searched: bool,
) -> Iterator[Way]:
    """searched: for components, whose matrices are fetched one by one and may be written into either buffer."""
    stored = packed.base.nbytes + packed.task_vectors.nbytes
    # Of a number of a product, which is multiplied out before it is in its place.
    product_bytes = packed.task_vectors.dtype.itemsize if isinstance(packed.task_vectors, FactoredTaskVectors) else 0
    factored = product_bytes > 0
    whole, numel = _whole_bytes(packed), max(1, packed.layout.numel)
    on_cpu = device.type == "cpu"
    read = packed.base.nbytes if factored else whole  # of a file, in a pass
    # On the CPU the process's memory counts: what it holds, without the module's weights, which make room.
    freed = sum(p.nbytes for p in {id(p): p for p in module.parameters()}.values() if p.device.type == "cpu")
    packed_already = sum(numbers.nbytes for numbers in (packed.base, packed.task_vectors) if _on_the_host(numbers))
    held = resident_bytes() - freed + OVERHEAD - packed_already

    def way(store: str, is_streamed: bool, peak: int, piece: int | None = None, moved: int = 0) -> Way:
        buffers = 2 * (piece or 0)
        if piece is not None and on_cpu and not searched:
            buffers = written_of_buffers(streamed.fetched, piece)
        staged = -(-buffers * whole // numel)
        staged += (piece or 0) * product_bytes
        there = {"device": whole, "factors": stored, "file": packed.task_vectors.nbytes if factored else 0}.get(store, 0)
        on_device = peak + kept + staged + there + (held if on_cpu else 0)
        between = staged if store == "file" and not on_cpu else 0
        on_host_too = on_device if on_cpu else held + between + (stored if store == "host" else 0)
        return Way(store, is_streamed, piece, on_device, on_host_too, moved)

    stores = ("factors", "file") if factored else ("file",) if on_cpu else ("host", "file")
    yield way("device", False, resident.peak)
    yield way("device", True, streamed.peak)
    for store in stores:
        for piece in _pieces(max((length for _, length, _ in streamed.fetched), default=BLOCK)):
            numbers = sum(length * (1 + (again and length > piece)) for _, length, again in streamed.fetched)
            yield way(store, True, streamed.peak, piece, 0 if store == "factors" else passes * numbers * read // numel)


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


def _on_the_host(numbers: Any) -> bool:
    """Whether they are in this process's memory already: tensors, or LoRA factors."""
    return numbers.device.type == "cpu" and (isinstance(numbers, FactoredTaskVectors) or on_host(numbers))


def _whole_bytes(packed: PackedWeights) -> int:
    """Of base and task vectors where they are whole."""
    task_vectors = packed.task_vectors
    if isinstance(task_vectors, FactoredTaskVectors):
        return packed.base.nbytes + task_vectors.shape.numel() * task_vectors.dtype.itemsize
    return packed.base.nbytes + task_vectors.nbytes


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
