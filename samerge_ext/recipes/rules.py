"""Which rule a data-free method is, made from its parameters for a tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from samerge_ext.elementwise.inner_products import Over
from samerge_ext.elementwise.piecewise import Combination, Rule
from samerge_ext.methods import della, karcher, multislerp, ram, wudi
from samerge_ext.methods.arcee_fusion import ArceeFusion
from samerge_ext.methods.breadcrumbs import GAMMA, Breadcrumbs
from samerge_ext.methods.consensus import AGREEING, MASK_LAMBDA, Consensus
from samerge_ext.methods.dare import Dare
from samerge_ext.methods.della import Della
from samerge_ext.methods.karcher import Karcher
from samerge_ext.methods.model_stock import ModelStock
from samerge_ext.methods.multislerp import MultiSlerp
from samerge_ext.methods.nearswap import NearSwap
from samerge_ext.methods.nuslerp import NuSlerp
from samerge_ext.methods.ram import Ram
from samerge_ext.methods.sce import Sce
from samerge_ext.methods.slerp import Slerp
from samerge_ext.methods.ties import Ties
from samerge_ext.methods.wudi import Wudi
from samerge_ext.packing.matrices import stack_of
from samerge_ext.recipes.parameters import VALUES, seed
from samerge_ext.recipes.tensor_settings import resolve


@dataclass
class Given:
    """A tensor, or all of them as one vector, called "", and what a recipe says of it.

    names: of the tensors that the rule is for. dtype: that they are merged in. count: of the models whose rows a piece has.
    shared: parameters for all. lookup: a tensor's name, and None or one of the models -> what stands before these, the name and
        the depth that they are resolved with (`tensor_settings.resolve`).
    added: a model that is none of the recipe's, and whose weight has to be given.
    """

    method: str
    name: str
    names: Sequence[str]
    shape: torch.Size
    dtype: torch.dtype
    count: int
    shared: Mapping[str, Any]
    lookup: Callable[[str, int | None], tuple[list[Mapping[str, Any]], str, float]]
    added: int | None = None

    @property
    def seed(self) -> int:
        """Of what is random."""
        return seed(self.shared.get("seed", 0))

    def one(self, key: str, default: Any) -> Any:
        """A parameter for all. Raises ValueError where it has no value and no default."""
        return self._value(key, None, default)

    def each(self, key: str, default: Any) -> list:
        """A parameter of every model."""
        return [self._value(key, model, None if model == self.added else default) for model in range(self.count)]

    def _value(self, key: str, model: int | None, default: Any) -> Any:
        found = set()
        for tensor in self.names:
            sources, name, depth = self.lookup(tensor, model)
            found.add(resolve(key, [*sources, self.shared], name, depth, VALUES[key]))
        if len(found) > 1:
            raise ValueError(f"{key} differs between tensors; trimming the whole vector needs one value for all")
        (one,) = found
        if one is None and default is None:
            whose = "" if model is None else " for every model"
            raise ValueError(f"{self.method} needs '{key}'{whose}; '{self.names[0]}' has none")
        return default if one is None else one


def _combination(given: Given, normalize: bool, elect: bool, weight: float | None = None) -> Combination:
    return Combination(
        given.each("weight", weight), given.one("lambda", 1.0), normalize=given.one("normalize", normalize), elect=elect
    )


def _linear(given: Given) -> Rule:
    weights, normalize = given.each("weight", 1.0), given.one("normalize", True)
    if normalize and sum(weights) == 0:
        raise ValueError("linear divides by the sum of the weights, which is 0; set normalize to false")
    return Combination(weights, normalize=normalize)


def _ties(given: Given) -> Rule:
    combination = _combination(given, True, True)
    return Ties(given.shape.numel(), given.dtype, given.each("density", 1.0), combination, given.one("rescale", False))


def _dare(given: Given, elect: bool) -> Rule:
    combination = _combination(given, False, elect)
    return Dare(given.name, given.each("density", 1.0), given.seed, combination, given.one("rescale", True))


def _nuslerp(given: Given) -> Rule:
    over: Over = "tensor"
    if not given.one("nuslerp_flatten", True):
        over = "columns" if given.one("nuslerp_row_wise", False) else "rows"
    return NuSlerp(given.shape, given.each("weight", None), over)


def _multislerp(given: Given) -> Rule:
    normalize, epsilon = given.one("normalize_weights", True), given.one("eps", multislerp.EPSILON)
    return MultiSlerp(given.name, given.shape, given.each("weight", None), normalize, epsilon)


def _breadcrumbs(given: Given, elect: bool) -> Rule:
    densities, gammas = given.each("density", 1.0), given.each("gamma", GAMMA)
    combination = _combination(given, False, elect)
    return Breadcrumbs(given.shape.numel(), given.dtype, densities, gammas, combination, given.one("rescale", False))


def _della(given: Given, elect: bool) -> Rule:
    densities, epsilons = given.each("density", 1.0), given.each("epsilon", della.EPSILON)
    combination = _combination(given, elect, elect)
    return Della(given.name, given.shape, densities, epsilons, given.seed, combination, given.one("rescale", True))


def _karcher(given: Given) -> Rule:
    steps, tolerance = given.one("max_iter", karcher.MAX_ITER), given.one("tol", karcher.TOLERANCE)
    return Karcher(given.shape, given.count, int(steps), tolerance)


def _wudi(given: Given) -> Rule:
    scale = given.one("lambda", 1.0)
    if len(stack_of(given.name, given.shape)[1]) < 2:
        return Combination([scale] * given.count)
    ridge, turned = given.one("ridge", wudi.RIDGE), given.one("transposed", False)
    return Wudi(given.name, given.shape, given.count, ridge, scale, turned)


def _ram(given: Given, r: float) -> Rule:
    return Ram(given.count, given.one("epsilon", ram.EPSILON), r, given.one("alpha", ram.ALPHA))


RULES: dict[str, Callable[[Given], Rule]] = {
    "linear": _linear,
    "task_arithmetic": lambda given: _combination(given, False, False, weight=0.3),
    "ties": _ties,
    "dare_linear": lambda given: _dare(given, False),
    "dare_ties": lambda given: _dare(given, True),
    "breadcrumbs": lambda given: _breadcrumbs(given, False),
    "breadcrumbs_ties": lambda given: _breadcrumbs(given, True),
    "della": lambda given: _della(given, True),
    "della_linear": lambda given: _della(given, False),
    "slerp": lambda given: Slerp(given.shape, given.one("t", None)),
    "nuslerp": _nuslerp,
    "multislerp": _multislerp,
    "karcher": _karcher,
    "model_stock": lambda given: ModelStock(given.shape, given.count, given.one("filter_wise", False)),
    "sce": lambda given: Sce(given.shape.numel(), given.dtype, given.count, given.one("select_topk", 1.0)),
    "nearswap": lambda given: NearSwap(given.one("t", None)),
    "arcee_fusion": lambda given: ArceeFusion(given.shape),
    "passthrough": lambda given: Combination(given.each("scale", 1.0)),
    "ram": lambda given: _ram(given, 0.0),
    "ramplus_tl": lambda given: _ram(given, given.one("r", ram.R)),
    "wudi": _wudi,
    "consensus": lambda given: Consensus(
        given.count, given.one("lambda", 0.3), given.one("mask_lambda", MASK_LAMBDA), given.one("agreeing", AGREEING)
    ),
}
