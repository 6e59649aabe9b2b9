"""Base or task vectors that are no tensors: numbers that are read, or computed, some at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class InPieces(ABC):
    """Base [N] or task vectors [T, N] that come in pieces.

    device: where they are computed with. reads_to: where `read_into` writes.
    where: for messages, how they are kept. form: of task vectors, see `PackedWeights.task_vector_form`.
    """

    shape: torch.Size
    device: torch.device
    reads_to: torch.device
    where: str
    form: str

    @abstractmethod
    def empty(self, length: int, device: torch.device | str, pin_memory: bool = False):
        """Room for ``length`` of the numbers: [length] or [T, length], a tensor or QuantisedTaskVectors."""

    @abstractmethod
    def read_into(self, start: int, length: int, out) -> None:
        """Puts numbers ``start`` … into the first places of ``out``, room for as many or more."""

    def __getitem__(self, index) -> Tensor:
        raise TypeError(f"these weights {self.where}; what needs them whole takes packed.in_memory()")

    def __iter__(self):
        return self[:]
