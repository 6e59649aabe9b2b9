"""Running a recipe: from file to file, or on packed weights for what is learned; and what that would take."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from samerge_ext.budget.plan import PLAN_FILE, Plan, plan
from samerge_ext.checkpoints.folder import open_checkpoint
from samerge_ext.checkpoints.layers import number_of_layers
from samerge_ext.checkpoints.locks import held, remove
from samerge_ext.checkpoints.lora import model_and_adapter
from samerge_ext.checkpoints.saving import parse_size, require_apart, require_space, require_target
from samerge_ext.elementwise.file_merge import FileMerge, merge_files
from samerge_ext.elementwise.ranks import Rank
from samerge_ext.learning.calibration import Calibration
from samerge_ext.learning.loop import check_spread
from samerge_ext.learning.run_state import STATE_FILE
from samerge_ext.merged.result import Result
from samerge_ext.methods.adamerging import adamerging
from samerge_ext.methods.reestimate_batchnorm import STATISTICS, reestimate_batchnorm
from samerge_ext.methods.samerging import samerging
from samerge_ext.methods.statsmerging import statsmerging
from samerge_ext.models.clip_folders import check_text_tower
from samerge_ext.models.folders import FolderModel
from samerge_ext.packing.packed_weights import PackedWeights
from samerge_ext.packing.ranks import ALONE, Ranks
from samerge_ext.packing.stores import check_device
from samerge_ext.recipes.data_free import file_merge
from samerge_ext.recipes.entries import SliceEntry
from samerge_ext.recipes.parameters import METHODS
from samerge_ext.recipes.recipe import LEARNED as CONFIGS
from samerge_ext.recipes.recipe import Recipe
from samerge_ext.recipes.tokenizers import companions_of
from samerge_ext.recipes.torchrun import rank_of_torchrun, ranks_of_torchrun, share_of_folders
from samerge_ext.statistics.features import FEATURES_FILE

SPREAD = ("samerging", "adamerging")  # learned by several ranks, too
LEARNED: dict[str, Callable[..., Result]] = {"samerging": samerging, "adamerging": adamerging, "statsmerging": statsmerging}
DTYPES = {
    None: None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64,
}  # fmt: skip
PACKED_FILE = "packed.safetensors"  # in OUT.state, where a memory budget asks for it


def plan_recipe(recipe: Recipe, ranks: int = 1, nodes: int = 1) -> Plan:
    """What every way to hold a learned merge's model would take, from the folders' headers and the calibration set; by so many
    ranks on so many nodes, of each of them."""
    model, calibration = model_and_calibration(recipe)
    return plan_weights(recipe, model, calibration, described_weights(recipe, model), ranks, nodes)


def plan_weights(
    recipe: Recipe, model: FolderModel, calibration: dict[str, list], packed: PackedWeights, ranks: int = 1, nodes: int = 1
) -> Plan:
    """`plan_recipe` of what is there already."""
    teachers, settings = recipe.merge_method != "adamerging", recipe.method_settings()
    return plan(model.module, packed, calibration, model.logits, settings, teachers=teachers, ranks=ranks, nodes=nodes)


def described_weights(recipe: Recipe, model: FolderModel) -> PackedWeights:
    """What a learned recipe merges, without its numbers."""
    base, _ = recipe.learned_from()
    experts = [(task, entry.path) for task, entry in recipe.named_experts]
    return PackedWeights.describe(base, experts, conversion=model.conversion, **_packing(recipe))


def run_recipe(
    recipe: Recipe,
    out: Path,
    *,
    overwrite: bool = False,
    report: bool = True,
    shard_size: int | str | None = None,
    rank: Rank | None = None,
    timeout: float | None = None,
    progress: bool = False,
) -> Result | None:
    """Merges as the recipe says and writes the model folder `out`; nothing appears there before it is whole.

    What could fail for want of space or of a free target is checked first. Until the folder is written `OUT.state` holds how far
    the merge is, and the same recipe continues from it. Data-free methods go from file to file and return nothing.
    report: write report.html and report.json, too. Of methods that go from file to file alone, shard_size: of the written
    files, in bytes or as a text such as "500MB", 5 GB by default; rank: of several processes that merge together, as of
    `merge_files`, by default torchrun's where it started this one. progress: show how far it is; what is learned follows the
    recipe's own setting, where it has one.

    What is learned is learned by all processes that torchrun started: see docs/distributed.md. timeout: seconds that these wait
    for one that does not answer, two hours by default.
    """
    target, state = Path(os.path.realpath(out)), state_of(out)
    with recipe.named():
        check_device(recipe.parameters.get("device"))
        require_apart(target, inputs_of(recipe))
        if recipe.merge_method in METHODS:
            if timeout is not None:
                raise ValueError(f"timeout is for methods that learn, and of {recipe.merge_method} no rank waits; leave it out")
            merge = file_merge_of(recipe, with_page=report)
            if shard_size is not None:
                merge = replace(merge, shard_bytes=parse_size(shard_size))
            merge_files(merge, out, overwrite=overwrite, rank=rank or rank_of_torchrun(), progress=progress)
            return None
        of_files = {"rank": rank, "shard_size": shard_size}
        for option in (name for name, value in of_files.items() if value is not None):
            raise ValueError(f"{option} is for methods that go from file to file, and {recipe.merge_method} learns; leave it out")
        with ranks_of_torchrun(recipe.parameters.get("device"), timeout) as ranks:
            if ranks.group is not None:
                require_spread(recipe)
            require_target(target, overwrite=overwrite)
            with held(state) if ranks.is_first else nullcontext():
                return _run_learned(recipe, target, state, overwrite, report, ranks, progress)


def _run_learned(
    recipe: Recipe, target: Path, state: Path, overwrite: bool, report: bool, ranks: Ranks, progress: bool
) -> Result:
    dtype, companions = DTYPES[recipe.dtype], companions_of(recipe)
    companions.check()
    model, calibration = model_and_calibration(recipe)
    packed = packed_weights(recipe, model, state, ranks)
    sizes = zip(packed.layout.shapes, packed.layout.dtypes, strict=True)
    require_space(target, sum(shape.numel() * (dtype or base_dtype).itemsize for shape, base_dtype in sizes))
    settings = recipe.method_settings(checkpoint_dir=state, progress=progress)
    result = LEARNED[recipe.merge_method](model.module, packed, calibration, model.logits, config=settings)
    if recipe.reestimate_batchnorm:
        result = reestimate_batchnorm(result, calibration, model.logits)
    result.save_pretrained(target, companions=companions, dtype=dtype, overwrite=overwrite, report=report, recipe=as_json(recipe))
    if not ranks.is_first:
        return result
    for name in (STATE_FILE, FEATURES_FILE, PLAN_FILE, PACKED_FILE):  # features: of StatsMerging; the written folder has them too
        remove(state / name)
    return result


def require_spread(recipe: Recipe) -> None:
    """Raises ValueError for what several ranks do not merge."""
    if recipe.reestimate_batchnorm:
        raise ValueError("'reestimate_batchnorm' runs the whole merged model, which no rank holds; merge by one process")
    if recipe.merge_method not in SPREAD:
        raise ValueError(f"{recipe.merge_method} is merged by one process; only {' and '.join(SPREAD)} by those of torchrun")
    check_spread(recipe.method_settings())


def state_of(out: Path) -> Path:
    """Where a merge keeps how far it is until OUT is written."""
    target = Path(os.path.realpath(out))
    return target.with_name(f"{target.name}.state")


def packed_weights(recipe: Recipe, model: FolderModel, state: Path, ranks: Ranks = ALONE) -> PackedWeights:
    """What a learned recipe merges, or of several ranks this one's share; in a packed file in the folder ``state`` where only
    that fits its memory budget."""
    base, _ = recipe.learned_from()
    experts = [(task, entry.path) for task, entry in recipe.named_experts]
    packing = {"conversion": model.conversion, **_packing(recipe)}
    if ranks.group is not None:
        has_budget = recipe.method_settings().memory_budget is not None
        if has_budget and ranks.is_first and not (state / PACKED_FILE).exists():
            _planned_store(recipe, ranks.size)  # refuses before weights are packed
        share = share_of_folders(base, experts, state / PACKED_FILE, ranks, recipe.parameters.get("device"), **packing)
        packed = share if has_budget else share.in_memory(recipe.parameters.get("device", "cpu"), keep_factors=True)
    else:
        file = state / PACKED_FILE if (state / PACKED_FILE).exists() or _planned_store(recipe) == "file" else None
        packed = PackedWeights.from_folders(base, experts, file=file, **packing)
    if model.heads:
        check_text_tower(packed)
    return packed


def inputs_of(recipe: Recipe) -> list[Path]:
    """All that is read and must not be written over."""
    models = [path for entry in recipe.models for path in (entry.model, entry.adapter) if path is not None]
    calibration = recipe.calibration.paths if recipe.calibration else []
    return [*([recipe.base_model] if recipe.base_model else []), *models, *calibration]


def _slices(recipe: Recipe) -> list[SliceEntry] | None:
    """The slices of a recipe; None where it merges whole models. Raises ValueError for layers that a model does not have."""
    entries = [entry for one in recipe.slices for entry in one.sources] if recipe.slices else recipe.models
    are_whole = True
    for entry in entries:
        if entry.layer_range is None:
            continue
        with open_checkpoint(model_and_adapter(entry.model)[0] or recipe.base_model or entry.model) as checkpoint:
            layers = number_of_layers(checkpoint.names)
        first, last = entry.layer_range
        if not 0 <= first < last <= layers:
            raise ValueError(f"{entry.model} has {layers} layers, and layer_range is [{first}, {last}]; it lies in [0, {layers}]")
        are_whole &= (first, last) == (0, layers)
    if recipe.slices is not None or are_whole:
        return recipe.slices
    if any(entry.layer_range is None for entry in entries):
        raise ValueError("some models have a layer_range and others have none; give all of them one")
    return [SliceEntry(sources=entries)]


def as_json(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says, without what goes without saying or has no part in the result."""
    said = recipe.model_dump(mode="json", exclude_defaults=True)
    if recipe.merge_method in LEARNED:
        without_effect = CONFIGS[recipe.merge_method].WITHOUT_EFFECT
        said["parameters"] = {key: value for key, value in recipe.parameters.items() if key not in without_effect}
    return said


def file_merge_of(recipe: Recipe, *, with_page: bool = True) -> FileMerge:
    """The merge from file to file that a recipe of a method without learning is."""
    return file_merge(
        recipe.merge_method,
        [(task, entry.path, entry.parameters) for task, entry in recipe.named_experts],
        recipe.base_model,
        recipe.parameters,
        slices=_slices(recipe),
        heads=recipe.heads,
        keep=recipe.keep,
        dtype=DTYPES[recipe.dtype],
        out_dtype=DTYPES[recipe.out_dtype],
        tokenizer=recipe.tokenizer_config,
        companions=companions_of(recipe),
        identity=as_json(recipe),
        with_page=with_page,
    )


def _planned_store(recipe: Recipe, ranks: int = 1) -> str | None:
    """Where weights are on the way that is chosen for the recipe's memory budget; None without one."""
    settings = recipe.method_settings()
    if settings.memory_budget is None:
        return None
    return plan_recipe(recipe, ranks).choose(settings.memory_budget, settings.host_memory_budget).store


def _packing(recipe: Recipe) -> dict[str, Any]:
    """How a learned merge packs its weights."""
    form = DTYPES.get(recipe.task_vector_dtype, recipe.task_vector_dtype)
    return {
        "dtype": DTYPES[recipe.dtype] or torch.float32,
        "task_vector_dtype": form,
        "heads": recipe.heads,
        "keep": recipe.keep,
        "tokenizer": recipe.tokenizer_config,
    }


def model_and_calibration(recipe: Recipe) -> tuple[FolderModel, dict[str, list]]:
    """The model without memory for its weights, and the batches of every task."""
    base, options = recipe.learned_from()
    experts = {task: entry.model for task, entry in recipe.named_experts}
    model = FolderModel.of(base, experts, [*recipe.heads, *recipe.keep], recipe.tokenizer_config)
    model = model.with_heads(options.classes, options.templates)
    if recipe.reestimate_batchnorm and not any(name.endswith(STATISTICS) for name, _ in model.module.named_buffers()):
        raise ValueError(
            f"{type(model.module).__name__} has no BatchNorm with running statistics; leave out 'reestimate_batchnorm'"
        )
    batches = model.batches(options.files, limit=options.texts, batch_size=options.batch_size, max_length=options.max_length)
    Calibration(batches, tuple(experts), held_back=recipe.method_settings().share_held_back)  # may refuse
    return model, batches
