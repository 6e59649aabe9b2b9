"""Models of different vocabularies under one: the tokens of the merged model, and where each model's rows of them are from."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samerge_ext.checkpoints.places import folder_of
from samerge_ext.checkpoints.reading import CheckpointError, shown
from samerge_ext.checkpoints.sources import Experts, Source
from samerge_ext.checkpoints.token_models import (
    TokenModel,
    check_counterpart,
    check_whole,
    counterpart,
    own_place,
    own_rows,
    tensors_of_tokens,
    vocabularies_of,
)
from samerge_ext.checkpoints.token_rows import Row, Run, TokenRows
from samerge_ext.checkpoints.tokenizers import ZERO, MergedTokenizer, TokenizerConfig, TokenRow, added_token
from samerge_ext.checkpoints.vocabulary import OF_TOKENS, Vocabulary

MAX_ROWS = 1 << 24
ZEROS, MEAN, PADDING = -1, -2, -3  # in the place of a model, for a row that is none's
ZEROS_HERE = "of zeros"


class VocabularyNote(UserWarning):
    """Says whose tokens a merged model has, and what became of tokens that not all models have."""

    shown_as = "note"


def under_one_vocabulary(
    base: Source,
    experts: Experts,
    places: Sequence[str | Path],
    config: TokenizerConfig | None,
    heads: Sequence[str] = (),
) -> tuple[Source, Experts, MergedTokenizer | None]:
    """The models with the rows of one vocabulary's tokens, and the tokenizer that goes along; None for the base's as it is.

    places: of the base and of each expert, whose tokenizers are read; a model without one has the tokens of the base.
    config: None where nothing is asked for: rows that only pad the base's or an expert's vocabulary are then cut or added, and
        tensors that fit a pattern of ``heads`` do not count.

    Raises ValueError where experts have tokens that the base lacks and nothing is asked for, and for a source of rows that is not
    there; CheckpointError for a tokenizer that cannot be read. Says in a `VocabularyNote` what was done.
    """
    sources = [base, *(expert for _, expert in experts)]
    tensors = [tensors_of_tokens(source, () if config else tuple(heads)) for source in sources]
    rows = [source.shape(names[0])[0] if names else 0 for source, names in zip(sources, tensors, strict=True)]
    if config is None and (not rows[0] or len({count for count in rows if count}) < 2):
        return base, experts, None
    vocabularies = vocabularies_of(places)
    if not any(vocabulary.files() for vocabulary in vocabularies):
        if config is None:
            return base, experts, None
        folder = vocabularies[0].folder if config.source in ("base", "union") else folder_of(os.path.expanduser(config.source))
        if not Vocabulary(folder).files():
            warnings.warn(f"tokenizer: {folder} has no vocabulary, so that none goes along", stacklevel=4)
        return base, experts, MergedTokenizer(folder, config=config)
    models = [
        TokenModel(os.path.realpath(own_place(place)), source, vocabulary, vocabulary.numbers(), names, count)
        for place, source, vocabulary, names, count in zip(places, sources, vocabularies, tensors, rows, strict=True)
    ]
    for model in models:
        check_whole(model, models[0])
    if config is None:
        config = _of_padding(models)
    merged = _Merged(models, config)
    if not merged.tokenizer.moves:
        return base, experts, merged.tokenizer
    first, *others = merged.sources()
    return first, [(task, other) for (task, _), other in zip(experts, others, strict=True)], merged.tokenizer


class _Merged:
    """tokens: of the merged model, each with its row, of ``rows``. tokenizer: what goes along."""

    def __init__(self, models: Sequence[TokenModel], config: TokenizerConfig):
        self._config, self._models = config, models
        places = [model.place for model in models]
        self._unique = [i for i, place in enumerate(places) if places.index(place) == i]  # the base may be an expert too
        self._host, vocabulary = _host(models, config)
        self.tokens, added = _with_added(vocabulary, models, config)
        count, multiple = max(self.tokens.values(), default=-1) + 1, config.pad_to_multiple_of
        self.rows = max(count, self._host.rows if self._host else 0) if multiple is None else -(-count // multiple) * multiple
        if self.rows > MAX_ROWS or min(self.tokens.values(), default=0) < 0:
            raise CheckpointError(
                f"{vocabulary.folder}: its tokens have numbers below 0, or make {self.rows} rows, of {MAX_ROWS} that a model may "
                "have; download the tokenizer again, or pad to a smaller multiple"
            )
        read = (vocabulary, *(model.vocabulary for model in models))
        self._read = [each.folder / name for each in read for name in each.files()]
        before = models[0].rows if models[0].tensors else None
        moves = bool(config.tokens or config.pad_to_multiple_of) or any(
            model.numbers != self.tokens or (model.tensors and model.rows != self.rows) for model in models
        )
        self.tokenizer = MergedTokenizer(vocabulary.folder, added, self.rows if before else None, before, moves, config)

    def sources(self) -> list[Source]:
        """Each model under the merged vocabulary."""
        models, texts = self._models, list(self.tokens)
        if not self._unique_with_tensors():
            raise ValueError(
                f"tokenizer: not all models have the tokens of {self.tokenizer.folder}, and {models[0].source.label} has no "
                f"embeddings under a known name ({', '.join(OF_TOKENS[:3])} …); leave tokenizer out"
            )
        numbers = torch.tensor([self.tokens[text] for text in texts])
        own = torch.stack([own_rows(model, texts) for model in models])  # [models, tokens], −1 where it has none
        forced = [i for i, text in enumerate(texts) if (row := self._config.tokens.get(text)) and row.force]
        others = own[self._unique_with_tensors()] < 0
        lacking = sorted({*others.any(0).nonzero()[:, 0].tolist(), *forced})
        self._check_tokens()
        instead = {i: self._instead(texts[i], own[:, i].tolist()) for i in lacking}
        own[:, forced] = -1
        is_token = torch.zeros(self.rows, dtype=torch.bool)
        is_token[numbers] = True
        self._say(texts, own, instead)
        return [self._source(place, numbers, own[place], instead, is_token) for place in range(len(models))]

    def _source(self, place: int, numbers: Tensor, own: Tensor, instead: Mapping[int, list[Row]], is_token: Tensor) -> Source:
        model = self._models[place]
        if not model.tensors:
            return model.source
        whose = torch.full((self.rows,), ZEROS)
        row = torch.zeros(self.rows, dtype=torch.int64)
        behind = ~is_token
        if self._config.pad_to_multiple_of is not None:
            whose[behind] = PADDING
        elif self._host is not None and self._host.tensors:
            behind[self._host.rows :] = False
            whose[behind], row[behind] = self._models.index(self._host), behind.nonzero()[:, 0]
        has = own >= 0
        whose[numbers[has]], row[numbers[has]] = place, own[has]
        means = {}
        for i, rows in instead.items():
            if own[i] < 0:
                number = int(numbers[i])
                whose[number], row[number] = rows[0] if len(rows) == 1 else (MEAN if rows else ZEROS, 0)
                means[number] = tuple(rows)
        runs = _runs(whose, row, means)
        if len(runs) == 1 and runs[0] == Run(0, model.rows, ((place, 0),)):
            return model.source
        names = {name: [counterpart(other, name, model) for other in self._models] for name in model.tensors}
        used = {index for run in runs for index, _ in run.rows}
        for name, there in names.items():
            for index in used:
                check_counterpart(model, name, self._models[index], there[index])
        found = TokenRows(model.source, [other.source for other in self._models], names, runs, is_token)
        found.files = tuple(dict.fromkeys((*found.files, *self._read)))  # what rows are told by
        return found

    def _instead(self, text: str, own: Sequence[int]) -> list[Row]:
        """What a token's row is in a model that lacks it: the mean of these rows."""
        asked = self._config.tokens.get(text, TokenRow())
        if asked.source == ZERO:
            return []
        if asked.source is not None:
            return [self._asked(text, asked, own)]
        having = [(i, own[i]) for i in self._unique if own[i] >= 0]
        return having[:1] if self._config.missing == "base" and having and having[0][0] == 0 else having

    def _asked(self, text: str, asked: TokenRow, own: Sequence[int]) -> Row:
        place = os.path.realpath(os.path.expanduser(asked.source or ""))
        index = next((i for i in self._unique if self._models[i].place == place), None)
        if index is None:
            places = ", ".join(self._models[i].place for i in self._unique)
            raise ValueError(f"tokenizer: tokens: {shown(text)}: {asked.source} is none of the merged models: {places}")
        model = self._models[index]
        if isinstance(asked.token, int):
            row = asked.token if 0 <= asked.token < model.rows else -1
        else:
            row = own[index] if asked.token is None else model.numbers.get(asked.token, -1)
        if not 0 <= row < model.rows:
            wanted = text if asked.token is None else asked.token
            raise ValueError(
                f"tokenizer: tokens: {shown(text)}: {model.source.label} has no row for {shown(wanted)} among its {model.rows}; "
                "name another token or model"
            )
        return index, row

    def _check_tokens(self) -> None:
        """Raises ValueError for a source of rows that is not there, also where no model needs it."""
        for text, asked in self._config.tokens.items():
            if asked.source not in (None, ZERO):
                own = [model.numbers.get(text, -1) for model in self._models]
                self._asked(text, asked, own)

    def _unique_with_tensors(self) -> list[int]:
        return [i for i in self._unique if self._models[i].tensors]

    def _say(self, texts: Sequence[str], own: Tensor, instead: Mapping[int, list[Row]]) -> None:
        added = [token["content"] for token in self.tokenizer.added.values()]
        more = f" and {_some(added)}" if added else ""
        rows = [model.rows for model in self._models]
        before = f", of {' and '.join(map(str, dict.fromkeys(rows)))} before" if set(rows) != {self.rows} else ""
        _note(f"tokenizer: the merged model has the tokens of {self.tokenizer.folder}{more}, in {self.rows} rows{before}")
        known = self.tokens.keys()
        nobodys: list[str] = []
        for place in self._unique_with_tensors():
            model, parts = self._models[place], []
            moved = sum(1 for text, number in model.numbers.items() if self.tokens.get(text, number) != number)
            left = [text for text, number in model.numbers.items() if number < model.rows and text not in known]
            by_rule: dict[str, list[str]] = {}
            for i, sources in instead.items():
                if own[place, i] < 0:
                    by_rule.setdefault(self._called(sources), []).append(texts[i])
            nobodys = by_rule.get(ZEROS_HERE, nobodys)
            parts += [f"{'rows' if len(found) > 1 else 'the row'} of {_some(found)} {what}" for what, found in by_rule.items()]
            parts += [f"of its tokens {moved} in another row"] if moved else []
            parts += [f"{_some(left)} of its own left out"] if left else []
            if parts:
                _note(f"{model.source.label}: {'; '.join(parts)}")
        nobodys = [text for text in nobodys if self._config.tokens.get(text, TokenRow()).source != ZERO]
        if nobodys:
            warnings.warn(
                f"tokenizer: no model has a row for {_some(nobodys)}, so that it is of zeros; give it that of another token with "
                "tokenizer: tokens",
                stacklevel=5,
            )

    def _called(self, rows: Sequence[Row]) -> str:
        if not rows:
            return ZEROS_HERE
        if len(rows) == 1:
            return f"from {self._models[rows[0][0]].source.label}"
        return f"as the mean of {len(rows)} models"


def _of_padding(models: Sequence[TokenModel]) -> TokenizerConfig:
    """To the base's vocabulary; raises ValueError where an expert has tokens more."""
    base, *experts = models
    for expert in experts:
        more = [token for token, number in expert.numbers.items() if number < expert.rows and token not in base.numbers]
        if more and expert.tensors and expert.rows != base.rows:
            raise ValueError(
                f"{expert.source.label}: '{expert.tensors[0]}' has {expert.rows} rows, in {base.source.label} {base.rows}. "
                f"There are tokens that the base's tokenizer lacks: {_some(more)}. Merge all models with these by tokenizer: "
                "union, or without them by tokenizer: base (in Python tokenizer='union' or 'base')"
            )
    return TokenizerConfig("base")


def _host(models: Sequence[TokenModel], config: TokenizerConfig) -> tuple[TokenModel | None, Vocabulary]:
    """The model whose tokenizer is taken, where it is one of the merged models', and the tokenizer's vocabulary."""
    if config.source in ("base", "union"):
        return models[0], models[0].vocabulary
    folder = folder_of(os.path.expanduser(config.source))
    if not folder.is_dir():
        raise ValueError(f"tokenizer: {shown(str(config.source))} is neither base nor union nor the folder of a model")
    vocabulary = Vocabulary(folder)
    if not vocabulary.files():
        raise CheckpointError(f"tokenizer: {folder} has no tokenizer; name a folder that has one, base or union")
    real = os.path.realpath(folder)
    return next((model for model in models if os.path.realpath(folder_of(model.place)) == real), None), vocabulary


def _with_added(
    vocabulary: Vocabulary, models: Sequence[TokenModel], config: TokenizerConfig
) -> tuple[dict[str, int], dict[int, dict[str, Any]]]:
    """The tokens of the merged model with their numbers, and those that are added to the tokenizer's."""
    tokens, added = dict(vocabulary.numbers()), {}
    more: dict[str, Mapping[str, Any] | None] = {}
    if config.source == "union":
        for model in models:
            flags = model.vocabulary.added()
            for text, number in sorted(model.numbers.items(), key=lambda item: item[1]):
                if text not in tokens and number < model.rows:
                    more.setdefault(text, flags.get(text))
    more |= {text: None for text in config.tokens if text not in tokens and text not in more}
    if more and not len(tokens) == max(tokens.values()) + 1 == vocabulary.next_number():
        raise CheckpointError(
            f"{vocabulary.folder}: its tokenizer cannot be given {_some(list(more))}: the numbers of {len(tokens)} tokens have "
            f"gaps, or end with {max(tokens.values())}; name a tokenizer that has all tokens (tokenizer: source)"
        )
    for text, flags_of_text in more.items():
        added[len(tokens)] = added_token(text, flags_of_text)
        tokens[text] = len(tokens)
    return tokens, added


def _runs(whose: Tensor, row: Tensor, means: Mapping[int, tuple[Row, ...]]) -> list[Run]:
    """Rows one by one as runs of rows that lie behind each other where they are from."""
    goes_on = (whose[1:] == whose[:-1]) & (whose[1:] != MEAN) & ((whose[1:] < 0) | (row[1:] == row[:-1] + 1))
    begins = [0, *((~goes_on).nonzero()[:, 0] + 1).tolist()]
    found = []
    for begin, end, model, first in zip(
        begins, [*begins[1:], len(whose)], whose[begins].tolist(), row[begins].tolist(), strict=True
    ):
        rows = means[begin] if model == MEAN else ((model, first),) if model >= 0 else ()
        found.append(Run(begin, end, rows, of_tokens=model == PADDING))
    return found


def _some(texts: Collection[str]) -> str:
    listed = ", ".join(shown(text) for text in list(texts)[:3])
    return f"{len(texts)} tokens ({listed} …)" if len(texts) > 3 else listed


def _note(text: str) -> None:
    warnings.warn(text, VocabularyNote, stacklevel=6)
