"""Language models whose logits are never in memory: their last hidden states, and the head that logits would be made with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from samerge_ext.merged.streamed import rows_of
from samerge_ext.merged.streamed_rows import StreamedRows

# inputs(module, batch) -> the keyword arguments of the module's forward, and which tokens [B, S] are rows of logits.
Inputs = Callable[[Any, Any], tuple[dict[str, Any], Tensor]]

# The weight of a head [V, H]: as a tensor, or of a streamed model as rows that are merged when they are asked for.
Weight = Tensor | StreamedRows


class Projected(NamedTuple):
    """Logits [R, V] that do not exist: hidden · weightᵀ + bias."""

    hidden: Tensor  # [R, H]
    weight: Weight  # [V, H]
    bias: Tensor | None  # [V]

    def parts(self) -> list[Tensor | None]:
        """What there are gradients by: in place of rows that are merged, their coefficients [T]."""
        weight = self.weight if isinstance(self.weight, Tensor) else self.weight.coefficients
        return [self.hidden, weight, self.bias]


class OfExpert(NamedTuple):
    """A teacher's logits [R, V] that do not exist. head: makes its weight [V, H] and bias [V] anew whenever they are needed."""

    hidden: Tensor  # [R, H]
    head: Callable[[], tuple[Weight, Tensor | None]]

    def projected(self) -> Projected:
        return Projected(self.hidden, *self.head())


class LanguageModel:
    """A ``logits(module, batch, task)`` function -> [rows, V] of a model of transformers with a row of logits for every token.

    It says what the model is given, and so that learned methods need no logits: they take the hidden states [rows, H] before the
    module's output embeddings, wherever the module's logits are the product of the two, or that times a number (`is_exact`).
    Elsewhere, as where logits are capped (Gemma 2) or have a bias added (BART), logits are what is kept.
    """

    def __init__(self, inputs: Inputs):
        self.inputs = inputs
        functools.update_wrapper(self, inputs)

    def __call__(self, module: nn.Module, batch: Any, task: str) -> Tensor:
        return self.logits(module, batch, task)

    def logits(self, module: nn.Module, batch: Any, task: str) -> Tensor:  # [rows, V]
        inputs, kept = self.inputs(module, batch)
        return module(**inputs).logits[kept]

    def hidden_states(self, module: nn.Module, batch: Any) -> Tensor:  # [rows, H]
        """What the head is given, times what its logits are multiplied with: from a pass in which the head gives back what it is
        given."""
        inputs, kept = self.inputs(module, batch)
        with _passing_through(output_head(module)):
            return module(**inputs).logits[kept]

    def projected(self, module: nn.Module, batch: Any) -> Projected:
        hidden, head = self.hidden_states(module, batch), output_head(module)
        rows = rows_of(head, "weight")
        return Projected(hidden, head.weight if rows is None else rows, head.bias)

    @torch.no_grad()
    def is_exact(self, module: nn.Module, batch: Any) -> bool:
        """Whether logits are `hidden_states` · weightᵀ + bias of the output embeddings: these are a plain linear layer, and what
        it gives is what the module gives, or without a bias, after nothing but multiplications with numbers (Granite, Cohere).
        A pass over the batch, at no matter which weights, also without numbers."""
        head = output_head(module)
        if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
            return False
        inputs, _ = self.inputs(module, batch)
        with _passing_through(head) as given, _Scalings(given) as scalings:
            try:
                outputs = module(**inputs)
            except RuntimeError:  # something of the vocabulary's size is added to the logits
                return False
        if scalings.found and head.bias is not None:
            return False
        return len(given) == 1 and outputs.logits is (scalings.found or given)[-1]


def output_head(module: Any) -> Any:
    """A model's output embeddings; None where it names none."""
    return module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None


class _Scalings(TorchDispatchMode):
    """found: what becomes of the one tensor in ``given`` as long as it is multiplied with or divided by numbers, step by step."""

    KINDS = tuple(getattr(torch.ops.aten, name).Tensor for name in ("mul", "mul_", "div", "div_"))

    def __init__(self, given: list[Tensor]):
        super().__init__()
        self.given, self.found = given, list[Tensor]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        followed = (self.found or self.given)[-1:]
        if func in self.KINDS and followed and args[0] is followed[0] and isinstance(args[1], int | float):
            self.found.append(result)
        return result


@contextmanager
def _passing_through(head: nn.Module) -> Iterator[list[Tensor]]:
    """While it lasts the head gives back what it is given, which is noted.

    A streamed unit that holds the head (BERT's) runs again in its backward without this, but not as far as the head: checkpoint
    stops when it has what the forward saved.
    """
    given: list[Tensor] = []
    before = head.__dict__.get("forward")

    def forward(hidden: Tensor) -> Tensor:
        given.append(hidden)
        return hidden

    head.forward = forward
    try:
        yield given
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before
