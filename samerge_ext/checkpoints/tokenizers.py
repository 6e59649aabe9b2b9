"""The tokenizer of a merged model: whose it is as asked for, and how it is written, with tokens that are added to it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from samerge_ext.checkpoints.reading import read_json
from samerge_ext.checkpoints.vocabulary import ADDED, CONFIG, FAST, FLAGS

ZERO = "zero"
MISSING = ("base", "mean")


@dataclass(frozen=True)
class TokenRow:
    """The row of one token in the models that lack it; with ``force`` in all.

    source: "zero"; a merged model's folder, whose row of the token it is, or of ``token``, a text or a number there; None for
        what `TokenizerConfig.missing` says.
    """

    source: str | Path | None = None
    token: str | int | None = None
    force: bool = False


@dataclass(frozen=True)
class TokenizerConfig:
    """Whose tokenizer a merged model has: the rows of every model's embeddings and output matrix are put in its tokens' order.

    source: "base"; "union", the base's with all tokens of the experts that it lacks behind its own, in the order of the models;
        or a model's folder.
    missing: the row of a token in models that lack it: "base", the base's, or where that lacks it too the only other model's that
        has it, or the mean of those that have it; "mean", the mean of all that have it. Zeros where none has it.
    tokens: rows of single tokens that are told otherwise; tokens that the tokenizer lacks are added to it.
    pad_to_multiple_of: of the number of rows, behind the last token's; each is the mean of the model's rows of tokens. None: rows
        without a token stay, all of the model whose tokenizer it is.
    """

    source: str | Path = "union"
    missing: str = "base"
    tokens: Mapping[str, TokenRow] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        if self.missing not in MISSING:
            raise ValueError(f"tokenizer: missing={self.missing!r}; choose one of {', '.join(MISSING)}")
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ValueError(f"tokenizer: pad_to_multiple_of={self.pad_to_multiple_of}; a multiple of 1 or more is expected")

    @classmethod
    def of(cls, given: str | Path | TokenizerConfig | None) -> TokenizerConfig | None:
        """Of what a user passes: a source alone, or all of it."""
        return given if given is None or isinstance(given, TokenizerConfig) else cls(given)


@dataclass(frozen=True)
class MergedTokenizer:
    """What goes along with weights whose rows are those of one tokenizer.

    folder: whose files. added: tokens that they lack, by number, with the flags of a tokenizer.json. rows: of the embeddings,
        where there are any; rows_before: of the base's. moves: whether some model's rows are not as they are stored. config: what
        was asked for.
    """

    folder: Path
    added: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    rows: int | None = None
    rows_before: int | None = None
    moves: bool = False
    config: TokenizerConfig | None = None

    def to_json(self) -> dict:
        return json.loads(json.dumps(asdict(self), default=str))

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> MergedTokenizer:
        config = content["config"]
        if config is not None:
            source = config["source"] if config["source"] in ("base", "union") else Path(config["source"])
            rows = {token: _row(**row) for token, row in config["tokens"].items()}
            config = TokenizerConfig(**{**config, "source": source, "tokens": rows})
        added = {int(number): token for number, token in content["added"].items()}
        return cls(Path(content["folder"]), added, content["rows"], content["rows_before"], content["moves"], config)

    def add_to(self, out: Path) -> tuple[str, ...]:
        """Adds the tokens to the tokenizer's files, which were copied to a folder; returns the names of those that changed."""
        changed: dict[str, dict] = {}
        if not self.added:
            return ()
        if (out / FAST).is_file():
            content = read_json(out / FAST)
            entries = [{"id": number, **token} for number, token in self.added.items()]
            changed[FAST] = {**content, "added_tokens": [*(content.get("added_tokens") or ()), *entries]}
        if not (out / FAST).is_file() or (out / ADDED).is_file():
            known = read_json(out / ADDED) if (out / ADDED).is_file() else {}
            changed[ADDED] = known | {token["content"]: number for number, token in self.added.items()}
        if (out / CONFIG).is_file():
            content = read_json(out / CONFIG)
            if "added_tokens_decoder" in content or not (out / FAST).is_file():
                known = content.get("added_tokens_decoder") or {}
                more = {str(number): dict(token) for number, token in self.added.items()}
                changed[CONFIG] = {**content, "added_tokens_decoder": known | more}
        for name, content in changed.items():
            (out / name).write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
        return tuple(changed)

    def configuration(self, content: dict) -> dict:
        """A config.json, and what is nested in it, with the number of rows in the place of the base's."""
        if self.rows is None or self.rows == self.rows_before:
            return content
        return {
            key: self.rows
            if key == "vocab_size" and value == self.rows_before
            else self.configuration(value)
            if isinstance(value, dict) and key.endswith("_config")
            else value
            for key, value in content.items()
        }


def added_token(content: str, flags: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A token as a tokenizer.json writes those that were added; without flags, as transformers adds a text."""
    return {"content": content, **{key: bool((flags or {}).get(key, key == "normalized" and flags is None)) for key in FLAGS}}


def _row(source: str | None, token: str | int | None, force: bool) -> TokenRow:
    return TokenRow(source if source in (None, ZERO) else Path(source), token, force)
