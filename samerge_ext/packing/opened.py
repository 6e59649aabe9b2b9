"""Model folders, or LoRA adapters of one, opened to be packed: under the names of a module and with the rows of one tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from samerge_ext.checkpoints.converted import Conversion
from samerge_ext.checkpoints.folder import open_checkpoint
from samerge_ext.checkpoints.lora import open_expert
from samerge_ext.checkpoints.merged_vocabulary import under_one_vocabulary
from samerge_ext.checkpoints.places import is_adapter
from samerge_ext.checkpoints.reading import CheckpointError
from samerge_ext.checkpoints.sources import CheckpointSource, Experts, Source
from samerge_ext.checkpoints.tokenizers import MergedTokenizer, TokenizerConfig
from samerge_ext.packing.factors import LORA

Expert = TypeVar("Expert")


def check_factors(form: torch.dtype | str | None, tokenizer: MergedTokenizer | None) -> None:
    if form == LORA and tokenizer is not None and tokenizer.moves:
        raise ValueError(
            f"task_vector_dtype={LORA!r} keeps factors of the rows as they are stored, and those of tokens are brought under one "
            "tokenizer; leave it out"
        )


def tokenizer_of_folders(
    base: str | Path,
    experts: Mapping[str, str | Path],
    tokenizer: TokenizerConfig | None,
    *,
    conversion: Conversion | None = None,
    heads: Sequence[str] = (),
) -> MergedTokenizer | None:
    """`PackedWeights.tokenizer` of model folders, from their headers and tokenizers."""
    with opened_models(base, experts, conversion, tokenizer, heads) as (_, _, merged):
        return merged


def as_pairs(experts: Mapping[str, Expert] | Sequence[tuple[str, Expert]]) -> list[tuple[str, Expert]]:
    return list(experts.items() if isinstance(experts, Mapping) else experts)


def all_patterns(heads: str | Sequence[str], keep: str | Sequence[str]) -> list[str]:
    """Patterns of all that is not merged."""
    return [pattern for patterns in (heads, keep) for pattern in ((patterns,) if isinstance(patterns, str) else patterns)]


@contextmanager
def opened_models(
    base: str | Path,
    experts: Mapping[str, str | Path] | Sequence[tuple[str, str | Path]],
    conversion: Conversion | None = None,
    tokenizer: TokenizerConfig | None = None,
    heads: str | Sequence[str] = (),
) -> Iterator[tuple[Source, Experts, MergedTokenizer | None]]:
    """Model folders, or LoRA adapters of the base, opened for reading: as the tensors of the conversion's module where given, and
    with the rows of one tokenizer's tokens."""
    with ExitStack() as stack:
        stored = CheckpointSource(stack.enter_context(open_checkpoint(base)), "base")
        source = stored if conversion is None else conversion.base(stored)

        def opened(task: str, path: str | Path) -> Source:
            label = f"expert '{task}'"
            if conversion is None:
                return stack.enter_context(open_expert(path, source, label))
            if not is_adapter(path):
                return conversion.expert(stack.enter_context(open_expert(path, stored, label)))
            try:
                return stack.enter_context(open_expert(path, source, label))
            except CheckpointError:
                if source is stored:
                    raise
                # An adapter of the folder's names, as PEFT saved them before transformers renamed the module's.
                return conversion.expert(stack.enter_context(open_expert(path, conversion.as_stored(stored), label)))

        pairs = as_pairs(experts)
        opened_experts = [(task, opened(task, path)) for task, path in pairs]
        places = [base, *(path for _, path in pairs)]
        yield under_one_vocabulary(source, opened_experts, places, tokenizer, all_patterns(heads, ()))
