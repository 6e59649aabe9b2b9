"""Learned model merging in PyTorch with C++ and CUDA operators.

The operators are imported with the package; everything built on them is imported when it is first used, so that
`import samerge_ext` costs little more than `import torch`.
"""

import importlib

from . import ops
from .backend import available, use_backend
from .ops import (
    argmax_cross_entropy,
    argmax_cross_entropy_with_grad,
    coefficient_grad,
    entropy,
    entropy_with_grad,
    layer_stats,
    softmax_kl,
    softmax_kl_with_grad,
    svd_topk,
    weighted_sum,
)

__version__ = "0.1.0"

_LAZY = {  # public name -> module that defines it
    "Layout": "packing.layout",
    "PackedWeights": "packing.packed_weights",
    "MergedModel": "merged.model",
    "Result": "merged.result",
    "SAMergingConfig": "methods.samerging",
    "AdaMergingConfig": "methods.adamerging",
    "samerging": "methods.samerging",
    "adamerging": "methods.adamerging",
    "StatsMergingConfig": "methods.statsmerging",
    "StatsMergeLearner": "statistics.learner",
    "statsmerging": "methods.statsmerging",
    "DistillationConfig": "methods.distillation",
    "distill_expert": "methods.distillation",
    "apply_learner": "methods.statsmerging",
    "task_arithmetic": "methods.arithmetic",
    "average": "methods.arithmetic",
    "ties": "methods.ties",
    "trimmed": "methods.ties",
    "dare": "methods.dare",
    "align_norms": "methods.distac",
    "CompatibilityWarning": "checkpoints.compatibility",
}
_LAZY_MODULES = ("models",)

__all__ = [
    "argmax_cross_entropy",
    "argmax_cross_entropy_with_grad",
    "available",
    "coefficient_grad",
    "entropy",
    "entropy_with_grad",
    "layer_stats",
    "ops",
    "softmax_kl",
    "softmax_kl_with_grad",
    "svd_topk",
    "use_backend",
    "weighted_sum",
    *_LAZY,
    *_LAZY_MODULES,
]


def __getattr__(name: str):
    if name in _LAZY:
        value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    elif name in _LAZY_MODULES:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})
