"""Whether a recipe will go, what it finds in the models, and what it will take: from headers and texts, before any work."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from samerge_ext.budget.plan import Plan
from samerge_ext.checkpoints.saving import free_bytes, require_apart, require_space, require_target
from samerge_ext.elementwise.opening import opened
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
    state_of,
)
from samerge_ext.recipes.tokenizers import companions_of
from samerge_ext.reports.inputs import weight_files
from samerge_ext.sizes import show_bytes

MOST_NAMES = 8  # of tensors, in a line


def check_recipe(recipe: Recipe, out: Path | None = None, *, overwrite: bool = False) -> list[str]:
    """What a merge would find and take, in lines. out: the folder that it would write; its place and space are then checked, too.

    Raises what `run_recipe` would before it begins. Numbers are not read: NaN and Inf show when they are merged.
    """
    with recipe.named():
        check_device(recipe.parameters.get("device"))
        if out is not None:
            require_apart(out, inputs_of(recipe))
            if not (state_of(out) / RECORD).exists():
                require_target(out, overwrite=overwrite)
        return _of_files(recipe, out) if recipe.merge_method in METHODS else _of_learned(recipe, out)


def _of_files(recipe: Recipe, out: Path | None) -> list[str]:
    with opened(file_merge_of(recipe)) as models:
        if out is not None:
            require_apart(out, models.files)
        plan, read = models.plan, sum(file.stat().st_size for file in models.files)
        written = {str(plan.written_dtype(name)).removeprefix("torch.") for name in plan.layers}
        numbers = sum(plan.names.shape(name).numel() for name in plan.layers)
        buffers = plan.buffer_bytes(models.device)
        threads = plan.workers(models.device)
        return [
            *_models(recipe),
            _merged(len(plan.layers), numbers, written),
            *_names("kept per task", plan.heads),
            *_names("kept as they are", plan.kept),
            f"reads {show_bytes(read)}, {_writes(sum(shard.total_bytes for shard in plan.shards), out)}",
            f"memory: {show_bytes(resident_bytes() + buffers)}, of which {show_bytes(buffers)} are buffers of {threads} threads, "
            f"and what {recipe.merge_method} holds of single tensors",
        ]


def _of_learned(recipe: Recipe, out: Path | None) -> list[str]:
    companions_of(recipe).check()
    settings, dtype = recipe.method_settings(), DTYPES[recipe.dtype]
    model, calibration = model_and_calibration(recipe)
    packed = described_weights(recipe, model)
    calibration_set(calibration, packed, settings)  # may refuse
    sizes = [(s.numel(), dtype or of_base) for s, of_base in zip(packed.layout.shapes, packed.layout.dtypes, strict=True)]
    writes = sum(numbers * to.itemsize for numbers, to in sizes)
    plan, budget = plan_weights(recipe, model, calibration, packed), settings.memory_budget
    chosen = plan.choose(budget, settings.host_memory_budget) if budget is not None else None
    if chosen is not None and chosen.store == "file":
        writes += packed.base.nbytes + packed.task_vectors.nbytes
    return [
        *_models(recipe),
        _merged(len(sizes), sum(numbers for numbers, _ in sizes), {str(to).removeprefix("torch.") for _, to in sizes}),
        *_names("kept per task", dict.fromkeys(name for head in packed.heads.values() for name in head)),
        *(f"learns from {task}: {len(batches)} batches" for task, batches in calibration.items()),
        _writes(writes, out),
        f"memory, of the {show_bytes(machine_bytes())} of this machine:",
        *_ways(plan, chosen),
        *([f"* the fastest within {budget}"] if chosen else []),
    ]


def _ways(plan: Plan, chosen: object) -> Iterable[str]:
    for way in plan.ways:
        moved = f", {show_bytes(way.moved)} read per step" if way.moved else ""
        beside = "" if plan.device.type == "cpu" else f" of the GPU, {show_bytes(way.host_bytes)} of the host"
        yield f"{'*' if way == chosen else ' '} {way.name}: {show_bytes(way.device_bytes)}{beside}{moved}"


def _models(recipe: Recipe) -> list[str]:
    rows = [("base", recipe.base_model)] if recipe.base_model else []
    rows += [(task, entry.path) for task, entry in recipe.named_experts]
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:{width}}  {path}  {show_bytes(_bytes_of(path))}" for name, path in rows]
    return [f"{recipe.merge_method} of {len(recipe.experts)} models:", *lines]


def _bytes_of(path: Path) -> int:
    return sum(file.stat().st_size for file in weight_files(path))


def _merged(tensors: int, numbers: int, written: set[str]) -> str:
    return f"merged: {tensors} tensors, {numbers:,} numbers, written as {', '.join(sorted(written))}"


def _names(what: str, names: Iterable[str]) -> list[str]:
    found: Sequence[str] = list(names)
    more = f" and {len(found) - MOST_NAMES} more" if len(found) > MOST_NAMES else ""
    return [f"{what}: {', '.join(found[:MOST_NAMES])}{more}"] if found else []


def _writes(num_bytes: int, out: Path | None) -> str:
    """Of the disk; raises CheckpointError where ``out`` has not as much space."""
    if out is None:
        return f"writes {show_bytes(num_bytes)}"
    require_space(out, num_bytes)
    return f"writes {show_bytes(num_bytes)}, of {show_bytes(free_bytes(out))} that are free there"
