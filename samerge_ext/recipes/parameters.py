"""The parameters of data-free methods, and what their values may be. Without torch, as all that a recipe is checked by."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter


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
METHODS = {
    "linear": Method(1.0, normalize=True),
    "task_arithmetic": Method(0.3, normalize=False, parameters=_SHARED),
    "ties": Method(None, True, "ties", elect=True, parameters=(*_SHARED, "density", "rescale", "trim")),
    "dare_linear": Method(None, False, "dare", parameters=(*_SHARED, "density", "rescale", "seed")),
    "dare_ties": Method(None, False, "dare", elect=True, parameters=(*_SHARED, "density", "rescale", "seed")),
}


def check_parameters(method: str, parameters: Mapping[str, Any], of_models: list[Mapping[str, Any]]) -> None:
    """Raises ValueError for a parameter that nobody reads; names those that only other methods do, which change nothing."""
    known = read_by(method)
    for where, given, allowed in [
        ("parameters", parameters, known),
        *(("a model's parameters", given, known & {"weight", "density"}) for given in of_models),
    ]:
        unknown = set(given) - allowed - set(OF_MERGEKIT)
        if unknown:
            raise ValueError(f"{where} of {method}: unknown {sorted(unknown)}; known are {sorted(allowed)}")
        ignored = sorted(set(given) - allowed - {"int8_mask"})
        if ignored:
            warnings.warn(
                f"{where}: {method} does not read {', '.join(ignored)} there; as in mergekit, it changes nothing", stacklevel=2
            )
    if parameters.get("trim", "tensor") not in ("tensor", "vector"):
        raise ValueError(f"trim: {parameters['trim']!r}; choose tensor or vector")
    if METHODS[method].sparsify == "ties" and boolean(parameters.get("rescale", False)):
        raise ValueError("ties does not rescale here; leave 'rescale' out, or merge by dare_ties")


def read_by(method: str) -> set[str]:
    return {"weight", "normalize", *METHODS[method].parameters}


def number(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError(f"{value} is not a number")
    try:
        number = float(value)  # YAML reads 1e-1 as a text
    except (TypeError, ValueError):
        raise ValueError(f"{value!r} is not a number") from None
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is not a finite number")
    return number


def density(value: Any) -> float:
    if not 0 <= number(value) <= 1:
        raise ValueError(f"density {value} lies outside of 0 … 1")
    return number(value)


def boolean(value: Any) -> bool:
    """As mergekit: also 1, 0 and yes, no."""
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValueError:
        raise ValueError(f"{value!r} is neither true nor false") from None
