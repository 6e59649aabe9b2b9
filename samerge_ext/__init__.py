"""Learned model merging in PyTorch with C++ and CUDA operators.

Everything is imported when it is first used, torch too, so that what needs no tensor (`samerge --help`, a recipe that is
refused) does not wait for it. The operators are registered, as `torch.ops.samerge`, by `samerge_ext.ops`.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_LAZY = {  # public name -> module that defines it
    "Layout": "packing.layout",
    "PackedWeights": "packing.packed_weights",
    "MergedModel": "merged.model",
    "Result": "merged.result",
    "SAMergingConfig": "methods.configs",
    "AdaMergingConfig": "methods.configs",
    "samerging": "methods.samerging",
    "adamerging": "methods.adamerging",
    "StatsMergingConfig": "methods.configs",
    "StatsMergeLearner": "statistics.learner",
    "statsmerging": "methods.statsmerging",
    "DistillationConfig": "methods.distillation",
    "distill_expert": "methods.distillation",
    "apply_learner": "methods.statsmerging",
    "task_arithmetic": "methods.arithmetic",
    "average": "methods.arithmetic",
    "ties": "methods.ties",
    "trimmed": "methods.ties",
    "preconditioned": "methods.wudi",
    "wudi": "methods.wudi",
    "tsv_m": "methods.tsv",
    "iso_c": "methods.isotropic",
    "iso_cts": "methods.isotropic",
    "knots": "methods.knots",
    "regmean": "methods.regmean",
    "reestimate_batchnorm": "methods.reestimate_batchnorm",
    "refit_heads": "methods.refit_heads",
    "MergedDistillationConfig": "methods.distill_merged",
    "distill_merged": "methods.distill_merged",
    "subspace_boosting": "methods.boosting",
    "svc": "methods.svc",
    "dare": "methods.dare",
    "slerp": "methods.slerp",
    "nuslerp": "methods.nuslerp",
    "multislerp": "methods.multislerp",
    "karcher": "methods.karcher",
    "model_stock": "methods.model_stock",
    "breadcrumbs": "methods.breadcrumbs",
    "della": "methods.della",
    "sce": "methods.sce",
    "nearswap": "methods.nearswap",
    "arcee_fusion": "methods.arcee_fusion",
    "ram": "methods.ram",
    "consensus": "methods.consensus",
    "emr": "methods.emr",
    "align_norms": "methods.distac",
    "distac": "methods.distac",
    "DisTaCConfig": "methods.distac",
    "CompatibilityWarning": "checkpoints.compatibility",
    "save_dcp": "checkpoints.dcp_writing",
    "TokenRow": "checkpoints.tokenizers",
    "TokenizerConfig": "checkpoints.tokenizers",
    "available": "backend",
    "use_backend": "backend",
    "argmax_cross_entropy": "ops.softmax_kl",
    "argmax_cross_entropy_with_grad": "ops.softmax_kl",
    "coefficient_grad": "ops.coefficient_grad",
    "entropy": "ops.softmax_kl",
    "entropy_with_grad": "ops.softmax_kl",
    "layer_stats": "ops.layer_stats",
    "linear_argmax_cross_entropy": "ops.linear_softmax_kl",
    "linear_entropy": "ops.linear_softmax_kl",
    "linear_softmax_kl": "ops.linear_softmax_kl",
    "merged_linear_softmax_kl": "ops.merged_linear_softmax_kl",
    "softmax_kl": "ops.softmax_kl",
    "softmax_kl_with_grad": "ops.softmax_kl",
    "svd_topk": "ops.svd_topk",
    "weighted_sum": "ops.weighted_sum",
}
_LAZY_MODULES = ("backend", "models", "ops")

__all__ = [
    "AdaMergingConfig",
    "CompatibilityWarning",
    "DisTaCConfig",
    "DistillationConfig",
    "Layout",
    "MergedDistillationConfig",
    "MergedModel",
    "PackedWeights",
    "Result",
    "SAMergingConfig",
    "StatsMergeLearner",
    "StatsMergingConfig",
    "TokenRow",
    "TokenizerConfig",
    "adamerging",
    "align_norms",
    "apply_learner",
    "arcee_fusion",
    "argmax_cross_entropy",
    "argmax_cross_entropy_with_grad",
    "available",
    "average",
    "breadcrumbs",
    "coefficient_grad",
    "consensus",
    "dare",
    "della",
    "distac",
    "distill_expert",
    "distill_merged",
    "emr",
    "entropy",
    "entropy_with_grad",
    "iso_c",
    "iso_cts",
    "karcher",
    "knots",
    "layer_stats",
    "linear_argmax_cross_entropy",
    "linear_entropy",
    "linear_softmax_kl",
    "merged_linear_softmax_kl",
    "model_stock",
    "models",
    "multislerp",
    "nearswap",
    "nuslerp",
    "ops",
    "preconditioned",
    "ram",
    "reestimate_batchnorm",
    "refit_heads",
    "regmean",
    "samerging",
    "save_dcp",
    "sce",
    "slerp",
    "softmax_kl",
    "softmax_kl_with_grad",
    "statsmerging",
    "subspace_boosting",
    "svc",
    "svd_topk",
    "task_arithmetic",
    "ties",
    "trimmed",
    "tsv_m",
    "use_backend",
    "weighted_sum",
    "wudi",
]

if TYPE_CHECKING:  # the names of `_LAZY` and `_LAZY_MODULES`, for type checkers and editors
    from . import backend as backend
    from . import models, ops
    from .backend import available, use_backend
    from .checkpoints.compatibility import CompatibilityWarning
    from .checkpoints.dcp_writing import save_dcp
    from .checkpoints.tokenizers import TokenizerConfig, TokenRow
    from .merged.model import MergedModel
    from .merged.result import Result
    from .methods.adamerging import adamerging
    from .methods.arcee_fusion import arcee_fusion
    from .methods.arithmetic import average, task_arithmetic
    from .methods.boosting import subspace_boosting
    from .methods.breadcrumbs import breadcrumbs
    from .methods.configs import AdaMergingConfig, SAMergingConfig, StatsMergingConfig
    from .methods.consensus import consensus
    from .methods.dare import dare
    from .methods.della import della
    from .methods.distac import DisTaCConfig, align_norms, distac
    from .methods.distill_merged import MergedDistillationConfig, distill_merged
    from .methods.distillation import DistillationConfig, distill_expert
    from .methods.emr import emr
    from .methods.isotropic import iso_c, iso_cts
    from .methods.karcher import karcher
    from .methods.knots import knots
    from .methods.model_stock import model_stock
    from .methods.multislerp import multislerp
    from .methods.nearswap import nearswap
    from .methods.nuslerp import nuslerp
    from .methods.ram import ram
    from .methods.reestimate_batchnorm import reestimate_batchnorm
    from .methods.refit_heads import refit_heads
    from .methods.regmean import regmean
    from .methods.samerging import samerging
    from .methods.sce import sce
    from .methods.slerp import slerp
    from .methods.statsmerging import apply_learner, statsmerging
    from .methods.svc import svc
    from .methods.ties import ties, trimmed
    from .methods.tsv import tsv_m
    from .methods.wudi import preconditioned, wudi
    from .ops.coefficient_grad import coefficient_grad
    from .ops.layer_stats import layer_stats
    from .ops.linear_softmax_kl import linear_argmax_cross_entropy, linear_entropy, linear_softmax_kl
    from .ops.merged_linear_softmax_kl import merged_linear_softmax_kl
    from .ops.softmax_kl import (
        argmax_cross_entropy,
        argmax_cross_entropy_with_grad,
        entropy,
        entropy_with_grad,
        softmax_kl,
        softmax_kl_with_grad,
    )
    from .ops.svd_topk import svd_topk
    from .ops.weighted_sum import weighted_sum
    from .packing.layout import Layout
    from .packing.packed_weights import PackedWeights
    from .statistics.learner import StatsMergeLearner
else:  # a type checker that saw it would take any name for one of the package's

    def __getattr__(name: str):
        if name in _LAZY:
            value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
        elif name in _LAZY_MODULES:
            value = importlib.import_module(f"{__name__}.{name}")
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_LAZY_MODULES})
