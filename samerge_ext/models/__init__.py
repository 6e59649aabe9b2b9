"""Adapters: how a model's forward is called for the batch of a task."""

from samerge_ext.models.shared_encoder import SharedEncoder, concatenate

__all__ = ["SharedEncoder", "concatenate"]
