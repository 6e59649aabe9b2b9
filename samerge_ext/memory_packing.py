"""Packing models into tensors: the checks, then base and task vectors, quantised where asked, one layer at a time."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from samerge_ext.layout import Layout
from samerge_ext.quantised import check_form, empty_task_vectors
from samerge_ext.sources import Source, matches
from samerge_ext.validation import check_sources, shared_names

if TYPE_CHECKING:
    from samerge_ext.packing import PackedWeights


def pack_into_memory(
    kind: type[PackedWeights],
    base: Source,
    experts: list[tuple[str, Source]],
    dtype: torch.dtype,
    task_vector_dtype: torch.dtype | str | None,
    device: torch.device | str,
    heads: str | Sequence[str],
) -> PackedWeights:
    """Checks everything, then packs tensor by tensor: what is held beside the packed weights is one tensor of each model."""
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    task_vector_dtype = task_vector_dtype or dtype
    quantised = isinstance(task_vector_dtype, str)
    check_form(task_vector_dtype)
    changed = check_sources(base, experts, heads, dtype, dtype if quantised else task_vector_dtype)

    fields = outline(base, experts, heads, changed, dtype, device)
    numel = fields["layout"].numel
    packed = kind(
        **fields,
        base=torch.zeros(numel, dtype=dtype, device=device),
        task_vectors=empty_task_vectors(len(experts), numel, task_vector_dtype, device),
        experts=dict(experts) if quantised else {},
    )
    _fill(packed, base, experts)
    return packed


def outline(
    base: Source,
    experts: list[tuple[str, Source]],
    heads: tuple[str, ...],
    changed: Collection[str],
    dtype: torch.dtype,
    device: torch.device | str,
) -> dict[str, Any]:
    """The fields of packed weights but for base and task vectors: the layout, and copies of all that is not packed.

    changed: the layers that have a task vector.
    """
    shared = shared_names(base, heads)
    layers = [name for name in shared if not base.is_buffer(name)]
    buffers = {name: base.read(name).clone() for name in shared if base.is_buffer(name)}
    float_buffers = [name for name, buffer in buffers.items() if buffer.is_floating_point()]
    shapes, dtypes = [base.shape(name) for name in layers], [base.dtype(name) for name in layers]
    return {
        "layout": Layout.build(layers, shapes, dtypes, [name in changed for name in layers], device),
        "tasks": tuple(task for task, _ in experts),
        "unchanged": {name: base.read(name).to(device, dtype, copy=True) for name in layers if name not in changed},
        "aliases": {alias: name for alias, name in base.aliases.items() if name in layers},
        "buffers": buffers,
        "expert_buffers": {task: {name: expert.read(name).clone() for name in float_buffers} for task, expert in experts},
        "heads": {
            task: {name: expert.read(name).clone() for name in expert.names if matches(name, heads)} for task, expert in experts
        },
    }


def _fill(packed: PackedWeights, base: Source, experts: list[tuple[str, Source]]) -> None:
    """Writes base and task vectors, one tensor at a time."""
    views, stored = packed.layout.views(packed.base), packed.task_vectors
    rows = [packed.layout.views(row) for row in stored] if isinstance(stored, Tensor) else []
    for name, view in views.items():
        pretrained = base.read(name).to(packed.base.device, packed.coefficient_dtype)
        view.copy_(pretrained)
        for row, (_, expert) in zip(rows, experts, strict=bool(rows)):
            torch.sub(expert.read(name).to(pretrained), pretrained, out=row[name])
        if not rows:
            _quantise(packed, name, pretrained, experts)


def _quantise(packed: PackedWeights, name: str, pretrained: Tensor, experts: list[tuple[str, Source]]) -> None:
    """Writes one tensor of all quantised task vectors; with an offset, which is their mean, experts are read twice."""
    store, start = packed.task_vectors, packed.layout.offsets[packed.layout.names.index(name)]
    try:
        offset = None
        if store.shared:
            at = "the experts' mean"
            mean = torch.zeros_like(pretrained)
            for _, expert in experts:
                mean += (expert.read(name).to(pretrained) - pretrained) / len(experts)
            offset = store.write_shared(start, mean.flatten()).view_as(mean)
        for task, (_, expert) in enumerate(experts):
            at = expert.label
            task_vector = expert.read(name).to(pretrained) - pretrained
            store.write(task, start, task_vector if offset is None else task_vector - offset)
    except ValueError as error:
        raise ValueError(f"{at}: '{name}' minus the base's cannot be quantised: {error}") from error
