"""How a learned merge holds its model: as its configuration says, or as a plan for its memory budget does."""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from torch import nn

from samerge_ext.budget.plan import PLAN_FILE, Way, plan
from samerge_ext.checkpoints.sealed import read_sealed_object, write_sealed
from samerge_ext.learning.calibration import Calibration
from samerge_ext.learning.config import LearningConfig
from samerge_ext.learning.nested import to_device
from samerge_ext.learning.passes import Logits, answering
from samerge_ext.learning.shared_encoder import SharedEncoder
from samerge_ext.memory import large_tensors_mapped, trim_heap
from samerge_ext.merged.model import MergedModel
from samerge_ext.packing.components import Components
from samerge_ext.packing.packed_weights import PackedWeights
from samerge_ext.packing.stores import indexed

Arguments = ParamSpec("Arguments")
Merged = TypeVar("Merged")


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
    would sum in another order, and end at other last digits. So do as many ranks; others plan anew."""
    path, ranks = Path(config.checkpoint_dir) / PLAN_FILE if config.checkpoint_dir else None, packed.ranks
    budgets = {name: getattr(config, name) for name in ("memory_budget", "host_memory_budget")}
    begun = read_sealed_object(path) if path is not None and path.exists() else {}
    ranks.require_equal(zlib.crc32(repr(begun).encode()), f"the plan in {path} is another", packed.layout.block_layer.device)
    if begun and {name: begun.get(name) for name in budgets} == budgets and begun.get("ranks", 1) == ranks.size:
        return Way(**begun["way"])
    way = plan(module, packed, batches, logits, config, teachers=teachers, heads=heads).choose(*budgets.values())
    if path is not None and ranks.is_first:
        write_sealed(path, json.dumps({**budgets, "ranks": ranks.size, "way": asdict(way)}).encode())
    return way


def within_budget(method: Callable[Arguments, Merged]) -> Callable[Arguments, Merged]:
    """A learning method; where its configuration has a memory budget, large CPU tensors leave nothing behind when freed."""

    @functools.wraps(method)
    def run(*args: Arguments.args, **keywords: Arguments.kwargs) -> Merged:
        config = keywords.get("config")
        has_budget = isinstance(config, LearningConfig) and config.memory_budget is not None
        with large_tensors_mapped() if has_budget else nullcontext():
            return method(*args, **keywords)

    return run


def make_model(
    module: nn.Module,
    packed: PackedWeights,
    config: LearningConfig,
    calibration: Calibration,
    logits: Logits,
    *,
    teachers: bool,
    heads: Mapping[str, nn.Module] | None = None,
) -> tuple[MergedModel, Logits]:
    """The model that coefficients are learned on, held as the configuration says or as a plan for its memory budget does; and
    ``logits`` in the form in which they are learned from (`answering`).

    teachers: the experts' logits will be kept too. heads: modules by task, for what config.train_heads names.
    Raises MemoryBudgetError where nothing fits the budget, ValueError for heads that cannot be trained.
    """
    for head in (heads or {}).values():
        head.to(indexed(config.device or packed.base.device))
    model = _held(module, packed, config, calibration, logits, teachers, heads)
    model.train_heads(config.train_heads, heads)
    for task, name, _ in model.trained_heads.places if isinstance(logits, SharedEncoder) else ():
        if name in packed.heads.get(task, {}):
            raise ValueError(
                f"train_heads: no head is in the module while a SharedEncoder runs, so that '{name}' of task '{task}' is not "
                "learned; give its head function's modules as heads=, or a logits function that calls the whole module"
            )
    if config.granularity == "rank":
        model.use_components(Components.of(packed, config.rank, model.weights.store))
    first = next(iter(calibration.batches))
    model.select_head(first)
    batch = to_device(calibration.batches[first][0], model.device)
    return model, answering(logits, model.module, batch, getattr(config, "samples", None))


def _held(
    module: nn.Module,
    packed: PackedWeights,
    config: LearningConfig,
    calibration: Calibration,
    logits: Logits,
    teachers: bool,
    heads: Mapping[str, nn.Module] | None,
) -> MergedModel:
    device = indexed(config.device or packed.base.device)
    if config.memory_budget is not None:
        on_cpu = device.type == "cpu"
        if on_cpu:
            trim_heap()  # it would count
        way = planned_way(module, packed, calibration.whole, logits, config, teachers=teachers, heads=heads)
        model = way.make(module, packed, config.initial_coefficient, device)
        model.planned_bytes = way.device_bytes
        if on_cpu:
            trim_heap()  # the weights that the module came with
        return model
    if config.streamed:
        store = packed.store(device=device)
        return MergedModel(module, packed, config.initial_coefficient, streamed=True, store=store)
    return MergedModel(module, packed.in_memory(device), config.initial_coefficient)
