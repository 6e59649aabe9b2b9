"""Putting our classes in the place of FusionBench's, which modules with its names stand for."""

import sys
import types

import fusion_bench_names
import pytest
import torch
from fusion_bench_names import LayerWise, TaskWise
from torch import nn

from samerge_ext.integrations import fusion_bench
from samerge_ext.integrations.fusion_bench import LayerWiseMergedModel, TaskWiseMergedModel


@pytest.fixture
def stand_in(monkeypatch):
    """The modules that define FusionBench's classes, and one that imported one of them under another name."""
    layer, task = fusion_bench_names.put_in_place(monkeypatch)
    user = types.ModuleType("a_user_of_fusion_bench")
    user.Merged = layer.LayerWiseMergedModel
    monkeypatch.setitem(sys.modules, user.__name__, user)
    yield layer, task, user
    fusion_bench.restore()


def test_accelerate_puts_the_classes_everywhere_and_restore_takes_them_away(stand_in):
    layer, task, user = stand_in
    with fusion_bench.accelerate():
        assert layer.LayerWiseMergedModel is user.Merged is LayerWiseMergedModel
        assert task.TaskWiseMergedModel is TaskWiseMergedModel
        with fusion_bench.accelerate():
            pass
        assert user.Merged is LayerWiseMergedModel  # the inner block was not what put it there
        task.imported_since = layer.LayerWiseMergedModel
        task.LayerWiseMergedModel = layer.LayerWiseMergedModel
    assert layer.LayerWiseMergedModel is user.Merged is task.LayerWiseMergedModel is task.imported_since is LayerWise
    assert task.TaskWiseMergedModel is TaskWise
    assert fusion_bench.LayerWiseMergedModel is LayerWiseMergedModel  # in our own module nothing moves
    fusion_bench.accelerate()
    assert user.Merged is LayerWiseMergedModel
    fusion_bench.restore()
    fusion_bench.restore()
    assert user.Merged is LayerWise


def test_accelerate_with_narrower_task_vectors(stand_in):
    layer, _, _ = stand_in

    def type_of_task_vectors():
        models = [nn.Linear(2, 2) for _ in range(3)]
        merged = layer.LayerWiseMergedModel(torch.full((2, 2), 0.3), models[0], models[1:])
        return {p.dtype for p in merged.task_vectors.parameters()}, merged.merge_weights()["weight"].dtype

    with fusion_bench.accelerate(task_vector_dtype=torch.bfloat16):
        assert type_of_task_vectors() == ({torch.bfloat16}, torch.float32)
        with fusion_bench.accelerate():
            assert type_of_task_vectors()[0] == {torch.bfloat16}
        with pytest.raises(ValueError, match=r"float16 within another accelerate\(\); call restore\(\)"):
            fusion_bench.accelerate(task_vector_dtype=torch.float16)
    with fusion_bench.accelerate():
        assert type_of_task_vectors() == ({torch.float32}, torch.float32)


def test_accelerate_refuses_classes_with_other_arguments(stand_in):
    class Newer(nn.Module):
        def __init__(self, task_wise_weight, pretrained_model, finetuned_models, offset=0.0):
            super().__init__()

    layer, task, user = stand_in
    task.TaskWiseMergedModel = Newer
    with pytest.raises(ImportError, match=r"from \(task_wise_weight, .*, offset\), and ours from .*fusion-bench==0.2.33"):
        fusion_bench.accelerate()
    assert user.Merged is layer.LayerWiseMergedModel is LayerWise
    task.TaskWiseMergedModel = TaskWise
    with fusion_bench.accelerate():
        assert user.Merged is LayerWiseMergedModel


def test_accelerate_says_where_fusion_bench_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "fusion_bench", None)
    with pytest.raises(ImportError, match="pip install fusion-bench==0.2.33"):
        fusion_bench.accelerate()
