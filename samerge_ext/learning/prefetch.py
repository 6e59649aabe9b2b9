"""The inputs of every step on the model's device: from pinned memory, one step ahead, while the step before runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from samerge_ext.learning.calibration import Calibration
from samerge_ext.learning.nested import map_tensors, to_device


class Input(NamedTuple):
    """A task's batch; what the objective compares its answers with, or None; whether what comes of it counts."""

    batch: Any
    target: Any
    counts: bool = True


Inputs = Mapping[str, Input]  # by task: what a step runs on


def inputs_of_steps(
    calibration: Calibration,
    targets: Mapping[str, Sequence[Any]] | None,
    device: torch.device,
    steps: range,
    tasks: Sequence[str],
) -> Iterator[Inputs]:
    """Each step's batches of ``tasks`` and their targets, on ``device``. Tensors elsewhere are copied; on the CPU nothing runs
    ahead."""
    on_gpu = device.type == "cuda"
    batches = {task: [_pinned(batch) if on_gpu else batch for batch in calibration.batches[task]] for task in tasks}

    def fetch(step: int) -> Inputs:
        indices = {task: index for task, index in calibration.at(step).items() if task in batches}
        return {
            task: to_device(Input(batches[task][i], targets[task][i] if targets else None, calibration.counts[task][i]), device)
            for task, i in indices.items()
        }

    return _one_ahead(fetch, device, steps) if on_gpu else map(fetch, steps)


def _one_ahead(fetch: Callable[[int], Inputs], device: torch.device, steps: range) -> Iterator[Inputs]:
    stream = torch.cuda.Stream(device)

    def start(step: int) -> tuple[Inputs, torch.cuda.Event]:
        with torch.cuda.stream(stream):
            return fetch(step), stream.record_event()

    if not steps:
        return
    ahead = start(steps[0])
    for step in steps:
        inputs, arrived = ahead
        current = torch.cuda.current_stream(device)
        current.wait_event(arrived)
        _used_on(current, inputs)
        if step + 1 < steps.stop:
            ahead = start(step + 1)
        yield inputs


def _used_on(stream: torch.cuda.Stream, inputs: Inputs) -> None:
    """Allocated on the copying stream, used on this one: must not be handed out again before that is done."""
    map_tensors(lambda tensor: tensor.record_stream(stream), inputs)


def _pinned(batch: Any) -> Any:
    return map_tensors(lambda tensor: tensor.pin_memory() if tensor.device.type == "cpu" else tensor, batch)
