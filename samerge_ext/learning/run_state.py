"""The state of a run on disk, from which it continues to the same numbers."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch

from samerge_ext.checkpoints.sealed import read_sealed, write_sealed
from samerge_ext.learning.calibration import Calibration
from samerge_ext.learning.config import LearningConfig
from samerge_ext.merged.model import MergedModel

STATE_FILE = "state.pt"  # in a run's checkpoint_dir


class Stateful(Protocol):
    """What is learned, the optimiser, what stops early."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any) -> Any: ...


class RunState:
    """The state of a run in ``checkpoint_dir``: what is learned, optimiser, early stopping, history and torch's random state."""

    def __init__(self, config: LearningConfig, method: str, model: MergedModel, calibration: Calibration):
        self.path = Path(config.checkpoint_dir) / STATE_FILE if config.checkpoint_dir else None
        settings = {key: value for key, value in asdict(config).items() if key not in config.MAY_CHANGE}
        self.identity = {
            "method": method,
            **settings,
            "tasks": list(model.packed.tasks),
            "layers": list(model.packed.layout.names),
            "dtypes": [str(model.packed.base.dtype), model.packed.task_vector_form],
            "weight files": list(model.packed.inputs.values()),
            "heads": model.trained_heads.identity(),
            "batches": {task: len(held) for task, held in calibration.batches.items()},
        }
        self._writes = model.packed.ranks.is_first
        self._steps, self._finished = 0, dict[str, Any]()

    def load(self, parts: Mapping[str, Stateful], history: list[dict]) -> None:
        if self.path is None or not self.path.exists():
            return
        state = torch.load(io.BytesIO(read_sealed(self.path)), weights_only=True)
        saved, own = json.loads(state["identity"]), json.loads(json.dumps(self.identity))
        differs = sorted(key for key in saved.keys() | own.keys() if saved.get(key) != own.get(key))
        if differs:
            raise ValueError(f"{self.path} is of another run: {', '.join(differs)} differ; choose another checkpoint_dir")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        history.extend(state["history"])
        torch.set_rng_state(state["random_state"])

    def finished(self, steps: int, parts: Mapping[str, Stateful]) -> None:
        """Keeps in memory what so many steps have made, to be saved even where the next one is stopped half-way."""
        if self.path is not None:
            state = {name: part.state_dict() for name, part in parts.items()}
            self._steps, self._finished = steps, {**copy.deepcopy(state), "random_state": torch.get_rng_state()}

    def save(self, history: list[dict]) -> None:
        """Writes the finished steps, where there are any that are not written yet. Of several ranks the first one does."""
        if self.path is None or not self._finished or not self._writes:
            return
        content = io.BytesIO()
        torch.save({**self._finished, "identity": json.dumps(self.identity), "history": history[: self._steps]}, content)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_sealed(self.path, content.getvalue())
        self._finished = {}
