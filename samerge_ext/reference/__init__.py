"""Every operator in a few lines of plain PyTorch: the fallback on any device, and in fp64 the truth of the tests."""

from .coefficient_grad import coefficient_grad
from .component_sum import component_grad, component_sum
from .count_digits import count_digits
from .drop import drop
from .elected_sum import elected_sum
from .gram_product import gram_product
from .linear_softmax_kl import linear_softmax_kl
from .moments import moments
from .next_digit import next_digit
from .softmax_kl import softmax_kl
from .trim import trim
from .weighted_sum import weighted_sum

__all__ = [
    "coefficient_grad",
    "component_grad",
    "component_sum",
    "count_digits",
    "drop",
    "elected_sum",
    "gram_product",
    "linear_softmax_kl",
    "moments",
    "next_digit",
    "softmax_kl",
    "trim",
    "weighted_sum",
]
