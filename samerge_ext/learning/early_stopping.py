"""Early stopping: the state of a run at which batches that are held back have the least loss."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

from torch import nn


class EarlyStopping:
    """Measures ``loss()`` when asked, keeps the state of ``learned`` where it was least, and counts how often it was not less.

    patience: how many measurements in a row may be no less than the least before the run has ended.
    """

    def __init__(self, learned: nn.Module, loss: Callable[[], float], patience: int):
        self.learned, self.loss, self.patience = learned, loss, patience
        self.least, self.in_vain = math.inf, 0
        self.best: dict[str, Any] = {}

    def measure(self, step: int) -> float:
        """The loss before ``step``. Raises FloatingPointError where it is NaN or Inf."""
        found = self.loss()
        if not math.isfinite(found):
            raise FloatingPointError(f"the loss of what is held back is {found} before step {step}; try smaller learning rates")
        if found < self.least:
            self.least, self.in_vain, self.best = found, 0, copy.deepcopy(self.learned.state_dict())
        else:
            self.in_vain += 1
        return found

    @property
    def has_ended(self) -> bool:
        return self.in_vain >= self.patience

    def take_best(self) -> None:
        self.learned.load_state_dict(self.best)

    def state_dict(self) -> dict[str, Any]:
        """What is in it is never changed, only replaced."""
        return {"least": self.least, "in_vain": self.in_vain, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.least, self.in_vain, self.best = state["least"], state["in_vain"], state["best"]
