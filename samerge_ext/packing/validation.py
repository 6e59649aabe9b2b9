"""What must hold of a base and its experts before anything is packed."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from samerge_ext.checkpoints.sources import Source, matches
from samerge_ext.checkpoints.task_names import check_task_name

STORAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Experts = Sequence[tuple[str, Source]]


def check_sources(
    base: Source, experts: Experts, heads: tuple[str, ...], dtype: torch.dtype, task_vector_dtype: torch.dtype
) -> set[str]:
    """Raises ValueError for whatever could not be merged; returns the layers that at least one expert changed.

    Names, shapes and dtypes are compared first; values are read only when all of them agree.
    """
    check_headers(base, experts, heads, dtype, task_vector_dtype)
    return _check_values(base, experts, shared_names(base, heads))


def shared_names(base: Source, heads: tuple[str, ...]) -> list[str]:
    """The base's tensors that belong to no task."""
    return [name for name in base.names if not matches(name, heads)]


def check_headers(
    base: Source, experts: Experts, heads: tuple[str, ...], dtype: torch.dtype, task_vector_dtype: torch.dtype
) -> None:
    """As `check_sources`, without reading values."""
    for what, wanted in (("dtype", dtype), ("task_vector_dtype", task_vector_dtype)):
        if wanted not in STORAGE_DTYPES:
            raise ValueError(f"{what}={wanted} cannot hold packed weights; use float32, bfloat16 or float16")
    if (dtype == torch.float64) != (task_vector_dtype == torch.float64):
        raise ValueError(f"dtype={dtype} with task_vector_dtype={task_vector_dtype}; float64 goes with float64 only")
    _check_tasks(experts)
    shared = shared_names(base, heads)
    for _, expert in experts:
        _check_names(base, expert, shared, heads)
        _check_shapes(base, expert, shared)
    _check_heads(base, experts, heads)
    for source in (base, *(expert for _, expert in experts)):
        _check_dtypes(source, [name for name in shared if not base.is_buffer(name)])


def _check_tasks(experts: Experts) -> None:
    tasks = [task for task, _ in experts]
    if not tasks:
        raise ValueError("there are no experts to merge; pass {'task name': expert, …}")
    for task in tasks:
        check_task_name(task)
        if tasks.count(task) > 1:
            raise ValueError(f"two experts are named '{task}'; give every task its own name")


def _check_names(base: Source, expert: Source, shared: list[str], heads: tuple[str, ...]) -> None:
    missing = [name for name in shared if name not in expert]
    extra = [n for n in (*expert.names, *expert.aliases) if n not in base and not matches(n, heads)]
    if missing or extra:
        parts = [
            f"{label} {_some(names)}"
            for label, names in ((f"lacks {base.label}'s", missing), (f"has, and {base.label} lacks,", extra))
            if names
        ]
        raise ValueError(f"{expert.label} {'; and '.join(parts)}. {_head_advice(missing + extra)}")


def _check_shapes(base: Source, expert: Source, shared: list[str]) -> None:
    differ = [name for name in shared if expert.shape(name) != base.shape(name)]
    if differ:
        name = differ[0]
        raise ValueError(
            f"{expert.label}: '{name}' is {list(expert.shape(name))}, in {base.label} it is {list(base.shape(name))}"
            f"{f' ({len(differ) - 1} more tensors differ too)' if len(differ) > 1 else ''}. {_head_advice(differ)}"
        )


def _check_heads(base: Source, experts: Experts, heads: tuple[str, ...]) -> None:
    """A pattern fits a tensor of every expert, or the base's own head, which the merged model does without."""
    for pattern in heads:
        for _, expert in experts:
            if not any(matches(name, (pattern,)) for name in (*expert.names, *base.names)):
                last = _some(expert.names[-3:])
                raise ValueError(f"heads pattern '{pattern}' fits no tensor of {expert.label}, whose last tensors are {last}")


def _check_dtypes(source: Source, layers: list[str]) -> None:
    for name in layers:
        if source.dtype(name) not in STORAGE_DTYPES:
            raise ValueError(
                f"{source.label}: '{name}' is {source.dtype(name)}; weights must be float32, bfloat16, float16 or float64: "
                "dequantise the checkpoint first, or name a task's tensors in heads="
            )


def _check_values(base: Source, experts: Experts, shared: list[str]) -> set[str]:
    changed: set[str] = set()
    changed_by: set[str] = set()
    for name in shared:
        pretrained = base.read(name)
        check_finite(base, name, pretrained)
        for task, expert in experts:
            finetuned = expert.read(name)
            check_finite(expert, name, finetuned)
            if not base.is_buffer(name) and not torch.equal(*_widened(finetuned, pretrained)):
                changed.add(name)
                changed_by.add(task)
    for task, expert in experts:
        if task not in changed_by:
            raise ValueError(
                f"{expert.label} equals {base.label} in every tensor, so there is nothing of it to merge; "
                "check its path, or leave it out"
            )
        check_ties(base, expert)
    return changed


def check_ties(base: Source, expert: Source) -> None:
    """What is one tensor in the base must be one in the expert, by storage or by value."""
    for alias, name in base.aliases.items():
        if alias in expert and not torch.equal(expert.read(alias), expert.read(name)):
            raise ValueError(
                f"'{alias}' and '{name}' are tied in {base.label} but differ in {expert.label}; "
                "untie them in the base (clone one of the two), so that both are merged"
            )


def check_finite(source: Source, name: str, tensor: Tensor) -> None:
    """Raises ValueError naming the model and the tensor where it holds NaN or Inf."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    low, high = torch.aminmax(tensor)  # both are NaN where one number is; unlike isfinite(tensor), needs no memory
    if not (torch.isfinite(low) and torch.isfinite(high)):
        what = "NaN" if torch.isnan(high) else "Inf"
        raise ValueError(f"{source.label}: '{name}' holds {what}; repair or leave out this model")


def _widened(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)


def _head_advice(names: list[str]) -> str:
    patterns = list(dict.fromkeys(f"{name.rpartition('.')[0]}.*" if "." in name else name for name in names))
    return f"If these belong to the task, keep them per task with heads={patterns[:4]}."


def _some(names: Collection[str]) -> str:
    listed = ", ".join(f"'{name}'" for name in list(names)[:4])
    return listed + (f" and {len(names) - 4} more" if len(names) > 4 else "")
