"""Packing models into tensors: the checks, then base and task vectors, quantised where asked, one layer at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from samerge_ext.layout import Layout
from samerge_ext.quantised import check_form, empty_task_vectors
from samerge_ext.sources import Source, matches
from samerge_ext.validation import check_sources

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

    layers = [name for name in base.names if not (base.is_buffer(name) or matches(name, heads))]
    layout = Layout.build(
        layers,
        [base.shape(n) for n in layers],
        [base.dtype(n) for n in layers],
        [n in changed for n in layers],
        device,
    )
    packed = kind(
        layout=layout,
        tasks=tuple(task for task, _ in experts),
        base=torch.zeros(layout.numel, dtype=dtype, device=device),
        task_vectors=empty_task_vectors(len(experts), layout.numel, task_vector_dtype, device),
        unchanged={n: base.read(n).to(device=device, dtype=dtype, copy=True) for n in layers if n not in changed},
        aliases={alias: name for alias, name in base.aliases.items() if name in set(layers)},
        buffers={n: base.read(n).clone() for n in base.names if base.is_buffer(n) and not matches(n, heads)},
        experts=dict(experts) if quantised else {},
    )
    _fill(packed, base, experts)

    float_buffers = [n for n, b in packed.buffers.items() if b.is_floating_point()]
    for task, expert in experts:
        packed.expert_buffers[task] = {n: expert.read(n).clone() for n in float_buffers}
        packed.heads[task] = {n: expert.read(n).clone() for n in expert.names if matches(n, heads)}
    return packed


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
