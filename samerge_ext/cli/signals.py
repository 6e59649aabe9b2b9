"""Ctrl-C and SIGTERM: one line and an exit code, at any time, after what a run can save is saved."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import NoReturn

STOPPED = "samerge: stopped by {}; what a merge had finished is kept, the same command goes on from there"
SOON = 0.05  # seconds
TOGETHER = 1.0  # seconds within which signals count as one: `timeout` and terminals send it to a process and to its group


@contextmanager
def one_line_for_signals() -> Iterator[None]:
    """Within the block SIGINT and SIGTERM raise KeyboardInterrupt; then the process ends with a line and 128 + the signal.

    It ends at once while a module is being imported, when there is nothing to save and the exception might be lost in the
    module, and at a second signal. In a finaliser, from which no exception comes out, it waits a moment. A signal that is ignored
    when the process starts still is.
    """
    first: list[tuple[int, float]] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if not first:
            if _within(frame, _is_finaliser):
                again = threading.Timer(SOON, os.kill, (os.getpid(), number))
                again.daemon = True
                again.start()
                return
            first.append((number, time.monotonic()))
            if not _within(frame, _imports):
                raise KeyboardInterrupt
        elif time.monotonic() < first[0][1] + TOGETHER:
            return
        _end(first[0][0])

    heeded = [each for each in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(each) != signal.SIG_IGN]
    for each in heeded:
        signal.signal(each, stop)
    try:
        yield
    except BaseException:
        if first:
            _end(first[0][0])
        raise
    finally:
        for each in heeded:
            signal.signal(each, signal.SIG_IGN)  # all is done, and an exception would have nobody to catch it


def _within(frame: FrameType | None, kind: Callable[[CodeType], bool]) -> bool:
    """Whether code of this kind is being run, there or in what calls it."""
    while frame is not None:
        if kind(frame.f_code):
            return True
        frame = frame.f_back
    return False


def _imports(code: CodeType) -> bool:
    return code.co_filename.startswith("<frozen importlib")


def _is_finaliser(code: CodeType) -> bool:
    return code.co_name == "__del__"


def _end(number: int) -> NoReturn:
    sys.stdout.flush()
    os.write(2, f"{STOPPED.format(signal.Signals(number).name)}\n".encode())
    os._exit(128 + number)
