"""Logits functions for transformers' models, one for each kind: logits(module, batch, task) -> [rows, classes].

They call the user's own module, with whatever head is in it. Those of language models are `LanguageModel`s, whose logits learned
methods do without. Where a row is a token, rows are the tokens that are not padding,
text after text: `attention_mask` says which those are. Batches are dicts of tensors, as `text_batches` and `picture_batches` make
them.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from samerge_ext.learning.language_model import LanguageModel

Batch = dict[str, Tensor]
Inputs = tuple[dict[str, Any], Tensor]  # of the module's forward, and the tokens [B, S] whose logits count


def sequence_classification(module: nn.Module, batch: Batch, task: str) -> Tensor:
    """Logits [B, classes] of a …ForSequenceClassification model.

    batch: {input_ids, attention_mask: [B, S]}. A decoder (GPT-2, Llama) reads its logits at the last token of a text, which it
    finds by ``module.config.pad_token_id``: it must be what pads ``input_ids``, on the right.
    """
    return module(**batch).logits


def token_classification(module: nn.Module, batch: Batch, task: str) -> Tensor:
    """Logits [tokens, classes] of a …ForTokenClassification model.

    batch: {input_ids, attention_mask: [B, S]}; tokens that ``special_tokens_mask`` [B, S] marks, where it is there, are left out.
    """
    inputs, kept = _kept(batch)
    return module(**inputs).logits[kept]


@LanguageModel
def masked_lm(module: Any, batch: Batch) -> Inputs:
    """Logits [tokens, vocabulary] of a …ForMaskedLM model on the texts as they are, without masked words.

    batch: as of `token_classification`.
    """
    return _kept(batch)


@LanguageModel
def causal_lm(module: Any, batch: Batch) -> Inputs:
    """Next-token logits [tokens, vocabulary] of a …ForCausalLM model.

    batch: {input_ids, attention_mask: [B, S]}, padded on either side. Or several texts in a row without padding,
        {input_ids, position_ids: [B, S]}, where every text's positions begin at 0: transformers' models whose masks are made of
        positions (Llama, Qwen, Mistral, Gemma, GPT-2 and most others) then see each text by itself.
    """
    inputs, kept = _kept(batch)
    if "attention_mask" in inputs and "position_ids" not in inputs and _takes_positions(module):
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)  # padding on the left has none
    # A cache of keys and values is of no use here, and what is streamed runs again in the backward: it would be filled twice.
    return {**inputs, "use_cache": False}, kept


@LanguageModel
def seq2seq_lm(module: Any, batch: Batch) -> Inputs:
    """Logits [tokens, vocabulary] of an encoder–decoder (T5, BART) that repeats its text.

    The encoder reads the text. The decoder is given the same text, moved one to the right behind the model's start token, and
    predicts every token of it: unlabelled texts have no other target.
    batch: {input_ids, attention_mask: [B, S]}, or with ``decoder_input_ids`` and ``decoder_attention_mask`` [B, D] of its own.
    """
    inputs, kept = _kept(batch)
    if "decoder_input_ids" in inputs:
        kept = inputs["decoder_attention_mask"].bool()
    else:
        inputs["decoder_input_ids"] = _moved_right(module, inputs["input_ids"])
    return {**inputs, "use_cache": False}, kept


def image_classification(module: nn.Module, batch: Batch, task: str) -> Tensor:
    """Logits [B, classes] of a …ForImageClassification model. batch: {pixel_values: [B, channels, H, W]}."""
    return module(**batch).logits


def _kept(batch: Batch) -> Inputs:
    """The module's own inputs, and the tokens [B, S] whose logits count."""
    inputs: dict[str, Any] = {name: tensor for name, tensor in batch.items() if name != "special_tokens_mask"}
    mask = inputs.get("attention_mask")
    kept = torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
    special = batch.get("special_tokens_mask")
    return inputs, kept if special is None else kept & ~special.bool()


def _takes_positions(module: Any) -> bool:
    """Whether a decoder can be told its tokens' positions, counted from 0: not RoBERTa's, which begin after that of padding."""
    tables = (part for name, part in module.named_modules() if name.endswith("position_embeddings"))
    begin_later = any(isinstance(table, nn.Embedding) and table.padding_idx is not None for table in tables)
    return not begin_later and "position_ids" in inspect.signature(module.forward).parameters


def _moved_right(module: Any, tokens: Tensor) -> Tensor:
    """What a decoder is given to predict ``tokens`` [B, S]: as the model's own training does it where it says how."""
    if hasattr(module, "prepare_decoder_input_ids_from_labels"):
        return module.prepare_decoder_input_ids_from_labels(labels=tokens)
    config = module.config
    start = config.decoder_start_token_id if config.decoder_start_token_id is not None else config.bos_token_id
    if start is None:
        raise ValueError("config.json has neither decoder_start_token_id nor bos_token_id: set the first in the module's config")
    return torch.cat([torch.full_like(tokens[:, :1], start), tokens[:, :-1]], dim=1)
