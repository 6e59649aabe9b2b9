"""Data-free recipes: mergekit's methods and parameters as rules of a merge from file to file."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from samerge_ext.checkpoints.companions import Companions
from samerge_ext.checkpoints.folder import open_checkpoint
from samerge_ext.checkpoints.lora import model_of
from samerge_ext.checkpoints.sources import CheckpointSource
from samerge_ext.checkpoints.task_names import names_of_folders, unused
from samerge_ext.elementwise.file_merge import FileMerge
from samerge_ext.elementwise.piecewise import Combination, Rule
from samerge_ext.methods.dare import Dare
from samerge_ext.methods.distac import shortening
from samerge_ext.methods.ties import Ties
from samerge_ext.recipes.parameters import METHODS, boolean, density, number, read_by, seed
from samerge_ext.recipes.tensor_settings import depths, resolve


def file_merge(
    method: str,
    experts: Sequence[tuple[str, Path, Mapping[str, Any]]],
    base_model: Path | None,
    parameters: Mapping[str, Any],
    *,
    heads: Sequence[str] = (),
    keep: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    companions: Companions | None = None,
    identity: dict,
) -> FileMerge:
    """A recipe as a merge of files.

    experts: task, folder and parameters of each. parameters: of the method, for all. identity: the recipe as JSON, for the
        model card and for telling whether an interrupted merge was of the same.
    """
    settings, shared = METHODS[method], {key: value for key, value in parameters.items() if key in read_by(method)}
    of_models = [own for _, _, own in experts]
    folders = [(task, folder) for task, folder, _ in experts]
    defaults = [settings.weight] * len(folders)
    is_linear = method == "linear"
    if is_linear and base_model and "weight" in shared and not _is_among(base_model, folders):
        (name,) = names_of_folders([base_model])
        folders.append(
            (unused(name, [task for task, _ in folders]), base_model)
        )  # as mergekit: a weight for all is the base's too
        of_models.append({})
        defaults.append(None)
    names_from = base_model or model_of(folders[0][1])
    whole = shared.get("trim") == "vector"

    @functools.cache
    def depth_of() -> dict[str, float]:
        with open_checkpoint(names_from) as checkpoint:
            return depths(CheckpointSource(checkpoint, "base").names)

    def rule_of(name: str, numel: int, merged: torch.dtype) -> Rule:
        names = list(depth_of()) if whole else [name]

        def value(key: str, default: Any, of_model: Mapping[str, Any] | None = None, convert: Callable = number) -> Any:
            sources = [shared] if of_model is None else [of_model, shared]
            found = {resolve(key, sources, n, depth_of()[n], convert) for n in names}
            if len(found) > 1:
                raise ValueError(f"{key} differs between tensors; trimming the whole vector needs one value for all")
            (one,) = found
            if one is None and default is None:
                raise ValueError(f"{method} needs '{key}' for every model; '{name or names[0]}' has none")
            return default if one is None else one

        weights = [value("weight", default, of_model) for of_model, default in zip(of_models, defaults, strict=True)]
        normalize = value("normalize", settings.normalize, convert=boolean)
        total = sum(weights)
        if is_linear and normalize and total == 0:
            raise ValueError("linear divides by the sum of the weights, which is 0; set normalize to false")
        combination = Combination(weights, value("lambda", 1.0), normalize=normalize, elect=settings.elect)
        if settings.sparsify is None:
            return combination
        densities = [value("density", 1.0, of_model, density) for of_model in of_models]
        if settings.sparsify == "ties":
            return Ties(numel, merged, densities, combination)
        return Dare(name, densities, seed(shared.get("seed", 0)), combination, value("rescale", True, convert=boolean))

    return FileMerge(
        experts=folders,
        rule_of=rule_of,
        names_from=names_from,
        base=None if is_linear else base_model,
        heads=tuple(heads),
        keep=tuple(keep),
        whole=whole,
        factors_of=shortening if boolean(shared.get("align_norms", False)) else None,
        device=shared.get("device", "cpu"),
        dtype=dtype,
        out_dtype=out_dtype,
        companions=companions,
        identity=identity,
        card=_card(method, len(folders), identity),
    )


def _is_among(path: Path, folders: Sequence[tuple[str, Path]]) -> bool:
    return os.path.realpath(path) in [os.path.realpath(folder) for _, folder in folders]


def _card(method: str, count: int, identity: dict) -> str:
    return "\n".join(
        [
            "---",
            "tags: [merge, samerge_ext]",
            "---",
            "",
            "# Merged model",
            "",
            f"{count} models merged by `{method}`:",
            "",
            "```yaml",
            yaml.safe_dump(identity, sort_keys=False).rstrip(),
            "```",
            "",
        ]
    )
