"""Which token has which number: the vocabularies of model folders, and whether two agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from samerge_ext.checkpoints.files import folder_of

# Vocabularies in a form of their own, compared byte by byte.
OPAQUE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "source.spm", "tekken.json", "dict.txt", "bpe.codes")

Vocabulary = dict[str, int]


def vocabulary(folder: str | Path) -> Vocabulary | bytes | None:
    """Token -> number of a model folder's tokenizer, or its file as it is where that says more than tokens; None without one."""
    folder = folder_of(folder)
    content = _read(folder / "tokenizer.json")
    model = content.get("model")
    if isinstance(model, dict) and isinstance(model.get("vocab"), dict | list):
        stored = model["vocab"]
        found = stored if isinstance(stored, dict) else {token: number for number, (token, *_) in enumerate(stored)}
        return {**found, **{token["content"]: token["id"] for token in content.get("added_tokens") or ()}}
    added = _read(folder / "added_tokens.json")
    if (folder / "vocab.json").is_file():
        return {**_read(folder / "vocab.json"), **added}
    if (folder / "vocab.txt").is_file():
        lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
        return {**{token: number for number, token in enumerate(lines)}, **added}
    return next(((folder / name).read_bytes() for name in OPAQUE if (folder / name).is_file()), None)


def disagreement(ours: Vocabulary | bytes | None, theirs: Vocabulary | bytes | None) -> str | None:
    """A token with two numbers or a number with two tokens, in words; None without one, or where one vocabulary is not there."""
    if ours is None or theirs is None or ours == theirs:
        return None
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        return "their files differ" if type(ours) is type(theirs) else "they are stored in different forms"
    tokens = {number: token for token, number in ours.items()}
    for token, number in theirs.items():
        if ours.get(token, number) != number:
            return f"token {token!r} is {ours[token]} in the one and {number} in the other"
        if tokens.get(number, token) != token:
            return f"number {number} is {tokens[number]!r} in the one and {token!r} in the other"
    return None


def lacking(ours: Vocabulary | bytes | None, theirs: Vocabulary | bytes | None) -> list[str]:
    """The tokens of ``ours`` that ``theirs`` does not have; none where they are not known."""
    return [token for token in ours if token not in theirs] if isinstance(ours, dict) and isinstance(theirs, dict) else []


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
