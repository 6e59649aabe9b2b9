"""The parameters of data-free methods, and what their values may be. Without torch, as all that a recipe is checked by."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import TypeAdapter

from samerge_ext.checkpoints.reading import shown
from samerge_ext.recipes.tensor_settings import check


@dataclass(frozen=True)
class Method:
    """What a method is given.

    parameters: what it reads of those for all, beside device. of_models: of those of a model, each of which may be one for all.
    base: how the base counts. "needed": task vectors are merged; "optional": they, or without a base the models; "first": the
        base is the first of the models that are merged; "one": it is one of them, where it is given.
    fewest, most: models beside the base.
    """

    parameters: tuple[str, ...] = ()
    of_models: tuple[str, ...] = ()
    base: Literal["needed", "optional", "first", "one"] = "needed"
    fewest: int = 1
    most: int | None = None

    @property
    def needs_base(self) -> bool:
        return self.base in ("needed", "first")


# int8_mask is how mergekit saves memory of its own: files that have it are taken, and it changes no number here or there.
_SHARED = ("normalize", "lambda", "int8_mask", "align_norms")
_SPARSE = ("weight", "density")
OURS = ("seed", "trim", "align_norms", "device", "ridge", "transposed", "mask_lambda", "agreeing")  # that mergekit does not know
OF_THE_WHOLE = ("seed", "align_norms", "device")  # one value, whatever the tensor
LARGEST = 1e30  # of a number of a recipe: sums of it are finite in fp32
METHODS = {
    "linear": Method(("normalize",), ("weight",), base="one"),
    "task_arithmetic": Method(_SHARED, ("weight",)),
    "ties": Method((*_SHARED, "rescale", "trim"), _SPARSE),
    "dare_linear": Method((*_SHARED, "rescale", "seed"), _SPARSE),
    "dare_ties": Method((*_SHARED, "rescale", "seed"), _SPARSE),
    "breadcrumbs": Method((*_SHARED, "rescale"), (*_SPARSE, "gamma")),
    "breadcrumbs_ties": Method((*_SHARED, "rescale"), (*_SPARSE, "gamma")),
    "della": Method((*_SHARED, "rescale", "seed"), (*_SPARSE, "epsilon")),
    "della_linear": Method((*_SHARED, "rescale", "seed"), (*_SPARSE, "epsilon")),
    "slerp": Method(("t",), base="first", most=1),
    "nuslerp": Method(("nuslerp_row_wise", "nuslerp_flatten"), ("weight",), base="optional", fewest=2, most=2),
    "multislerp": Method(("normalize_weights", "eps"), ("weight",), base="optional"),
    "karcher": Method(("max_iter", "tol"), base="one"),
    "model_stock": Method(("filter_wise",), fewest=2),
    "sce": Method(("select_topk", "int8_mask")),
    "nearswap": Method(("t",), most=1),
    "arcee_fusion": Method(most=1),
    "passthrough": Method((), ("scale",), base="one", most=1),
    "ram": Method(("epsilon",)),
    "ramplus_tl": Method(("r", "alpha", "epsilon")),
    "wudi": Method(("ridge", "lambda", "transposed", "align_norms")),
    "consensus": Method(("lambda", "mask_lambda", "agreeing", "align_norms"), fewest=2),
}
# What some method of mergekit reads, which ignores it in others.
OF_MERGEKIT = {key for method in METHODS.values() for key in (*method.parameters, *method.of_models)} - set(OURS)


def check_count(method: str, models: Sequence[str]) -> None:
    """Raises ValueError for more models beside the base than a method merges, or less."""
    settings, count = METHODS[method], len(models)
    if count < settings.fewest or count > (settings.most or count):
        wanted = f"{settings.fewest} model{'s' * (settings.fewest > 1)}{'' if settings.most else ' or more'}"
        beside = " beside the base" if settings.base != "one" else ""
        raise ValueError(f"{method} merges {wanted}{beside}, and models lists {shown(models)}")


def check_parameters(method: str, parameters: Mapping[str, Any], of_models: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Raises ValueError for a parameter that nobody reads and for a value that no tensor can have; names those that only other
    methods read, which change nothing. of_models: their names, and the parameters of each."""
    own = set(METHODS[method].of_models)
    for model, given, allowed in [("", parameters, read_by(method)), *((model, given, own) for model, given in of_models)]:
        where = "a model's parameters" if model else "parameters"
        unknown = set(given) - allowed - OF_MERGEKIT
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
    if parameters.get("trim") == "vector" and parameters.get("rescale", False) not in (False, 0):
        raise ValueError("'rescale' is by tensor; leave it out where the whole vector is trimmed")


def read_by(method: str) -> set[str]:
    return {"device", *METHODS[method].parameters, *METHODS[method].of_models}


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


def positive(value: Any) -> float:
    if not number(value) > 0:
        raise ValueError(f"{shown(value)} is not a number above 0")
    return number(value)


def not_negative(value: Any) -> float:
    if not number(value) >= 0:
        raise ValueError(f"{shown(value)} is negative")
    return number(value)


def steps(value: Any) -> int:
    if not (number(value) >= 1 and number(value) == int(number(value))):
        raise ValueError(f"{shown(value)} is not a whole number ≥ 1")
    return int(number(value))


def density(value: Any) -> float:
    if not 0 <= number(value) <= 1:
        raise ValueError(f"density {shown(value)} lies outside of 0 … 1")
    return number(value)


def share(value: Any) -> float:
    if not 0 <= number(value) <= 1:
        raise ValueError(f"{shown(value)} lies outside of 0 … 1")
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
    "gamma": share,
    "epsilon": not_negative,
    "t": number,
    "nuslerp_row_wise": boolean,
    "nuslerp_flatten": boolean,
    "normalize_weights": boolean,
    "eps": positive,
    "max_iter": steps,
    "tol": positive,
    "filter_wise": boolean,
    "select_topk": number,
    "scale": number,
    "r": number,
    "alpha": not_negative,
    "ridge": positive,
    "mask_lambda": not_negative,
    "agreeing": steps,
    "transposed": boolean,
    "normalize": boolean,
    "rescale": boolean,
    "align_norms": boolean,
    "seed": seed,
    "device": text,
}
