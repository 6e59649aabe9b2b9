"""Fresh processes, without the two seconds in which one imports torch: forks of one that has imported it, and nothing of ours."""

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["torch"])


def start(function, *arguments) -> multiprocessing.Process:
    """One that calls the function."""
    process = context.Process(target=_heeding_signals, args=(function, *arguments))
    process.start()
    return process


def _heeding_signals(function, *arguments) -> None:
    heed_signals()
    function(*arguments)


def heed_signals() -> None:
    """As in a process that a terminal starts; what runs in a shell's background or under nohup inherits that they are ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT, signal.SIGTERM])


def in_a_process(function, *arguments):
    """What the function returns, called there, or what it raises."""
    receiver, sender = context.Pipe(duplex=False)
    process = start(_answer, sender, function, arguments)
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:
        process.join()
        answer = RuntimeError(f"the process ended with {process.exitcode}")
    if isinstance(answer, BaseException):
        raise answer
    return answer


def _answer(sender, function, arguments) -> None:
    try:
        sender.send(function(*arguments))
    except Exception as error:
        sender.send(error)
        raise  # prints where


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """As `python -c`, with what it prints; torch has been imported before."""
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "stdout"), Path(folder, "stderr")
        process = start(_python, code, {**os.environ, **environment}, files)
        process.join()
        return subprocess.CompletedProcess(code, process.exitcode, *(file.read_text() for file in files))


def _python(code: str, environment: dict[str, str], files: tuple[Path, Path]) -> None:
    print_to(*files)
    os.environ.clear()
    os.environ.update(environment)
    exec(code, {"__name__": "__main__"})


def print_to(stdout: Path, stderr: Path) -> None:
    """Sends what this process prints from now on to files."""
    for stream, file in zip((sys.stdout, sys.stderr), (stdout, stderr), strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())


def give_freed_tensors_back() -> None:
    """Has malloc return blocks of 1 MiB and more as soon as they are freed, so that what is measured is what is held."""
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD
