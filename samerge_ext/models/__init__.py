"""Adapters: how a model's forward is called for the batch of a task."""

from samerge_ext.learning.shared_encoder import SharedEncoder, concatenate
from samerge_ext.models.on_meta import parameters_on_meta

__all__ = ["SharedEncoder", "concatenate", "parameters_on_meta"]
