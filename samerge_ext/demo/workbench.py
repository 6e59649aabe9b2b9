"""What the cells of one variant and seed share: data, heads, experts and packed weights, made when first needed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from copy import copy, deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

import samerge_ext as sm
from samerge_ext.demo.data import Task, calibration_texts, load_tasks
from samerge_ext.demo.experts import (
    Batch,
    Evaluator,
    Heads,
    base_folder,
    build_heads,
    encode,
    expert_folder,
    expert_path,
    load_folder,
    text_batches,
)


class Bench(ABC):
    """Everything that the cells of one variant and seed share, whatever the tasks are made of. Experts and base are folders.

    The seed varies the experts (order of their batches) and the calibration samples and their order.
    """

    encode: Callable[[nn.Module, Any], Tensor]

    def __init__(self, protocol: Any, seed: int, cache: Path, progress: bool = True):
        self.protocol, self.seed, self.cache, self.progress = protocol, seed, Path(cache), progress
        self._others: dict[tuple, sm.PackedWeights] = {}

    def at_seed(self, seed: int) -> Self:
        """The same at another seed, which has its own experts and shares the samples, the heads and the base."""
        other = copy(self)
        other.seed, other._others = seed, {}
        for name in ("experts", "packed"):
            vars(other).pop(name, None)
        return other

    @property
    def full(self) -> bool:
        return self.protocol.name == "full"

    @property
    @abstractmethod
    def tasks(self) -> dict[str, Any]:
        """Task -> its samples, in splits."""

    @property
    @abstractmethod
    def heads(self) -> Heads:
        """Frozen, of all tasks."""

    @property
    @abstractmethod
    def base(self) -> Path:
        """The folder of the pretrained encoder."""

    @abstractmethod
    def expert(self, task: str) -> Path:
        """The folder of a task's expert, fine-tuned now if the cache does not have it."""

    @abstractmethod
    def expert_path(self, task: str) -> Path:
        """Where that folder is, or will be."""

    @abstractmethod
    def load(self, folder: Path) -> nn.Module:
        """The encoder in the folder of an expert or of the base, in eval mode."""

    @abstractmethod
    def evaluator(self, split: str) -> Evaluator:
        """Of labelled samples: "test", or "tuning", a part of the training ones for choices that need labels."""

    @abstractmethod
    def calibration(self, samples: int, batch: int) -> dict[str, list[Any]]:
        """Unlabelled batches of so many samples per task."""

    @cached_property
    def experts(self) -> dict[str, Path]:
        return {task: self.expert(task) for task in self.tasks}

    @cached_property
    def packed(self) -> sm.PackedWeights:
        return sm.PackedWeights.from_folders(self.base, self.experts)

    def packed_for(self, settings: dict) -> sm.PackedWeights:
        """With the `task_vector_dtype` that a row's settings name, or preconditioned with their `ridge`; the last one is kept."""
        form, ridge = settings.get("task_vector_dtype"), settings.get("ridge")
        if form is None and ridge is None:
            return self.packed
        if (form, ridge) not in self._others:
            packed = sm.PackedWeights.from_folders(self.base, self.experts, task_vector_dtype=form)
            self._others = {(form, ridge): packed if ridge is None else sm.preconditioned(packed, ridge)}
        return self._others[form, ridge]

    @cached_property
    def test(self) -> Evaluator:
        return self.evaluator("test")

    @cached_property
    def tuning(self) -> Evaluator:
        return self.evaluator("tuning")

    @cached_property
    def _module(self) -> nn.Module:
        return self.load(self.base)

    def module(self) -> nn.Module:
        """A module of the encoder's architecture: the caller's own, copied from one that is loaded once."""
        return deepcopy(self._module)

    @property
    def logits(self) -> sm.models.SharedEncoder:
        return sm.models.SharedEncoder(self.encode, self.heads)

    def with_heads(self, heads: Mapping[str, nn.Module]) -> sm.models.SharedEncoder:
        """As `logits`, with modules as heads."""
        return sm.models.SharedEncoder(self.encode, lambda features, task: heads[task](features))


class Workbench(Bench):
    """Of texts."""

    encode = staticmethod(encode)

    @cached_property
    def tasks(self) -> dict[str, Task]:
        return load_tasks(self.protocol.tasks)

    @cached_property
    def heads(self) -> Heads:
        return build_heads(self.tasks, self.protocol)

    @cached_property
    def base(self) -> Path:
        return base_folder(self.protocol, self.cache)

    def expert(self, task: str) -> Path:
        return expert_folder(self.tasks[task], self.heads, self.protocol, self.seed, self.cache, self.progress)

    def expert_path(self, task: str) -> Path:
        return expert_path(self.tasks[task], self.protocol, self.seed, self.cache)

    def load(self, folder: Path) -> nn.Module:
        return load_folder(folder)

    def evaluator(self, split: str) -> Evaluator:
        return Evaluator(self.tasks, self.heads, self.protocol, split, progress=self.progress)

    def calibration(self, samples: int, batch: int) -> dict[str, list[Batch]]:
        """Of texts drawn from the training split."""
        return {
            name: text_batches(calibration_texts(task, samples, self.seed), self.protocol, batch)
            for name, task in self.tasks.items()
        }
