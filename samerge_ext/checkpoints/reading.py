"""Files of text and JSON, read whole within bounds, and what is said of a file that cannot be read or written."""

from __future__ import annotations

import errno
import json
import math
import os
import reprlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 100_000_000  # the bound of the safetensors library for a header; the largest tokenizers have a third of it
MAX_TEXT_BYTES = 10_000_000
MAX_DEPTH = 64  # of objects and lists in each other
MENDS = {
    errno.EACCES: "change its permissions, or use another place",
    errno.EDQUOT: "make room or choose another place",
    errno.EFBIG: "files are not allowed to be as large here; raise the limit (ulimit -f) or choose another place",
    errno.EIO: "the disk or its connection fails; restore the file from a copy",
    errno.EISDIR: "a file is expected in its place",
    errno.ELOOP: "its links lead in a circle; pass what they stand for",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n)",
    errno.ENAMETOOLONG: "give it a shorter name",
    errno.ENOENT: "check the path",
    errno.ENOSPC: "make room or choose another place",
    errno.ENOTDIR: "what should be a folder is a file; check the path",
    errno.EPERM: "change its permissions, or use another place",
    errno.EROFS: "nothing can be written there; choose another place",
    errno.ESTALE: "the connection to its disk was lost; mount it again",
}


class CheckpointError(ValueError):
    """A model folder or a file of it cannot be read or written. The message names it, the tensor and the fix."""


def explained(error: OSError) -> str:
    """An error of the operating system in words: the file, what is wrong, and what to do where that is known."""
    if error.errno is None or not error.strerror:
        return str(error)
    place = error.filename if error.filename2 is None else f"{error.filename} -> {error.filename2}"
    named = f"{os.fsdecode(place) if isinstance(place, bytes) else place}: " if place is not None else ""
    mend = f"; {MENDS[error.errno]}" if error.errno in MENDS else ""
    return f"{named}{error.strerror}{mend}"


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """An OSError from inside that names no file, as those of open files do not, names ``path``."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def shown(value: object) -> str:
    """A value for a message, as Python writes it, cut where it is long."""
    return _SHORT.repr(value)


def cut(text: str, length: int = 80) -> str:
    """A text for a message, without its end where it is long."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def read_bytes(path: Path, limit: int = MAX_TEXT_BYTES) -> bytes:
    """A file whole. Raises CheckpointError for one of more than ``limit`` bytes, OSError for one that cannot be read."""
    with naming(path), open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise CheckpointError(f"{path} has more than {limit} bytes and is not read: no file of its kind has; restore it")
    return data


def read_text(path: Path) -> str:
    """A text in UTF-8. Raises CheckpointError where it is none, and as `read_bytes`."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from error


def parse_json(data: bytes, hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value of a JSON text in UTF-8. hook: of the json module. Raises ValueError for all that is none."""
    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=hook, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{cut(text, 20)} is larger than any number")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError where there is none, and as `read_bytes`."""
    return object_in(path, read_bytes(path, MAX_JSON_BYTES))


def object_in(path: Path, data: bytes) -> dict[str, Any]:
    """The object that a file's bytes, or some of them, are in JSON. Raises CheckpointError, which names the file, where none."""
    try:
        content = parse_json(data)
        _check_depth(content)
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download it or save it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__} in place of an object; download it again")
    return content


def _check_depth(content: object) -> None:
    """What goes through a configuration, and writes it again, calls itself for what is inside."""
    level = [content]
    for _ in range(MAX_DEPTH):
        held = (value.values() if isinstance(value, dict) else value for value in level if isinstance(value, dict | list))
        level = [value for values in held for value in values]
        if not level:
            return
    raise ValueError(f"it is nested more than {MAX_DEPTH} deep")


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxlist, self.maxtuple, self.maxset = 2, 4, 4, 4, 4
        self.maxstring = self.maxother = 80

    def repr_int(self, x: int, level: int) -> str:  # Python itself writes no number of thousands of digits
        return f"a number of {x.bit_length()} bits" if x.bit_length() > 256 else repr(x)


_SHORT = _Short()
