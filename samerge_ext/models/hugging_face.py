"""What learned merges of transformers' folders are calibrated with."""

from samerge_ext.models.logits import causal_lm, sequence_classification
from samerge_ext.models.texts import read_texts, text_batches

__all__ = ["causal_lm", "read_texts", "sequence_classification", "text_batches"]
