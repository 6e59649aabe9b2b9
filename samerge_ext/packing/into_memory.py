"""Packing models into tensors: the checks, then base and task vectors, quantised where asked, one layer at a time."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samerge_ext.checkpoints.advice import some
from samerge_ext.checkpoints.alignment import Aligned, align
from samerge_ext.checkpoints.naming import is_derived_buffer
from samerge_ext.checkpoints.sources import Experts, Source, matches
from samerge_ext.packing.factors import LORA, FactoredTaskVectors, require_adapters
from samerge_ext.packing.layout import Layout
from samerge_ext.packing.quantised import FORMATS, QuantisedTaskVectors
from samerge_ext.packing.stores import Numbers
from samerge_ext.packing.validation import check_range, check_sources, check_tasks, is_finite, shared_names


def pack_into_memory(
    base: Source,
    experts: Experts,
    dtype: torch.dtype,
    task_vector_dtype: torch.dtype | str | None,
    device: torch.device | str,
    heads: str | Sequence[str],
    keep: str | Sequence[str] = (),
    folder: Path | None = None,
) -> dict[str, Any]:
    """The fields of packed weights. Checks everything, then packs tensor by tensor: what is held beside them is one tensor of
    each model. folder: of the base, where it is from one."""
    task_vector_dtype = task_vector_dtype or dtype
    models = aligned(base, experts, heads, keep, folder)
    base, experts = models.base, models.experts
    check_form(task_vector_dtype, experts)
    changed = check_sources(base, experts, models.heads, dtype, stored_dtype(dtype, task_vector_dtype))

    fields = outline(models, changed, dtype, device)
    layout: Layout = fields["layout"]
    packed = torch.zeros(layout.numel, dtype=dtype, device=device)  # [N]
    task_vectors = empty_task_vectors(experts, layout, dtype, task_vector_dtype, device)  # [T, N]
    _fill(layout, packed, task_vectors, base, experts)
    kept = dict(experts) if task_vector_dtype in FORMATS else {}
    return {**fields, "base": packed, "task_vectors": task_vectors, "experts": kept}


def check_form(form: torch.dtype | str, experts: Experts) -> None:
    """Raises ValueError unless task vectors of these experts can be kept in it."""
    if not isinstance(form, torch.dtype) and form not in (*FORMATS, LORA):
        raise ValueError(
            f"task_vector_dtype={form!r}; choose a torch.dtype or one of {', '.join(FORMATS)}, or {LORA} where all experts are "
            "LoRA adapters"
        )
    if form == LORA:
        require_adapters(experts)


def stored_dtype(dtype: torch.dtype, form: torch.dtype | str) -> torch.dtype:
    """The dtype whose range task vectors must fit."""
    return form if isinstance(form, torch.dtype) else dtype


def empty_task_vectors(
    experts: Experts, layout: Layout, dtype: torch.dtype, form: torch.dtype | str, device: torch.device | str
) -> Numbers:
    """Room for the task vectors of the experts; factors are there already."""
    if isinstance(form, torch.dtype):
        return torch.zeros(len(experts), layout.numel, dtype=form, device=device)
    if form == LORA:
        return FactoredTaskVectors.of(require_adapters(experts), layout, torch.promote_types(dtype, torch.float32))
    return QuantisedTaskVectors.zeros(len(experts), layout.numel, form, device)


def aligned(
    base: Source, experts: Experts, heads: str | Sequence[str], keep: str | Sequence[str], folder: str | Path | None
) -> Aligned:
    """The models under one set of names; raises ValueError where they do not agree, and for kept tensors that the base lacks."""
    check_tasks([task for task, _ in experts])
    heads, keep = ((patterns,) if isinstance(patterns, str) else patterns for patterns in (heads, keep))
    models = align(base, experts, heads, keep, folder)
    if models.host is not None:
        lacking = [name for name in models.kept if name not in base]
        raise ValueError(
            f"keep: {base.label} lacks {some(lacking)} of expert '{models.host}', and packed weights are the base's tensors; "
            "merge from file to file by a method that learns nothing (task_arithmetic, ties …), or put them into the base"
        )
    return models


def outline(models: Aligned, changed: Collection[str], dtype: torch.dtype, device: torch.device | str) -> dict[str, Any]:
    """The fields of packed weights but for base and task vectors: the layout, and copies of all that is not packed.

    changed: the layers that have a task vector.
    """
    base, experts, heads = models.base, models.experts, models.heads
    shared = shared_names(base, heads)
    layers = [name for name in shared if not base.is_buffer(name)]
    buffers = {name: base.read(name).clone() for name in shared if base.is_buffer(name)}
    own = [name for name, buffer in buffers.items() if buffer.is_floating_point() and not is_derived_buffer(name, buffer.shape)]
    shapes, dtypes = [base.shape(name) for name in layers], [base.weight_dtype(name) for name in layers]
    return {
        "layout": Layout.build(layers, shapes, dtypes, [name in changed for name in layers], device),
        "tasks": tuple(task for task, _ in experts),
        "unchanged": {name: _unchanged(base, name, dtype).to(device) for name in layers if name not in changed},
        "aliases": {alias: name for alias, name in base.aliases.items() if name in layers},
        "buffers": buffers,
        "expert_buffers": {task: {name: expert.read(name).clone() for name in own} for task, expert in experts},
        "heads": {
            task: {name: expert.read(name).clone() for name in expert.names if matches(name, heads)} for task, expert in experts
        },
    }


def _unchanged(base: Source, name: str, dtype: torch.dtype) -> Tensor:
    tensor = base.read(name)
    kept = tensor.to(dtype, copy=True)
    if dtype == torch.float16 and is_finite(tensor):
        check_range(f"{base.label}: '{name}'", kept)
    return kept


def _fill(layout: Layout, packed: Tensor, stored: Numbers, base: Source, experts: Experts) -> None:
    """Writes base [N] and task vectors [T, N], one tensor at a time."""
    rows = [layout.views(row) for row in stored] if isinstance(stored, Tensor) else []
    wide = torch.float64 if packed.dtype == torch.float64 else torch.float32
    for name, view in layout.views(packed).items():
        pretrained = base.read(name).to(packed.device, wide)
        view.copy_(pretrained)
        if view.dtype == torch.float16:  # the other types have the range of fp32
            check_range(f"{base.label}: '{name}'", view)
        for row, (_, expert) in zip(rows, experts, strict=bool(rows)):
            torch.sub(expert.read(name).to(pretrained), pretrained, out=row[name])
            if row[name].dtype == torch.float16:
                check_range(f"{expert.label}: '{name}' minus the base's", row[name])
        if isinstance(stored, QuantisedTaskVectors):
            extent = layout.extent(layout.names.index(name))
            quantise(stored.narrow(*extent), name, pretrained, experts)


def quantise(layer: QuantisedTaskVectors, name: str, pretrained: Tensor, experts: Experts) -> None:
    """Writes one layer of all task vectors; with an offset, which is their mean, experts are read twice."""
    try:
        offset = None
        if layer.shared:
            at = "the experts' mean"
            mean, count = torch.zeros_like(pretrained), pretrained.new_tensor(len(experts))  # see `_quantised`
            for _, expert in experts:
                mean += (expert.read(name).to(pretrained) - pretrained) / count
            offset = layer.write_shared(0, mean.flatten()).view_as(mean)
        for task, (_, expert) in enumerate(experts):
            at = expert.label
            task_vector = expert.read(name).to(pretrained) - pretrained
            layer.write(task, 0, task_vector if offset is None else task_vector - offset)
    except ValueError as error:
        raise ValueError(f"{at}: '{name}' minus the base's cannot be quantised: {error}") from error
