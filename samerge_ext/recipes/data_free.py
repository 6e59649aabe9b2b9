"""Data-free recipes: mergekit's methods and parameters as rules of a merge from file to file."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from samerge_ext.checkpoints.companions import Companions
from samerge_ext.checkpoints.folder import open_checkpoint
from samerge_ext.checkpoints.lora import model_of
from samerge_ext.checkpoints.sources import CheckpointSource
from samerge_ext.checkpoints.task_names import names_of_folders, unused
from samerge_ext.checkpoints.tokenizers import TokenizerConfig
from samerge_ext.elementwise.file_merge import FileMerge
from samerge_ext.elementwise.piecewise import Rule
from samerge_ext.methods.distac import shortening
from samerge_ext.recipes.entries import SliceEntry
from samerge_ext.recipes.parameters import METHODS, boolean, read_by
from samerge_ext.recipes.rules import RULES, Given
from samerge_ext.recipes.slices import Slices
from samerge_ext.recipes.tensor_settings import depths
from samerge_ext.reports.report import Report


def file_merge(
    method: str,
    experts: Sequence[tuple[str, Path, Mapping[str, Any]]],
    base_model: Path | None,
    parameters: Mapping[str, Any],
    *,
    slices: Sequence[SliceEntry] | None = None,
    heads: Sequence[str] = (),
    keep: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    tokenizer: TokenizerConfig | None = None,
    companions: Companions | None = None,
    identity: dict,
    with_page: bool = True,
) -> FileMerge:
    """A recipe as a merge of files. Raises ValueError for slices that do not fit together.

    experts: task, folder and parameters of each. parameters: of the method, for all.
    slices: what is merged in the place of whole experts, which are the models in them. identity: the recipe as JSON, for the
        model card and for telling whether an interrupted merge was of the same. with_page: write a report beside the card.
    """
    settings, shared = METHODS[method], {key: value for key, value in parameters.items() if key in read_by(method)}
    sliced = Slices(method, slices, base_model) if slices else None
    folders = [(task, folder) for task, folder, _ in experts]
    of_models = [{key: value for key, value in own.items() if key in settings.of_models} for _, _, own in experts]
    added = None
    if base_model and sliced is None and _takes_base(method, shared) and not _is_among(base_model, folders):
        (name,) = names_of_folders([base_model])
        added = 0 if settings.base == "first" else len(folders)
        folders.insert(added, (unused(name, [task for task, _ in folders]), base_model))
        of_models.insert(added, {})
    count = len(sliced.merged if sliced else folders)
    names_from = base_model or model_of(folders[0][1])
    whole = shared.get("trim") == "vector"

    @functools.cache
    def depth_of() -> dict[str, float]:
        with open_checkpoint(names_from) as checkpoint:
            return depths(CheckpointSource(checkpoint, "base").names)

    def lookup(name: str, model: int | None) -> tuple[list[Mapping[str, Any]], str, float]:
        if sliced is not None:
            return sliced.lookup(name, model)
        return [] if model is None else [of_models[model]], name, depth_of()[name]

    def rule_of(name: str, shape: torch.Size, merged: torch.dtype) -> Rule:
        names = list(depth_of()) if whole else [name]
        return RULES[method](Given(method, name, names, shape, merged, count, shared, lookup, added))

    return FileMerge(
        experts=folders,
        rule_of=rule_of,
        names_from=names_from,
        base=base_model if settings.base in ("needed", "optional") else None,
        stacks=(sliced.base, sliced.merged) if sliced else None,
        heads=tuple(heads),
        keep=tuple(keep),
        whole=whole,
        factors_of=shortening if boolean(shared.get("align_norms", False)) else None,
        device=shared.get("device", "cpu"),
        dtype=dtype,
        out_dtype=out_dtype,
        tokenizer=tokenizer,
        companions=companions,
        identity=identity,
        about=Report(method, recipe=identity),
        with_page=with_page,
    )


def _takes_base(method: str, shared: Mapping[str, Any]) -> bool:
    """Whether a base that is not listed is one of the models; of a mean where a weight is given for it, as for all."""
    return METHODS[method].base == "first" or method == "karcher" or (method == "linear" and "weight" in shared)


def _is_among(path: Path, folders: Sequence[tuple[str, Path]]) -> bool:
    return os.path.realpath(path) in [os.path.realpath(folder) for _, folder in folders]
