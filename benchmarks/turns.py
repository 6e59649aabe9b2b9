"""Timing: seconds of a call on a device, and calls that take turns."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from statistics import mean
from time import perf_counter

import torch

# seconds(call, repeat): the mean time of one of `repeat` calls in a row
Seconds = Callable[[Callable[[], object], int], float]

SHORT = 2e-3  # seconds; calls that take less are repeated within a turn, up to that
LONG = 0.5  # seconds; calls that take more are warm after one
MIN_TURNS, MAX_TURNS = 5, 200


def seconds_on(device: str) -> Seconds:
    return _device_seconds if device == "cuda" else _host_seconds


def _host_seconds(call: Callable[[], object], repeat: int) -> float:
    started = perf_counter()
    for _ in range(repeat):
        call()
    return (perf_counter() - started) / repeat


def _device_seconds(call: Callable[[], object], repeat: int) -> float:
    """Between two events in the stream. Before each call the L2 cache is overwritten, and while that runs the host gets
    ahead, so that no launch is waited for (a candidate of hundreds of launches still waits, as it would in use)."""
    spans = []
    for _ in range(repeat):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        _larger_than_caches().zero_()
        start.record()
        call()
        stop.record()
        spans.append((start, stop))
    torch.cuda.synchronize()
    return mean(start.elapsed_time(stop) for start, stop in spans) / 1e3


@functools.cache
def _larger_than_caches() -> torch.Tensor:
    return torch.empty(2**28, dtype=torch.int8, device="cuda")


class Stopwatch:
    """A timer for pytest-benchmark that stands still except while the candidate runs."""

    def __init__(self):
        self.elapsed = 0.0

    def __call__(self) -> float:
        return self.elapsed


class Turns:
    """Calls that run one after the other, turn by turn, and the seconds each took in each turn.

    How often a call is repeated within a turn, and how many turns fit into `budget` seconds, a turn or two of warming up shows.
    """

    def __init__(self, calls: dict[str, Callable[[], object]], seconds: Seconds, budget: float):
        self.calls, self._seconds = calls, seconds
        first = {name: seconds(call, 1) for name, call in calls.items()}
        once = {name: seconds(call, 1) if first[name] < LONG else first[name] for name, call in calls.items()}
        self._repeat = {name: max(1, math.ceil(SHORT / max(time, 1e-7))) for name, time in once.items()}
        turn = sum(once[name] * self._repeat[name] for name in calls)
        self.rounds = max(MIN_TURNS, min(MAX_TURNS, int(budget / turn)))
        self.seconds: dict[str, list[float]] = {name: [] for name in calls}

    def take(self) -> None:
        for name, call in self.calls.items():
            self.seconds[name].append(self._seconds(call, self._repeat[name]))
