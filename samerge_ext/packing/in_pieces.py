"""Base or task vectors that are no tensors: numbers that are read, or computed, some at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, NoReturn, Self, TypeVar

import torch

Room = TypeVar("Room")  # what holds a piece: a tensor or QuantisedTaskVectors


class InPieces(ABC, Generic[Room]):
    """Base [N] or task vectors [T, N] that come in pieces.

    nbytes: as they are kept. device: where they are computed with. reads_to: where `read_into` writes.
    where: for messages, how they are kept. form: of task vectors, see `PackedWeights.task_vector_form`.
    """

    shape: torch.Size
    nbytes: int
    device: torch.device
    reads_to: torch.device
    where: str
    form: str

    @abstractmethod
    def empty(self, length: int, device: torch.device | str, pin_memory: bool = False) -> Room:
        """Room for ``length`` of the numbers: [length] or [T, length]."""

    @abstractmethod
    def read_into(self, start: int, length: int, out: Room) -> None:
        """Puts numbers ``start`` … into the first places of ``out``, room for as many or more."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""

    def not_whole(self) -> TypeError:
        return TypeError(f"these weights {self.where}; what needs them whole takes packed.in_memory()")

    def __getitem__(self, index: object) -> NoReturn:
        raise self.not_whole()

    def __iter__(self) -> NoReturn:
        raise self.not_whole()
