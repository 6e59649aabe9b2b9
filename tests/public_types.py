"""What a type checker makes of the public names: read by mypy in `make lint`, and never run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, assert_type

import torch
from torch import Tensor, nn

import samerge_ext as sm


class Classifier(nn.Module):
    pass


def logits(module: nn.Module, batch: Any, task: str) -> Tensor:
    return module(batch)


def packing(base: nn.Module, tensors: dict[str, Tensor]) -> None:
    packed = sm.PackedWeights.from_folders("base", {"news": "experts/news"}, file="packed.safetensors")
    assert_type(packed, sm.PackedWeights)
    assert_type(sm.PackedWeights.from_modules(base, {"news": base}), sm.PackedWeights)
    assert_type(sm.PackedWeights.from_state_dicts(tensors, [("news", tensors)]), sm.PackedWeights)
    assert_type(sm.PackedWeights.open("packed.safetensors"), sm.PackedWeights)
    assert_type(packed.layout, sm.Layout)
    assert_type(packed.base, Tensor)
    assert_type(packed.exact_task_vectors("this"), Tensor)
    assert_type(packed.tasks, tuple[str, ...])


def writing() -> None:
    assert_type(sm.save_dcp("merged", "dcp", key=None), Path)


def learning(module: nn.Module, packed: sm.PackedWeights, batches: dict[str, Sequence[Tensor]]) -> None:
    result = sm.samerging(module, packed, batches, logits, config=sm.SAMergingConfig(rho=0.05))
    assert_type(result, sm.Result)
    assert_type(result.merged, Tensor | None)
    assert_type(sm.adamerging(module, packed, batches, logits), sm.Result)
    assert_type(sm.statsmerging(module, packed, batches, logits, config=sm.StatsMergingConfig()), sm.Result)
    assert_type(result.learner, sm.StatsMergeLearner | None)
    conditioned = sm.distac(module, packed, batches, logits, norm="own", config=sm.DisTaCConfig(penalty=1.0))
    assert_type(conditioned, sm.PackedWeights)
    assert_type(sm.MergedModel(module, packed, 0.3).coefficients, nn.Parameter)
    encoder = sm.models.SharedEncoder(lambda module, batch: module(batch), lambda features, task: features)
    sm.samerging(module, packed, batches, encoder)
    assert_type(sm.models.causal_lm, sm.models.LanguageModel)
    sm.samerging(module, packed, batches, sm.models.causal_lm)
    sm.samerging(module, packed, batches, logits, config=sm.AdaMergingConfig())  # type: ignore[arg-type]
    sm.SAMergingConfig(temprature=2.0)  # type: ignore[call-arg]


def distilling(teacher: nn.Module, target: Classifier, data: list[Tensor]) -> None:
    student = sm.distill_expert(teacher, target, data, lambda m, x: m(x), lambda m, x: m(x), config=sm.DistillationConfig())
    assert_type(student, Classifier)


def after_a_merge(merged: sm.Result, batches: dict[str, list[Tensor]]) -> None:
    distilled = sm.distill_merged(merged, batches, logits, config=sm.MergedDistillationConfig(temperature=1.0))
    assert_type(sm.refit_heads(distilled, batches, logits, "classifier"), sm.Result)
    assert_type(sm.reestimate_batchnorm(distilled, batches, logits), sm.Result)


def without_data(packed: sm.PackedWeights) -> None:
    for result in (sm.average(packed), sm.task_arithmetic(packed, 0.3), sm.ties(packed, trim="vector"), sm.dare(packed)):
        assert_type(result, sm.Result)
    assert_type(sm.breadcrumbs(packed, rule="ties"), sm.Result)
    assert_type(sm.della(packed, [0.5, 0.4], epsilon=0.1), sm.Result)
    assert_type(sm.nuslerp(packed, [1.0, 2.0], over="rows"), sm.Result)
    assert_type(sm.align_norms(sm.trimmed(packed)), sm.PackedWeights)
    assert_type(sm.emr(packed, "published").merge("news"), sm.Result)
    sm.ties(packed, trim="row")  # type: ignore[arg-type]


def operators(packed: sm.PackedWeights, rows: Tensor) -> None:
    with sm.use_backend("reference"):
        assert_type(sm.softmax_kl(rows, rows), Tensor)
    assert_type(sm.softmax_kl_with_grad(rows, rows), tuple[Tensor, Tensor])
    assert_type(sm.linear_softmax_kl(rows, rows, [rows, rows]), Tensor)
    assert_type(sm.layer_stats(packed), Tensor)
    assert_type(sm.svd_topk([rows], 2), Tensor)
    assert_type(sm.svd_topk([rows], 2, return_bound=True), tuple[Tensor, Tensor])
    assert_type(sm.svd_topk(rows, 2, vectors=True), tuple[Tensor, Tensor, Tensor])
    assert_type(sm.svd_topk([rows], 2, vectors=True)[0], Sequence[Tensor])
    assert_type(sm.svd_topk(rows, 2, return_bound=True, vectors=True)[3], Tensor)
    assert_type(sm.available(), dict[str, str | None])
    sm.softmax_kl(rows, teacher_temperature=2.0)  # type: ignore[call-arg]
    sm.layer_stats(torch.zeros(1))  # type: ignore[arg-type]
    sm.no_such_name  # type: ignore[attr-defined]  # noqa: B018
