"""The models of a merge from file to file, opened and fitted to each other: what merging, checking and measuring begin with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from samerge_ext.checkpoints.alignment import align
from samerge_ext.checkpoints.compatibility import check_models
from samerge_ext.checkpoints.folder import open_checkpoint
from samerge_ext.checkpoints.lora import open_expert
from samerge_ext.checkpoints.merged_vocabulary import under_one_vocabulary
from samerge_ext.checkpoints.sources import CheckpointSource, Experts, Source
from samerge_ext.checkpoints.tokenizers import MergedTokenizer
from samerge_ext.elementwise.file_plan import FileMerge, FilePlan
from samerge_ext.packing.stores import check_device, indexed
from samerge_ext.packing.validation import check_tasks


@dataclass(frozen=True)
class Opened:
    """plan: what will be written. files: all that is read. device: that merges. tokenizer: whose tokens the rows are, where it is
    not simply the base's."""

    plan: FilePlan
    files: tuple[Path, ...]
    device: torch.device
    tokenizer: MergedTokenizer | None


@contextmanager
def opened(merge: FileMerge) -> Iterator[Opened]:
    """The models, of which nothing but headers is read, until the block ends.

    Raises ValueError (CheckpointError for files) for a device that cannot be used and for models that do not fit together.
    """
    device = _checked_device(merge.device)
    check_tasks([task for task, _ in merge.experts])
    check_models(merge.names_from, merge.experts, (*merge.heads, *merge.keep), aligned=merge.tokenizer is not None)
    with ExitStack() as stack:
        checkpoint = stack.enter_context(open_checkpoint(merge.names_from, beside_adapter=merge.base is None))
        names: Source = CheckpointSource(checkpoint, "base")
        found = [(task, open_expert(path, names, f"expert '{task}'")) for task, path in merge.experts]
        experts: Experts = [(task, stack.enter_context(expert)) for task, expert in found]
        places = [merge.names_from, *(path for _, path in merge.experts)]
        names, experts, tokenizer = under_one_vocabulary(names, experts, places, merge.tokenizer, merge.heads)
        files = tuple(dict.fromkeys(file for source in (names, *(expert for _, expert in experts)) for file in source.files))
        if merge.stacks is not None:
            names, experts = _stacked(merge, names, experts)
        plan = FilePlan(merge, align(names, experts, merge.heads, merge.keep, merge.names_from), tokenizer)
        yield Opened(plan, files, device, tokenizer)


def _checked_device(device: str) -> torch.device:
    check_device(device)
    if torch.device(device).type not in ("cpu", "cuda"):
        raise ValueError(f"device={device!r}: files are merged on the CPU or on a CUDA GPU; leave device out to merge on the CPU")
    return indexed(device)


def _stacked(merge: FileMerge, names: Source, experts: Experts) -> tuple[Source, Experts]:
    """The models that are merged, of layers of those that were opened."""
    assert merge.stacks is not None
    of_base, of_others = merge.stacks
    held = {path: source for (_, path), (_, source) in zip(merge.experts, experts, strict=True)}
    held.setdefault(merge.names_from, names)
    stacked = [(f"source-{i + 1}", stack.of(held, f"source {i + 1} of the slices")) for i, stack in enumerate(of_others)]
    return of_base.of(held, "the base in the slices") if of_base else stacked[0][1], stacked
