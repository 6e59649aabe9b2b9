"""What models know of tokens: their tokenizers, their rows, and what tensors that have rows of tokens are called in each."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from samerge_ext.checkpoints.lora import model_and_adapter
from samerge_ext.checkpoints.places import folder_of
from samerge_ext.checkpoints.sources import Source, matches
from samerge_ext.checkpoints.vocabulary import OF_TOKENS, Vocabulary


@dataclass(frozen=True)
class TokenModel:
    """numbers: of its tokens, where a row is. tensors: those with a row for each token, ``rows`` of them."""

    place: str
    source: Source
    vocabulary: Vocabulary
    numbers: dict[str, int]
    tensors: tuple[str, ...]
    rows: int


def vocabularies_of(places: Sequence[str | Path]) -> list[Vocabulary]:
    """Of each model: its own, or that of the model that it is an adapter of, or else that of the first model with one."""
    read: dict[str, Vocabulary] = {}
    found = []
    for path in places:
        folders = [folder_of(part) for part in reversed(model_and_adapter(path)) if part is not None]
        own = [read.setdefault(os.path.realpath(folder), Vocabulary(folder)) for folder in folders]
        found.append(next((vocabulary for vocabulary in own if vocabulary.files()), own[0]))
    first = next((vocabulary for vocabulary in found if vocabulary.files()), found[0])
    return [vocabulary if vocabulary.files() else first for vocabulary in found]


def own_place(path: str | Path) -> Path:
    """What a model is called by: an adapter's folder, or else the model's."""
    model, adapter = model_and_adapter(path)
    return adapter if adapter is not None else Path(model or path)


def tensors_of_tokens(source: Source, ignored: tuple[str, ...]) -> tuple[str, ...]:
    """The names of the tensors that have a row, or a number, for each token; embeddings first."""
    names = [name for name in source.names if name.endswith(OF_TOKENS) and not matches(name, ignored)]
    names.sort(key=lambda name: (len(source.shape(name)) != 2, OF_TOKENS.index(_ending(name))))
    rows = source.shape(names[0])[0] if names else 0
    return tuple(name for name in names if len(source.shape(name)) in (1, 2) and source.shape(name)[0] == rows)


def check_whole(model: TokenModel, base: TokenModel) -> None:
    """Raises ValueError where only some of a model's tensors have the rows of all tokens, as of an adapter that lost a head's."""
    for name in base.tensors:
        if name in model.source and model.tensors and name not in model.tensors:
            rows = model.source.shape(name)[0]
            raise ValueError(
                f"{model.source.label}: '{model.tensors[0]}' has {model.rows} rows, and '{name}' {rows}: rows of "
                "some tokens are missing; save the model whole, an adapter with both modules in modules_to_save"
            )


def own_rows(model: TokenModel, texts: Iterable[str]) -> Tensor:
    """The row [texts] of each token, −1 where the model has none."""
    numbers = (model.numbers.get(text, -1) for text in texts)
    return torch.tensor([number if 0 <= number < model.rows else -1 for number in numbers])


def counterpart(other: TokenModel, name: str, model: TokenModel) -> str:
    """What a tensor is called in another model: the same, or what ends alike, or where it is tied the embeddings."""
    if name in other.tensors or other is model:
        return name
    alike = [there for there in other.tensors if _ending(there) == _ending(name)]
    if len(alike) == 1:
        return alike[0]
    return other.tensors[0] if other.tensors else name


def check_counterpart(model: TokenModel, name: str, other: TokenModel, there: str) -> None:
    """Raises ValueError where the rows of another model's tensor do not fit."""
    if there not in other.tensors or other.source.shape(there)[1:] != model.source.shape(name)[1:]:
        raise ValueError(
            f"{model.source.label}: '{name}' {list(model.source.shape(name))} needs rows from {other.source.label}, where "
            f"'{there}' has none of that length; merge models of one architecture"
        )


def _ending(name: str) -> str:
    return next(ending for ending in OF_TOKENS if name.endswith(ending))
