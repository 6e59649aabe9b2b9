"""What must hold of a base and its experts before anything is packed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from samerge_ext.checkpoints.advice import QUANTISED, heads_advice
from samerge_ext.checkpoints.naming import is_derived_buffer
from samerge_ext.checkpoints.sources import Experts, Source, matches
from samerge_ext.checkpoints.task_names import check_task_name
from samerge_ext.checkpoints.vocabulary import vocabulary_advice

STORAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CODES = (torch.int8, torch.uint8, torch.int16, torch.int32)  # what quantised weights are stored in


def check_sources(
    base: Source, experts: Experts, heads: tuple[str, ...], dtype: torch.dtype, task_vector_dtype: torch.dtype
) -> set[str]:
    """Raises ValueError for whatever could not be merged; returns the layers that at least one expert changed.

    Names, shapes and dtypes are compared first; values are read only when all of them agree.
    """
    check_headers(base, experts, heads, dtype, task_vector_dtype)
    changed = _check_values(base, experts, shared_names(base, heads))
    check_heads(experts, heads)
    return changed


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
    shared = shared_names(base, heads)
    if not shared:
        raise ValueError(f"heads={list(heads)} takes every tensor of {base.label}, and none is left to merge; name heads alone")
    for _, expert in experts:
        _check_shapes(base, expert, shared)
        _check_kinds(base, expert, shared)
    for source in (base, *(expert for _, expert in experts)):
        _check_dtypes(base, source, shared)


def check_tasks(tasks: Sequence[str]) -> None:
    """Raises ValueError unless every task has a name of its own."""
    if not tasks:
        raise ValueError("there are no experts to merge; pass {'task name': expert, …}")
    for task in tasks:
        check_task_name(task)
        if tasks.count(task) > 1:
            raise ValueError(f"two experts are named '{task}'; give every task its own name")


def _check_shapes(base: Source, expert: Source, shared: list[str]) -> None:
    shapes = [(name, base.shape(name), expert.shape(name)) for name in shared]
    differ = [name for name, ours, theirs in shapes if ours != theirs and not is_derived_buffer(name, ours)]
    if differ:
        name = differ[0]
        text = (
            f"{expert.label}: '{name}' is {list(expert.shape(name))}, in {base.label} it is {list(base.shape(name))}"
            f"{f' ({len(differ) - 1} more tensors differ too)' if len(differ) > 1 else ''}"
        )
        advice = vocabulary_advice(name, base.shape(name), expert.shape(name)) or heads_advice(differ, shared)
        raise ValueError(f"{text}. {advice}".rstrip())


def _check_kinds(base: Source, expert: Source, shared: list[str]) -> None:
    for name in shared:
        ours, theirs = base.dtype(name), expert.dtype(name)
        if ours.is_floating_point == theirs.is_floating_point or is_derived_buffer(name, base.shape(name)):
            continue
        if name.endswith("weight") and (ours in CODES or theirs in CODES):
            continue  # `_check_dtypes` has more to say of a quantised model
        raise ValueError(
            f"'{name}' is {ours} in {base.label} and {theirs} in {expert.label}: a weight in one model, and none in the "
            "other; save both with one type"
        )


def _check_dtypes(base: Source, source: Source, shared: list[str]) -> None:
    for name in shared:
        dtype = source.dtype(name)
        coded = QUANTISED.search(name) or (name.endswith("weight") and not dtype.is_floating_point)
        if coded or (dtype not in STORAGE_DTYPES and not base.is_buffer(name)):
            raise ValueError(
                f"{source.label}: '{name}' is {dtype}; weights must be float32, bfloat16, float16 or float64: the checkpoint is "
                "quantised, dequantise it first"
            )


def _check_values(base: Source, experts: Experts, shared: list[str]) -> set[str]:
    changed: set[str] = set()
    changed_by: set[str] = set()
    for name in shared:
        pretrained = base.read(name)
        if pretrained.is_meta:
            raise ValueError(f"{base.label}: '{name}' is on meta and has no numbers; load the model's weights first")
        finite = is_finite(pretrained)
        for task, expert in experts:
            finetuned = expert.read(name)
            if not finite:
                if torch.equal(finetuned, pretrained):  # a mask of all models
                    continue
                check_finite(base, name, pretrained)
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


def check_heads(experts: Experts, heads: tuple[str, ...]) -> None:
    """Raises ValueError where a tensor of a task holds NaN or Inf."""
    for _, expert in experts:
        for name in expert.names:
            if matches(name, heads):
                check_finite(expert, name, expert.read(name))


def check_range(what: str, numbers: Tensor) -> None:
    """Raises ValueError where numbers that were finite left the range of the type that they have now."""
    if not is_finite(numbers):
        raise ValueError(f"{what} overflows {numbers.dtype}; set dtype to float32 or bfloat16")


def check_finite(source: Source, name: str, tensor: Tensor) -> None:
    """Raises ValueError naming the model and the tensor where it holds NaN or Inf; a mask that models make may hold Inf."""
    if not is_finite(tensor) and (tensor.isnan().any() or not is_derived_buffer(name, tensor.shape)):
        what = "NaN" if tensor.isnan().any() else "Inf"
        raise ValueError(f"{source.label}: '{name}' holds {what}; repair or leave out this model")


def is_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or Inf."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)  # both are NaN where one number is; unlike isfinite(tensor), needs no memory
    return bool(torch.isfinite(low) and torch.isfinite(high))


def _widened(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)
