"""Whether a recipe will go, what it finds in the models, and what it will take: from headers and texts, before any work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from samerge_ext.budget.plan import Plan, check_nodes
from samerge_ext.checkpoints.saving import free_bytes, require_apart, require_space, require_target
from samerge_ext.elementwise.opening import opened
from samerge_ext.elementwise.ranks import held_by
from samerge_ext.elementwise.record import RECORD
from samerge_ext.learning.loop import calibration_set
from samerge_ext.memory import machine_bytes, resident_bytes
from samerge_ext.packing.stores import check_device
from samerge_ext.recipes.parameters import METHODS
from samerge_ext.recipes.recipe import Recipe
from samerge_ext.recipes.run import (
    DTYPES,
    described_weights,
    file_merge_of,
    inputs_of,
    model_and_calibration,
    plan_weights,
    require_spread,
    state_of,
)
from samerge_ext.recipes.tokenizers import companions_of
from samerge_ext.reports.inputs import weight_files
from samerge_ext.sizes import show_bytes

MOST_NAMES = 8  # of tensors, in a line


@dataclass
class Findings:
    """What a merge would find and take. Sizes are in bytes.

    models: name, path and size of the base and what is merged. numbers: of the merged tensors. written_as: dtypes.
    reads, buffers, threads: of a merge from file to file; memory: its peak, without what its method holds of single tensors.
    batches, ways, chosen: of a learned merge, those of every task, the memory of every way to hold the model, and which fits
        the budget. free: on the disk of the folder that is written.
    ranks, nodes: where several processes merge, how many on how many machines; memory is then what each of them takes, and
        writes_of_rank what the one writes of a merge from file to file that writes most.
    """

    merge_method: str
    models: list[dict[str, Any]]
    tensors: int
    numbers: int
    written_as: list[str]
    writes: int
    kept_per_task: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    free: int | None = None
    reads: int | None = None
    memory: int | None = None
    buffers: int | None = None
    threads: int | None = None
    batches: dict[str, int] = field(default_factory=dict)
    ways: list[dict[str, Any]] = field(default_factory=list)
    chosen: str | None = None
    memory_budget: int | str | None = None
    ranks: int | None = None
    nodes: int | None = None
    writes_of_rank: int | None = None

    def known(self) -> dict[str, Any]:
        """What there is of it, as JSON has it."""
        return {key: value for key, value in asdict(self).items() if value is not None and value != [] and value != {}}

    def lines(self) -> Iterator[str]:
        """In words."""
        merged = [model for model in self.models if model["role"] != "base"]
        yield f"{self.merge_method} of {len(merged)} models:"
        width = max(len(model["name"]) for model in self.models)
        for model in self.models:
            yield f"  {model['name']:{width}}  {model['path']}  {show_bytes(model['bytes'])}"
        yield f"merged: {self.tensors} tensors, {self.numbers:,} numbers, written as {', '.join(self.written_as)}"
        yield from _names("kept per task", self.kept_per_task)
        yield from _names("kept as they are", self.kept)
        for task, count in self.batches.items():
            yield f"learns from {task}: {count} batches"
        writes = f"writes {show_bytes(self.writes)}"
        free = "" if self.free is None else f", of {show_bytes(self.free)} that are free there"
        yield writes + free if self.reads is None else f"reads {show_bytes(self.reads)}, {writes}{free}"
        if self.writes_of_rank is not None:
            yield f"by {self.ranks} ranks, each of which writes up to {show_bytes(self.writes_of_rank)}"
        if self.memory is not None and self.buffers is not None:
            yield (
                f"memory: {show_bytes(self.memory)}, of which {show_bytes(self.buffers)} are buffers of {self.threads} threads, "
                f"and what {self.merge_method} holds of single tensors"
            )
        if self.ways and self.ranks is None:
            yield f"memory, of the {show_bytes(machine_bytes())} of this machine:"
        elif self.ways:
            on = f" on {self.nodes} nodes" if self.nodes and self.nodes > 1 else ""
            yield f"memory of each of {self.ranks} ranks{on}, where this machine has {show_bytes(machine_bytes())}:"
        for way in self.ways:
            moved = f", {show_bytes(way['read_per_step'])} read per step" if way["read_per_step"] else ""
            if way.get("received_per_step"):
                moved += f", {show_bytes(way['received_per_step'])} received per step"
            if way.get("from_other_nodes"):
                moved += f", {show_bytes(way['from_other_nodes'])} of it from other nodes"
            beside = f" of the GPU, {show_bytes(way['host'])} of the host" if "host" in way else ""
            mark = "*" if way["name"] == self.chosen else " "
            yield f"{mark} {way['name']}: {show_bytes(way['memory'])}{beside}{moved}"
        if self.chosen is not None:
            yield f"* the fastest within {self.memory_budget}"


def check_recipe(recipe: Recipe, out: Path | None = None, *, overwrite: bool = False, ranks: int = 1, nodes: int = 1) -> Findings:
    """What a merge would find and take. out: the folder that it would write; its place and space are then checked, too.
    ranks, nodes: of how many processes on how many machines; nothing of the others is looked at.

    Raises what `run_recipe` would before it begins. Numbers are not read: NaN and Inf show when they are merged.
    """
    check_nodes(ranks, nodes)
    with recipe.named():
        check_device(recipe.parameters.get("device"))
        if out is not None:
            require_apart(out, inputs_of(recipe))
            if not (state_of(out) / RECORD).exists():
                require_target(out, overwrite=overwrite)
        is_of_files = recipe.merge_method in METHODS
        found = _of_files(recipe, out, ranks) if is_of_files else _of_learned(recipe, ranks, nodes)
        if ranks > 1:
            found.ranks, found.nodes = ranks, nodes
        if out is not None:
            require_space(out, found.writes)
            found.free = free_bytes(out)
        return found


def _of_files(recipe: Recipe, out: Path | None, ranks: int) -> Findings:
    with opened(file_merge_of(recipe)) as models:
        if out is not None:
            require_apart(out, models.files)
        plan = models.plan
        buffers = plan.buffer_bytes(models.device)
        return Findings(
            recipe.merge_method,
            _models(recipe),
            len(plan.layers),
            sum(plan.names.shape(name).numel() for name in plan.layers),
            _dtypes(plan.written_dtype(name) for name in plan.layers),
            sum(shard.total_bytes for shard in plan.shards),
            list(plan.heads),
            list(plan.kept),
            reads=sum(file.stat().st_size for file in models.files),
            memory=resident_bytes() + buffers,
            buffers=buffers,
            threads=plan.workers(models.device),
            writes_of_rank=None if ranks == 1 else max(held_by(plan.shards, ranks)),
        )


def _of_learned(recipe: Recipe, ranks: int, nodes: int) -> Findings:
    if ranks > 1:
        require_spread(recipe)
    companions_of(recipe).check()
    settings, dtype = recipe.method_settings(), DTYPES[recipe.dtype]
    model, calibration = model_and_calibration(recipe)
    packed = described_weights(recipe, model)
    calibration_set(calibration, packed, settings)  # may refuse
    sizes = [(s.numel(), dtype or of_base) for s, of_base in zip(packed.layout.shapes, packed.layout.dtypes, strict=True)]
    writes = sum(numbers * to.itemsize for numbers, to in sizes)
    plan, budget = plan_weights(recipe, model, calibration, packed, ranks, nodes), settings.memory_budget
    chosen = plan.choose(budget, settings.host_memory_budget) if budget is not None else None
    if ranks > 1 or (chosen is not None and chosen.store == "file"):
        writes += packed.base.nbytes + packed.task_vectors.nbytes
    return Findings(
        recipe.merge_method,
        _models(recipe),
        len(sizes),
        sum(numbers for numbers, _ in sizes),
        _dtypes(to for _, to in sizes),
        writes,
        list(dict.fromkeys(name for head in packed.heads.values() for name in head)),
        batches={task: len(batches) for task, batches in calibration.items()},
        ways=list(_ways(plan)),
        chosen=None if chosen is None else chosen.name,
        memory_budget=budget,
    )


def _ways(plan: Plan) -> Iterator[dict[str, Any]]:
    for way in plan.ways:
        on_host = {} if plan.device.type == "cpu" else {"host": way.host_bytes}
        sent = {"received_per_step": way.received, "from_other_nodes": plan.from_other_nodes(way)} if plan.ranks > 1 else {}
        yield {"name": way.name, "memory": way.device_bytes, **on_host, "read_per_step": way.moved, **sent}


def _models(recipe: Recipe) -> list[dict[str, Any]]:
    rows = [("base", "base", recipe.base_model)] if recipe.base_model else []
    rows += [(task, "expert", entry.path) for task, entry in recipe.named_experts]
    return [{"name": name, "role": role, "path": str(path), "bytes": _bytes_of(path)} for name, role, path in rows]


def _bytes_of(path: Path) -> int:
    return sum(file.stat().st_size for file in weight_files(path))


def _dtypes(dtypes: Iterable[torch.dtype]) -> list[str]:
    return sorted({str(dtype).removeprefix("torch.") for dtype in dtypes})


def _names(what: str, names: Sequence[str]) -> Iterator[str]:
    if names:
        more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        yield f"{what}: {', '.join(names[:MOST_NAMES])}{more}"
