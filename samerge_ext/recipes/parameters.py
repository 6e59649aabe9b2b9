"""The parameters of data-free methods, and what their values may be. Without torch, as all that a recipe is checked by."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from samerge_ext.checkpoints.reading import shown
from samerge_ext.recipes.tensor_settings import check


@dataclass(frozen=True)
class Method:
    """Which parameters a method reads, beside weight, normalize and device, and defaults. A weight of None must be given."""

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
OF_THE_WHOLE = ("seed", "align_norms", "device")  # one value, whatever the tensor
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
    known = read_by(method)
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
                if key in OF_THE_WHOLE:
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
    if METHODS[method].sparsify == "ties" and boolean(parameters.get("rescale", False)):
        raise ValueError("ties does not rescale here; leave 'rescale' out, or merge by dare_ties")


def read_by(method: str) -> set[str]:
    return {"weight", "normalize", "device", *METHODS[method].parameters}


def number(value: Any) -> float:
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


def density(value: Any) -> float:
    if not 0 <= number(value) <= 1:
        raise ValueError(f"density {shown(value)} lies outside of 0 … 1")
    return number(value)


def boolean(value: Any) -> bool:
    """As mergekit: also 1, 0 and yes, no."""
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValueError:
        raise ValueError(f"{shown(value)} is neither true nor false") from None


def seed(value: Any) -> int:
    if isinstance(value, bool) or not (isinstance(value, int) or (isinstance(value, str) and value.isdecimal())):
        raise ValueError(f"{shown(value)} is not a whole number ≥ 0")
    if not 0 <= int(value) < 2**64:
        raise ValueError(f"{shown(value)} is not a whole number of 0 … 2⁶⁴ − 1")
    return int(value)


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{shown(value)} is not a text")
    return value


# What a parameter's scalars are.
VALUES: dict[str, Callable[[Any], Any]] = {
    "weight": number,
    "lambda": number,
    "density": density,
    "normalize": boolean,
    "rescale": boolean,
    "align_norms": boolean,
    "seed": seed,
    "device": text,
}
