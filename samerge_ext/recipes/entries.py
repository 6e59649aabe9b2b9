"""What a recipe is made of: models, slices of them, the calibration set; and how a model is named."""

from __future__ import annotations

import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from samerge_ext.checkpoints.reading import shown
from samerge_ext.checkpoints.tokenizers import ZERO, TokenizerConfig, TokenRow

MAX_PATH = 4096  # characters, as on Linux


class Strict(BaseModel):
    """A key that nobody reads is an error that names those that are read; a key without a value is one that is not there."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        content = without_nulls(content)
        check_keys(content, cls.model_fields)
        if isinstance(content.get("parameters"), dict):
            content["parameters"] = without_nulls(content["parameters"])
        return content


class ModelEntry(Strict):
    """A model: its folder or weight file, an adapter on it ("model+adapter"), and under `parameters` its weight and density.
    A text alone is a model without parameters.

    layer_range: the first layer and the one after the last; where mergekit's slices are given.
    """

    model: Path
    adapter: Path | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    layer_range: tuple[int, int] | None = None

    @model_validator(mode="before")
    @classmethod
    def _split(cls, content: Any) -> Any:
        if isinstance(content, str | Path):
            content = {"model": content}
        if isinstance(content, dict) and content.get("model") is not None:
            model, adapter = parse_model(content["model"])
            content = {**content, "model": model}
            if adapter is not None:
                content["adapter"] = adapter
        return content

    @property
    def place(self) -> Path:
        """What the model is called by."""
        return self.adapter or self.model

    @property
    def path(self) -> Path:
        """Where the model is: a folder or file, or "MODEL+ADAPTER"."""
        return self.model if self.adapter is None else Path(f"{self.model}+{self.adapter}")


class SliceEntry(Strict):
    """Layers of the merged model, after those of the slices before: of each source those of its layer_range, which belong
    together one by one, and under `parameters` those of this slice."""

    sources: list[ModelEntry] = Field(min_length=1)
    parameters: dict[str, Any] = Field(default_factory=dict)


class CalibrationEntry(Strict):
    """The calibration set: of every task a file of unlabelled texts (a text a line, or .jsonl with the field "text"), or a folder
    of pictures.

    classes, templates: of CLIP, whose text tower makes every task's head, files with a class's name a line, and with a text a
        line that has {} in its place.
    """

    files: dict[str, Path]
    classes: dict[str, Path] = Field(default_factory=dict)
    templates: dict[str, Path] = Field(default_factory=dict)
    texts: int | None = Field(default=None, ge=1, description="use the first so many texts or pictures of each task")
    batch_size: int = Field(default=16, ge=1)
    max_length: int = Field(default=128, ge=1, lt=2**31, description="tokens; longer texts are cut")

    @property
    def paths(self) -> list[Path]:
        """All that is read."""
        return [path for paths in (self.files, self.classes, self.templates) for path in paths.values()]


class TokenEntry(Strict):
    """The row of a token. source: a model, {kind: zero}, or {kind: model_token, model: …, token: …} (or token_id: …). force: in
    models that have the token, too."""

    source: Any = None
    force: bool = False

    def row(self) -> TokenRow:
        if not isinstance(self.source, dict) or "kind" not in self.source:
            return TokenRow(None if self.source is None else _place_of(self.source), force=self.force)
        source = without_nulls(self.source)
        if source["kind"] == ZERO:
            check_keys(source, ("kind",))
            return TokenRow(ZERO, force=self.force)
        if source["kind"] != "model_token":
            raise ValueError(f"kind: {shown(source['kind'])} is neither zero nor model_token")
        check_keys(source, ("kind", "model", "token", "token_id"))
        token, number = source.get("token"), source.get("token_id")
        if "model" not in source or (token is None) == (number is None):
            raise ValueError("model_token: a model is expected, and either its token or its token_id")
        if not isinstance(token, str | None) or type(number) not in (int, type(None)):
            raise ValueError(f"model_token: token is {shown(token)}, token_id {shown(number)}; a text or a number is expected")
        return TokenRow(_place_of(source["model"]), number if token is None else token, self.force)


class TokenizerEntry(Strict):
    """mergekit's `tokenizer`, see `TokenizerConfig`; missing is not mergekit's."""

    source: Any = "union"
    tokens: dict[str, TokenEntry] = Field(default_factory=dict)
    pad_to_multiple_of: int | None = Field(default=None, ge=1)
    missing: Literal["base", "mean"] = "base"

    @model_validator(mode="after")
    def _readable(self) -> TokenizerEntry:
        self.config()
        return self

    def config(self) -> TokenizerConfig:
        """The same for what merges. Raises ValueError for what is no model and no row."""
        source = self.source if self.source in ("base", "union") else _place_of(self.source)
        rows = {}
        for token, entry in self.tokens.items():
            try:
                rows[token] = entry.row()
            except ValueError as error:
                raise ValueError(f"tokens: {shown(token)}: {error}") from error
        return TokenizerConfig(source, self.missing, rows, self.pad_to_multiple_of)


def _place_of(model: Any) -> Path:
    """What a model is called by: its adapter, or its folder."""
    folder, adapter = parse_model(model)
    return adapter or folder


def parse_model(value: Any) -> tuple[Path, Path | None]:
    """The folder or file of a model, and of the adapter that mergekit writes after a plus: "model+adapter".

    value: a path, or mergekit's mappings {model, lora} and {path}. A path that exists is one, whatever is in its name.
    """
    if isinstance(value, dict):
        value = without_nulls(value)
        check_keys(value, ("model", "lora", "path"))
        if "path" in value:
            return _place(value["path"]), None
        model, adapter = parse_model(value.get("model", ""))
        return model, parse_model(value["lora"])[0] if "lora" in value else adapter
    text = str(_place(value))
    if not os.path.exists(text):
        for place, character in enumerate(text):
            before, after = text[:place], text[place + 1 :]
            if character == "+" and before and after and os.path.exists(before):
                return Path(before), _place(after)
    return Path(text), None


def _place(value: Any) -> Path:
    """A path; what no system has for one is refused."""
    if not isinstance(value, str | Path) or not str(value) or len(str(value)) > MAX_PATH or "\0" in str(value):
        raise ValueError(f"{shown(value)} is not a model's folder")
    return Path(os.path.expanduser(value))


def mapping_of(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The keys and values under a key; none where it is not there. Raises ValueError where it holds something else."""
    value = content.get(key)
    if not isinstance(value, dict | None):
        raise ValueError(f"'{key}': {shown(value)}; keys and values are expected")
    return value or {}


def check_keys(content: dict[Any, Any], known: Any) -> None:
    """Raises ValueError naming a key that is not among those known, and these."""
    for key in content:
        if key not in known:
            close = get_close_matches(str(key)[:100], list(known), n=1)
            meant = f" ({close[0]}?)" if close else ""
            raise ValueError(f"there is no key {shown(key)}{meant}; the keys are {', '.join(known)}")


def without_nulls(content: dict[Any, Any]) -> dict[Any, Any]:
    """Without the keys that have no value."""
    return {key: value for key, value in content.items() if value is not None}
