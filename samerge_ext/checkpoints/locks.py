"""What one process at a time holds: the folder of a run, and files and folders while they are written under a name of their own.

The locks are flock's. They end with their process, however it ends, so that what a killed one left behind is known for that.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from samerge_ext.checkpoints.reading import CheckpointError

_TRIES = 100  # to lock what others make and remove at the same time


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """The folder of a run, made where missing; removed at the end, with parents that were made, where nothing is left in it.

    Raises CheckpointError, at once, where another process holds it.
    """
    lock = folder / "lock"
    for _ in range(_TRIES):
        made = [each for each in (folder, *folder.parents) if not each.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = _locked(lock, os.O_RDWR | os.O_CREAT)
            break
        except BlockingIOError as error:
            raise CheckpointError(f"{folder} is held by another merge; wait for its end or choose another folder") from error
        except (FileNotFoundError, FileExistsError):  # the one that held it is through, and has just removed the folder
            continue
    else:
        raise CheckpointError(f"{folder} is no folder, or {lock} no file; delete it or choose another folder")
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        with suppress(OSError):
            for each in made or [folder]:
                each.rmdir()
        os.close(descriptor)


@contextmanager
def partial_of(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """A new file or folder beside `path`, to be renamed to it; removed at the end of the block where it was not.

    Its name is its own. What ended processes left of the same path is removed first.
    """
    sweep(path)
    descriptor = None
    while True:
        partial = sibling(path, "tmp")
        if folder:
            partial.mkdir()
        else:
            os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        try:
            descriptor = _locked(partial)
        except (BlockingIOError, FileNotFoundError):  # another process took it for a left one, before it was locked
            continue
        except OSError:  # a file system without locks, where nothing is ever taken for a left one
            pass
        break
    try:
        yield partial
    finally:
        _remove(partial)
        if descriptor is not None:
            os.close(descriptor)


def sweep(path: Path, suffix: str = "tmp") -> None:
    """Removes what ended processes left beside `path` under names of `sibling`."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.{suffix}")
    for left in [found for found in path.parent.iterdir() if pattern.fullmatch(found.name)]:
        with suppress(OSError):  # being written, gone, or another user's
            descriptor = _locked(left)
            _remove(left)
            os.close(descriptor)


def remove(path: Path) -> None:
    """Removes a file, where it is there, and what is left of its partial ones."""
    path.unlink(missing_ok=True)
    sweep(path)


def sibling(path: Path, suffix: str) -> Path:
    """A new hidden name beside `path`."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.{suffix}")


def _locked(path: Path, flags: int | None = None) -> int:
    """A descriptor that holds a file or folder until it is closed.

    Raises BlockingIOError where another process holds it, FileNotFoundError where it is gone.
    """
    descriptor = os.open(path, (os.O_RDONLY if path.is_dir() else os.O_RDWR) if flags is None else flags, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), os.stat(path)):
            raise FileNotFoundError(f"{path} is another one by now")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
