"""Modules that have the names of FusionBench's, and in them the classes that ours take the place of: for tests without it."""

import sys
import types

from torch import nn


class LayerWise(nn.Module):
    def __init__(
        self,
        layer_wise_weight,
        pretrained_model,
        finetuned_models,
        clamp_weights=True,
        tie_weights=False,
        strict=True,
        sparsity_ratio=None,
        normalized_merging_weights=False,
    ):
        raise AssertionError("FusionBench's own class was used")


class TaskWise(nn.Module):
    def __init__(
        self,
        task_wise_weight,
        pretrained_model,
        finetuned_models,
        clamp_weights=True,
        tie_weights=False,
        strict=True,
        task_vector_dtype=None,
    ):
        raise AssertionError("FusionBench's own class was used")


def put_in_place(monkeypatch):
    """The modules that define the two classes, until the test ends."""
    for name in ("fusion_bench", "fusion_bench.models", "fusion_bench.models.wrappers"):
        package = types.ModuleType(name)
        package.__path__ = []
        monkeypatch.setitem(sys.modules, name, package)
    layer, task = (types.ModuleType(f"fusion_bench.models.wrappers.{name}_wise_fusion") for name in ("layer", "task"))
    for module in (layer, task):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    layer.LayerWiseMergedModel, task.TaskWiseMergedModel = LayerWise, TaskWise
    return layer, task
