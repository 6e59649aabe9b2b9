"""Models whose tasks share an encoder and differ in their heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad


def concatenate(batches: Sequence[Any]) -> Any:
    """Batches of several tasks as one: tensors [B, …], or dicts, tuples and lists of them, joined along dimension 0.

    Token batches of different lengths are padded with zeros on the right; they must be dicts with an
    ``attention_mask``, so that what is padded is not attended to.
    """
    first = batches[0]
    if isinstance(first, Tensor):
        return torch.cat(list(batches))
    if isinstance(first, Mapping):
        columns = {key: [batch[key] for batch in batches] for key in first}
        if "attention_mask" in first:
            length = max(mask.shape[1] for mask in columns["attention_mask"])
            columns = {key: [_padded(t, m, length) for t, m in zip(c, columns["attention_mask"])] for key, c in columns.items()}
        return {key: torch.cat(column) for key, column in columns.items()}
    if isinstance(first, tuple | list):
        return type(first)(concatenate(column) for column in zip(*batches, strict=True))
    raise TypeError(f"cannot join batches of type {type(first).__name__}; give SharedEncoder(concatenate=) a function that can")


def _padded(tensor: Tensor, mask: Tensor, length: int) -> Tensor:
    missing = length - mask.shape[1]
    return pad(tensor, (0, missing)) if missing and tensor.shape[:2] == mask.shape[:2] and tensor.dim() == 2 else tensor


def batch_size(batch: Any) -> int:
    """Examples in a batch: the first dimension of its first tensor."""
    while not isinstance(batch, Tensor):
        batch = next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0]
    return batch.shape[0]


@dataclass(frozen=True)
class SharedEncoder:
    """Says that tasks share an encoder, so that the batches of several tasks run through it as one.

    encode(module, batch) -> features [B, …]; head(features, task) -> logits [B, V_task].
    concatenate(batches) -> one batch; the default joins tensors, dicts and tuples of them.

    It is a ``logits(module, batch, task)`` function as well.
    """

    encode: Callable[[nn.Module, Any], Tensor]
    head: Callable[[Tensor, str], Tensor]
    concatenate: Callable[[Sequence[Any]], Any] = concatenate

    def __call__(self, module: nn.Module, batch: Any, task: str) -> Tensor:
        return self.head(self.encode(module, batch), task)

    def together(self, module: nn.Module, batches: Mapping[str, Any]) -> dict[str, Tensor]:
        """Logits [B_task, V_task] of every task, from one pass of the encoder over all their batches."""
        features = self.encode(module, self.concatenate(list(batches.values())))
        sizes = [batch_size(batch) for batch in batches.values()]
        return {task: self.head(rows, task) for task, rows in zip(batches, features.split(sizes), strict=True)}
