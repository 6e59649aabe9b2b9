"""What one process at a time holds, or several that work together: the folder of a run, and files and folders while they are
written under a name of their own.

The locks are flock's. They end with their process, however it ends, so that what a killed one left behind is known for that.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from samerge_ext.checkpoints.reading import CheckpointError

_LOCK, _TURN = "lock", "turn"  # in a folder that is held, and in one that is held together
_TRIES = 100  # to lock what others make and remove at the same time


class Hold:
    """What a process has of a folder that it holds by itself, or together with others: made and closed by `held`.

    What those who hold it together may not do at the same time each does in its turn, for which it waits: to begin, and to end
    what all of them did.
    """

    def __init__(self, folder: Path, *, together: bool):
        self._folder, self._alone, self._left = folder, not together, False
        self._turn: int | None = None
        if together:
            self._begin_turn()
        try:
            self._lock = locked(folder / _LOCK, os.O_RDWR | os.O_CREAT, fcntl.LOCK_SH if together else fcntl.LOCK_EX)
        except BaseException:
            self.end_turn()
            raise

    def take(self) -> bool:
        """Whether no other process holds the folder, and from here on, in this one's last turn, none can. Otherwise this process
        holds it no more: of all that hold it together the last one to ask is told that it is alone, and no other."""
        if not self._alone and not self._left:
            self._begin_turn()
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._alone = True
            except BlockingIOError:
                self._left = True
                self.end_turn()
        return self._alone

    def share(self) -> None:
        """Has the folder together with others again. Raises CheckpointError where another process just took it."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _held_by_another(self._folder) from error
        self._alone = False

    def end_turn(self) -> None:
        if self._turn is not None:
            os.close(self._turn)
            self._turn = None

    def close(self) -> None:
        os.close(self._lock)
        self.end_turn()

    def _begin_turn(self) -> None:
        while self._turn is None:
            try:
                self._turn = locked(self._folder / _TURN, os.O_RDWR | os.O_CREAT, wait=True)
            except FileNotFoundError:  # who had it has removed it, and maybe the folder, too
                if not self._folder.exists():
                    raise


@contextmanager
def held(folder: Path, *, together: bool = False, entering: Callable[[Hold], None] | None = None) -> Iterator[Hold]:
    """The folder of a run, made where missing; removed at the end, with parents that were made, where nothing is left in it.

    together: with other processes that hold it so, too. entering: called first, in this process's turn.
    Raises CheckpointError, at once, where another process holds the folder, and not together.
    """
    for _ in range(_TRIES):
        made = [each for each in (folder, *folder.parents) if not each.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            hold = Hold(folder, together=together)
            break
        except BlockingIOError as error:
            raise _held_by_another(folder) from error
        except (FileNotFoundError, FileExistsError):  # the one that held it is through, and has just removed the folder
            continue
    else:
        raise CheckpointError(f"{folder} is no folder, or {folder / _LOCK} no file; delete it or choose another folder")
    try:
        if entering is not None:
            entering(hold)
        hold.end_turn()
        yield hold
    finally:
        try:
            if hold.take():
                for name in (_LOCK, _TURN):
                    (folder / name).unlink(missing_ok=True)
                with suppress(OSError):
                    for each in made or [folder]:
                        each.rmdir()
        finally:
            hold.close()


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
            descriptor = locked(partial)
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
            descriptor = locked(left)
            _remove(left)
            os.close(descriptor)


def remove(path: Path) -> None:
    """Removes a file, where it is there, and what is left of its partial ones."""
    path.unlink(missing_ok=True)
    sweep(path)


def sibling(path: Path, suffix: str) -> Path:
    """A new hidden name beside `path`."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.{suffix}")


def locked(path: Path, flags: int | None = None, how: int = fcntl.LOCK_EX, *, wait: bool = False) -> int:
    """A descriptor that holds a file or folder until it is closed. how: alone, or LOCK_SH.

    Raises BlockingIOError where another process holds it, unless that is to be waited for, FileNotFoundError where it is gone.
    """
    descriptor = os.open(path, (os.O_RDONLY if path.is_dir() else os.O_RDWR) if flags is None else flags, 0o666)
    try:
        fcntl.flock(descriptor, how if wait else how | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), os.stat(path)):
            raise FileNotFoundError(f"{path} is another one by now")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _held_by_another(folder: Path) -> CheckpointError:
    return CheckpointError(f"{folder} is held by another merge; wait for its end or choose another folder")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
