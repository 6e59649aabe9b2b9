"""Names of tasks: what may be one, since files are called by them, and the names that models' folders give."""

from __future__ import annotations

import os
import zlib
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

MAX_BYTES = 200  # a file's name has 255, and a task's gets a suffix


def check_task_name(task: object) -> None:
    """Raises ValueError unless heads/TASK.safetensors would be a plain file of that name on any file system."""
    if not isinstance(task, str) or not task:
        raise ValueError(f"{task!r} is not a task name; a task name is a non-empty string")
    shown = repr(task if len(task) <= 60 else f"{task[:57]}…")
    if task.startswith("."):
        raise ValueError(f"{shown} is not a task name: it begins with a dot; a task's files are called by its name")
    bad = sorted({character for character in task if character in "/\\" or not character.isprintable()})
    if bad:
        raise ValueError(f"{shown} is not a task name: it holds {bad[0]!r}; a task's files are called by its name")
    if len(task.encode()) > MAX_BYTES:
        raise ValueError(f"{shown} is not a task name: it has {len(task.encode())} bytes, and a name at most {MAX_BYTES}")


def names_of_folders(paths: Iterable[str | Path]) -> list[str]:
    """A task name for each model folder or weight file, all distinct: its own, after its parents' where others have the same.

    run1/checkpoint-500 and run2/checkpoint-500 are "run1-checkpoint-500" and "run2-checkpoint-500"; equal files are called by
    their folders. "." and ".." are called as what they are. A model that is listed again gets a number.
    """
    places = [_parts(Path(path)) for path in paths]
    stems = [parts[-1] for parts, is_file in places if is_file]
    whole = [parts[:-1] if is_file and stems.count(parts[-1]) > 1 else parts for parts, is_file in places]
    lengths = [1] * len(whole)
    while True:
        names = [_name(parts[-length:]) for parts, length in zip(whole, lengths, strict=True)]
        places_of: dict[str, set[tuple[str, ...]]] = {}
        for name, parts in zip(names, whole, strict=True):
            places_of.setdefault(name, set()).add(parts)
        alike = [i for i, name in enumerate(names) if len(places_of[name]) > 1 and lengths[i] < len(whole[i])]
        if not alike:
            break
        for i in alike:
            lengths[i] += 1
    distinct: list[str] = []
    for name in _short(names, whole):
        distinct.append(unused(name, distinct))
    return distinct


def unused(name: str, taken: Collection[str]) -> str:
    """The name, with a number after it where it is taken."""
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}-{number}"
    return found


def _parts(path: Path) -> tuple[tuple[str, ...], bool]:
    """The components of a path's place, a file's without suffix, and whether it is a file. A link keeps the name it was given."""
    named = Path(os.path.realpath(path) if path.name in ("", ".", "..") else os.path.abspath(path))
    is_file = path.is_file()
    parts = (*named.parent.parts[1:], named.stem if is_file else named.name)
    return tuple(part for part in parts if part) or ("model",), is_file


def _name(parts: Sequence[str]) -> str:
    """A valid name from the components of a path."""
    joined = "-".join(parts).lstrip(".").replace("\\", "-")
    return "".join(character if character.isprintable() else "_" for character in joined) or "model"


def _short(names: list[str], whole: list[tuple[str, ...]]) -> list[str]:
    """The names; of one that is too long its beginning, and a checksum of the path."""
    return [
        name
        if len(name.encode()) <= MAX_BYTES
        else f"{name.encode()[:100].decode(errors='ignore')}-{zlib.crc32('/'.join(parts).encode(errors='replace')):08x}"
        for name, parts in zip(names, whole, strict=True)
    ]
