"""Adapters for transformers: sequence classifiers and causal language models, and calibration texts for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from samerge_ext.checkpoints.folder import read_config

Batch = dict[str, Tensor]


def sequence_classification(module: nn.Module, batch: Batch, task: str) -> Tensor:
    """Logits [B, classes] of a …ForSequenceClassification model, with the head that is in the module."""
    return module(**batch).logits


def causal_lm(module: nn.Module, batch: Batch, task: str) -> Tensor:
    """Next-token logits [tokens, vocabulary] of a …ForCausalLM model, at the positions that are not padding."""
    # A cache of keys and values is of no use here, and what is streamed runs again in the backward: it would be filled twice.
    return module(**batch, use_cache=False).logits[batch["attention_mask"].bool()]


ADAPTERS = {"ForSequenceClassification": sequence_classification, "ForCausalLM": causal_lm}


def empty_model(folder: str | Path) -> tuple[nn.Module, Any]:
    """A model of a folder's architecture with random weights, and the logits function of its kind.

    Raises ValueError where config.json names no architecture, or one of a kind without an adapter.
    """
    import transformers

    architectures = read_config(folder).get("architectures") or [None]
    for suffix, adapter in ADAPTERS.items():
        if architectures[0] and architectures[0].endswith(suffix):
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
            return getattr(transformers, architectures[0])._from_config(config), adapter
    raise ValueError(
        f"{folder}/config.json names the architecture {architectures[0]!r}; learned merges from the command line know "
        f"{', '.join('…' + suffix for suffix in ADAPTERS)}. For others call samerge_ext.samerging with your own logits function"
    )


def read_texts(path: str | Path, limit: int | None = None) -> list[str]:
    """Texts of a .jsonl file (field "text") or of any other text file (one a line); empty lines are left out.

    Raises ValueError, naming file and line, for a record without text, and for a file without any.
    """
    path = Path(path)
    texts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        if path.suffix == ".jsonl":
            try:
                line = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f'{path}, line {number}: expected a JSON object with the field "text" ({error!r})') from error
        texts.append(line)
    if not texts:
        raise ValueError(f"{path} holds no texts; a calibration file has one unlabelled text a line")
    return texts[:limit]


def text_batches(texts: list[str], folder: str | Path, batch_size: int, max_length: int) -> list[Batch]:
    """Tokenised batches {input_ids, attention_mask: [B, S]}, each padded on the right to its longest text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="right")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # masked, so its identity does not matter
    chunks = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
    options = {"padding": True, "truncation": True, "max_length": max_length, "return_tensors": "pt"}
    return [dict(tokenizer(chunk, return_token_type_ids=False, **options)) for chunk in chunks]
