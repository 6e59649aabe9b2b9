"""Every operator in a few lines of plain PyTorch: the fallback on any device, and in fp64 the truth of the tests."""

from .coefficient_grad import coefficient_grad
from .elected_sum import elected_sum
from .gram_product import gram_product
from .moments import moments
from .softmax_kl import softmax_kl
from .weighted_sum import weighted_sum

__all__ = ["coefficient_grad", "elected_sum", "gram_product", "moments", "softmax_kl", "weighted_sum"]
