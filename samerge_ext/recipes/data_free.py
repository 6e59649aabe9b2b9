"""Data-free recipes: mergekit's methods and parameters as rules of a merge from file to file."""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import TypeAdapter

from samerge_ext.checkpoints.companions import Companions
from samerge_ext.checkpoints.folder import open_checkpoint
from samerge_ext.checkpoints.lora import model_of
from samerge_ext.checkpoints.reading import shown
from samerge_ext.checkpoints.sources import CheckpointSource
from samerge_ext.checkpoints.task_names import names_of_folders, unused
from samerge_ext.elementwise.file_merge import FileMerge
from samerge_ext.elementwise.piecewise import Combination, Rule
from samerge_ext.methods.dare import Dare
from samerge_ext.methods.distac import shortening
from samerge_ext.methods.ties import Ties
from samerge_ext.recipes.tensor_settings import check, depths, resolve


@dataclass(frozen=True)
class Method:
    """Which parameters a method reads, beside weight and normalize, and their defaults. A weight of None must be given."""

    weight: float | None
    normalize: bool
    sparsify: str | None = None  # "ties" or "dare"
    elect: bool = False
    parameters: tuple[str, ...] = ()


# int8_mask is how mergekit saves memory of its own: files that have it are taken, and it changes no number here or there.
_SHARED = ("lambda", "int8_mask", "align_norms")
# What some method of mergekit reads, which ignores it in others.
OF_MERGEKIT = (
    "weight",
    "density",
    "normalize",
    "rescale",
    "lambda",
    "int8_mask",
    "gamma",
    "epsilon",
    "t",
    "select_topk",
    "filter_wise",
)
LARGEST = 1e30  # of a number of a recipe: sums of it are finite in fp32
METHODS = {
    "linear": Method(1.0, normalize=True),
    "task_arithmetic": Method(0.3, normalize=False, parameters=_SHARED),
    "ties": Method(None, True, "ties", elect=True, parameters=(*_SHARED, "density", "rescale", "trim")),
    "dare_linear": Method(None, False, "dare", parameters=(*_SHARED, "density", "rescale", "seed")),
    "dare_ties": Method(None, False, "dare", elect=True, parameters=(*_SHARED, "density", "rescale", "seed")),
}


def check_parameters(method: str, parameters: Mapping[str, Any], of_models: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Raises ValueError for a parameter that nobody reads and for a value that no tensor can have; names those that only other
    methods read, which change nothing. of_models: their names, and the parameters of each."""
    known = _read_by(method)
    for model, given, allowed in [
        ("", parameters, known),
        *((model, given, known & {"weight", "density"}) for model, given in of_models),
    ]:
        where = "a model's parameters" if model else "parameters"
        unknown = set(given) - allowed - set(OF_MERGEKIT)
        if unknown:
            raise ValueError(f"{where} of {method}: unknown {shown(sorted(unknown))}; known are {sorted(allowed)}")
        for key in sorted(given.keys() & allowed & VALUES.keys()):
            try:
                if key in ("seed", "align_norms"):
                    VALUES[key](given[key])
                else:
                    check(given[key], VALUES[key])
            except ValueError as error:
                raise ValueError(f"{where}{f' ({model})' if model else ''}: {key}: {error}") from None
        ignored = sorted(set(given) - allowed - {"int8_mask"})
        if ignored:
            warnings.warn(
                f"{where}: {method} does not read {', '.join(ignored)} there; as in mergekit, it changes nothing", stacklevel=2
            )
    if parameters.get("trim", "tensor") not in ("tensor", "vector"):
        raise ValueError(f"trim: {shown(parameters['trim'])}; choose tensor or vector")
    if METHODS[method].sparsify == "ties" and _boolean(parameters.get("rescale", False)):
        raise ValueError("ties does not rescale here; leave 'rescale' out, or merge by dare_ties")


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
    settings, shared = METHODS[method], {key: value for key, value in parameters.items() if key in _read_by(method)}
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

        def value(key: str, default: Any, of_model: Mapping[str, Any] | None = None, convert: Callable = _number) -> Any:
            sources = [shared] if of_model is None else [of_model, shared]
            found = {resolve(key, sources, n, depth_of()[n], convert) for n in names}
            if len(found) > 1:
                raise ValueError(f"{key} differs between tensors; trimming the whole vector needs one value for all")
            (one,) = found
            if one is None and default is None:
                raise ValueError(f"{method} needs '{key}' for every model; '{name or names[0]}' has none")
            return default if one is None else one

        weights = [value("weight", default, of_model) for of_model, default in zip(of_models, defaults, strict=True)]
        normalize = value("normalize", settings.normalize, convert=_boolean)
        total = sum(weights)
        if is_linear and normalize and total == 0:
            raise ValueError("linear divides by the sum of the weights, which is 0; set normalize to false")
        combination = Combination(weights, value("lambda", 1.0), normalize=normalize, elect=settings.elect)
        if settings.sparsify is None:
            return combination
        densities = [value("density", 1.0, of_model, _density) for of_model in of_models]
        if settings.sparsify == "ties":
            return Ties(numel, merged, densities, combination)
        return Dare(name, densities, _seed(shared.get("seed", 0)), combination, value("rescale", True, convert=_boolean))

    return FileMerge(
        experts=folders,
        rule_of=rule_of,
        names_from=names_from,
        base=None if is_linear else base_model,
        heads=tuple(heads),
        keep=tuple(keep),
        whole=whole,
        factors_of=shortening if _boolean(shared.get("align_norms", False)) else None,
        dtype=dtype,
        out_dtype=out_dtype,
        companions=companions,
        identity=identity,
        card=_card(method, len(folders), identity),
    )


def _read_by(method: str) -> set[str]:
    return {"weight", "normalize", *METHODS[method].parameters}


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


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError(f"{value} is not a number")
    try:
        number = float(value)  # YAML reads 1e-1 as a text
    except (TypeError, ValueError):
        raise ValueError(f"{shown(value)} is not a number") from None
    except OverflowError:
        number = math.inf
    if not abs(number) <= LARGEST:
        raise ValueError(f"{shown(value)} is not a finite number" + " that weights can have" * math.isfinite(number))
    return number


def _density(value: Any) -> float:
    if not 0 <= _number(value) <= 1:
        raise ValueError(f"density {shown(value)} lies outside of 0 … 1")
    return _number(value)


def _boolean(value: Any) -> bool:
    """As mergekit: also 1, 0 and yes, no."""
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValueError:
        raise ValueError(f"{shown(value)} is neither true nor false") from None


def _seed(value: Any) -> int:
    if isinstance(value, bool) or not (isinstance(value, int) or (isinstance(value, str) and value.isdecimal())):
        raise ValueError(f"{shown(value)} is not a whole number ≥ 0")
    if not 0 <= int(value) < 2**64:
        raise ValueError(f"{shown(value)} is not a whole number of 0 … 2⁶⁴ − 1")
    return int(value)


# What a parameter's scalars are.
VALUES: dict[str, Callable[[Any], Any]] = {
    "weight": _number,
    "lambda": _number,
    "density": _density,
    "normalize": _boolean,
    "rescale": _boolean,
    "align_norms": _boolean,
    "seed": _seed,
}
