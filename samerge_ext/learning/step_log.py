"""The history of a run, read from the device without holding it up."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class StepLog:
    """Turns what every step measured into records of the history.

    On a GPU the numbers of ``every`` steps travel together to pinned memory and are read when the next ones set out:
    the host runs ahead of the device by up to twice that many steps and never waits for the step it has just
    launched. On the CPU they are read at once.

    A step's numbers are one or two passes [P, 2, T]: the tasks' losses, and the norms of the gradients of their coefficients and
    heads.

    Raises FloatingPointError, naming task and step, when a loss or gradient that it reads is NaN or Inf.
    """

    def __init__(self, history: list[dict], tasks: tuple[str, ...], weights: dict[str, float], device: torch.device, every: int):
        self.history, self.tasks, self.weights = history, tasks, weights
        self.on_gpu = device.type == "cuda"
        self.every = every if self.on_gpu else 1
        self._waiting: list[Tensor] = []  # on the device
        self._beside: list[dict] = []  # what else belongs into the records that are not there yet
        self._under_way: tuple[Tensor, torch.cuda.Event] | None = None

    def add(self, measured: Tensor, **beside: float) -> None:
        """The numbers [P, 2, T] of the next step, and others that its record names."""
        self._waiting.append(measured)
        self._beside.append(beside)
        if len(self._waiting) >= self.every:
            self._receive()
            self._send()

    def flush(self) -> None:
        """Waits until the history holds every step that was added."""
        self._receive()
        if self._waiting:
            self._send()
            self._receive()

    def _send(self) -> None:
        steps, self._waiting = torch.stack(self._waiting), []
        if not self.on_gpu:
            self._read(steps)
            return
        host = torch.empty(steps.shape, dtype=steps.dtype, device="cpu", pin_memory=True)
        host.copy_(steps, non_blocking=True)
        self._under_way = host, torch.cuda.current_stream(steps.device).record_event()

    def _receive(self) -> None:
        if self._under_way is not None:
            (host, arrived), self._under_way = self._under_way, None
            arrived.synchronize()
            self._read(host)

    def _read(self, steps: Tensor) -> None:  # [n, P, 2, T]
        for passes in steps.tolist():
            step = len(self.history)
            for losses, norms in passes:
                self._check(step, losses, norms)
            losses, norms = passes[0]
            record = {"step": step, "loss": sum(self.weights[t] * x for t, x in zip(self.tasks, losses, strict=True))}
            record["losses"] = dict(zip(self.tasks, losses, strict=True))
            record["gradient_norm"] = math.hypot(*norms)
            self.history.append({**record, **self._beside.pop(0)})

    def _check(self, step: int, losses: list[float], norms: list[float]) -> None:
        for task, loss in zip(self.tasks, losses, strict=True):
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss of task '{task}' is {loss} at step {step}; try a smaller learning_rate or rho, or precision='fp32'"
                )
        for task, norm in zip(self.tasks, norms, strict=True):
            if not math.isfinite(norm):
                raise FloatingPointError(f"the gradient of task '{task}''s coefficients is not finite at step {step}")
