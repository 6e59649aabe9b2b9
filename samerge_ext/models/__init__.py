"""Adapters: how a model's forward is called for the batch of a task, and batches for it from texts and pictures."""

from samerge_ext.learning.language_model import LanguageModel
from samerge_ext.learning.shared_encoder import SharedEncoder, concatenate
from samerge_ext.models.evaluation import evaluate
from samerge_ext.models.gguf import folder_of_gguf
from samerge_ext.models.logits import (
    causal_lm,
    image_classification,
    masked_lm,
    seq2seq_lm,
    sequence_classification,
    token_classification,
)
from samerge_ext.models.on_meta import parameters_on_meta
from samerge_ext.models.pictures import find_pictures, picture_batches
from samerge_ext.models.texts import read_records, read_texts, text_batches
from samerge_ext.models.zero_shot import zero_shot_classification, zero_shot_head

__all__ = [
    "LanguageModel",
    "SharedEncoder",
    "causal_lm",
    "concatenate",
    "evaluate",
    "find_pictures",
    "folder_of_gguf",
    "image_classification",
    "masked_lm",
    "parameters_on_meta",
    "picture_batches",
    "read_records",
    "read_texts",
    "seq2seq_lm",
    "sequence_classification",
    "text_batches",
    "token_classification",
    "zero_shot_classification",
    "zero_shot_head",
]
