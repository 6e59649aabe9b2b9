"""Fresh processes, without the two seconds in which one imports torch: forks of one that has imported it, and nothing of ours."""

import ctypes
import multiprocessing
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["torch"])


def in_a_process(function, *arguments):
    """What the function returns, called there."""
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """As `python -c`, with what it prints; torch has been imported before."""
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "stdout"), Path(folder, "stderr")
        process = context.Process(target=_python, args=(code, {**os.environ, **environment}, files))
        process.start()
        process.join()
        return subprocess.CompletedProcess(code, process.exitcode, *(file.read_text() for file in files))


def _python(code: str, environment: dict[str, str], files: tuple[Path, Path]) -> None:
    for stream, file in zip((sys.stdout, sys.stderr), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream.fileno())
    os.environ.clear()
    os.environ.update(environment)
    exec(code, {"__name__": "__main__"})


def give_freed_tensors_back() -> None:
    """Has malloc return blocks of 1 MiB and more as soon as they are freed, so that what is measured is what is held."""
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD
