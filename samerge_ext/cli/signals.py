"""Ctrl-C and SIGTERM: one line and an exit code, at any time, after what a run can save is saved."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import NoReturn

STOPPED = "samerge: stopped by {}; what a merge had finished is kept, the same command goes on from there"
AGAIN = 0.05  # seconds after which a signal that came into a finaliser is sent again
TOGETHER = 1.0  # seconds within which signals count as one: `timeout` and terminals send it to a process and to its group


@contextmanager
def one_line_for_signals() -> Iterator[None]:
    """Within the block SIGINT and SIGTERM raise KeyboardInterrupt; then the process ends with a line and 128 + the signal.

    It ends at once while a module is being imported, when there is nothing to save and the exception might be lost in the
    module, and at a second signal. A finaliser, out of which no exception comes, is waited for, but not for longer than
    `TOGETHER`. A signal that is ignored when the process starts still is.
    """
    first: list[tuple[int, float]] = []
    raised = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal raised
        if not first:
            first.append((number, time.monotonic()))
        is_second = time.monotonic() >= first[0][1] + TOGETHER
        if is_second or (not raised and _within(frame, _imports)):
            _end(first[0][0])
        if not raised and _within(frame, _is_finaliser):
            _thread.start_new_thread(_send_again, (number,))  # threading's locks may be held by what the signal came into
        elif not raised:
            raised = True
            raise KeyboardInterrupt

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


def _send_again(number: int) -> None:
    time.sleep(AGAIN)
    os.kill(os.getpid(), number)


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
