"""The operators: public functions, their schemas and their autograd formulas."""

from .coefficient_grad import coefficient_grad
from .component_sum import component_grad, component_sum
from .elected_sum import elected_sum
from .gram_product import gram_product, moments
from .layer_stats import layer_stats
from .linear_softmax_kl import linear_argmax_cross_entropy, linear_entropy, linear_softmax_kl
from .merged_linear_softmax_kl import merged_linear_softmax_kl
from .softmax_kl import (
    argmax_cross_entropy,
    argmax_cross_entropy_with_grad,
    entropy,
    entropy_with_grad,
    softmax_kl,
    softmax_kl_with_grad,
)
from .svd_topk import svd_topk
from .weighted_sum import weighted_sum

__all__ = [
    "argmax_cross_entropy",
    "argmax_cross_entropy_with_grad",
    "coefficient_grad",
    "component_grad",
    "component_sum",
    "elected_sum",
    "entropy",
    "entropy_with_grad",
    "gram_product",
    "layer_stats",
    "linear_argmax_cross_entropy",
    "linear_entropy",
    "linear_softmax_kl",
    "merged_linear_softmax_kl",
    "moments",
    "softmax_kl",
    "softmax_kl_with_grad",
    "svd_topk",
    "weighted_sum",
]
