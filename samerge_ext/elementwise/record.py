"""How far a merge from file to file is, kept beside what it writes, so that it can go on after an interruption."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from samerge_ext.checkpoints.locks import Hold, held, remove
from samerge_ext.checkpoints.reading import CheckpointError, cut
from samerge_ext.checkpoints.sealed import read_sealed_object, write_sealed
from samerge_ext.checkpoints.shards import Shard, checksum_on_disk

RECORD = "merge.json"  # in OUT.state: what is merged
NOTES = "notes"  # beside it: how far it is


class Record:
    """The progress of a merge in OUT.state: a sealed file for everything that is known, so that several processes can tell each
    other.

    folder: what becomes OUT. over: whether it did, which who renames it says.

    merge.json holds the "identity" of the merge, and at its end "whole", by which the folder is known when it has become OUT.
    Notes are a file each: of what all shards need, and of every finished shard, by its file's name, the "checksum" and the
    "trims", what is left to trim after it.
    """

    def __init__(self, state: Path, identity: dict, *, together: bool = False):
        self._state, self._identity, self._together = state, identity, together
        self._path, self._notes, self.folder = state / RECORD, state / NOTES, state / "merged"
        self.over = False

    def open(self, hold: Hold) -> None:
        """Begins the merge or goes on with it. What is there of another one is discarded.

        Raises CheckpointError where that is not for one of several processes to do: others are at it, or have finished shards.
        """
        self._hold = hold
        found = read_sealed_object(self._path) if self._path.exists() else None
        if found is None or found.get("identity") != self._identity:
            if self._together and found is not None:
                self._take_over(found.get("identity"))
            shutil.rmtree(self._notes, ignore_errors=True)
            shutil.rmtree(self.folder, ignore_errors=True)
            self._write(self._path, {"identity": self._identity})
        self.folder.mkdir(exist_ok=True)
        self._notes.mkdir(exist_ok=True)

    def is_over(self, target: Path) -> bool:
        """Whether all that is left to do is to forget the merge."""
        whole = read_sealed_object(self._path).get("whole")
        self.over = whole is not None and target.exists() and _told_by(target) == whole
        return self.over

    def left(self, shards: Sequence[Shard]) -> list[Shard]:
        """Those of the shards that are not on the disk as they were written."""
        left = []
        for shard in shards:
            note = self.note_of(shard.file)
            if note is None or checksum_on_disk(self.folder, shard) != note.get("checksum"):
                left.append(shard)
        return left

    def note_of(self, name: str) -> dict[str, Any] | None:
        """What was noted under a name, by any process; None where nothing was."""
        path = self._note(name)
        return read_sealed_object(path) if path.exists() else None

    def note(self, name: str, **content: Any) -> dict[str, Any]:
        self._write(self._note(name), content)
        return content

    def note_whole(self) -> None:
        """Notes that the folder is whole and about to become OUT."""
        self._write(self._path, {"identity": self._identity, "whole": _told_by(self.folder)})

    def is_last(self) -> bool:
        """Whether no other process is at this merge, and until this one is through none can be. Otherwise its part is done."""
        return self._hold.take()

    def forget(self) -> None:
        """Removes what is known of a merge that is over or has no shard yet, unless other processes are at it. Where several
        were, it stays known that the merge is over, for those who come late."""
        if self.is_last() and (self.over or not self._has_shards()):
            shutil.rmtree(self.folder, ignore_errors=True)
            shutil.rmtree(self._notes, ignore_errors=True)
            if not (self.over and self._together):
                remove(self._path)

    def _has_shards(self) -> bool:
        return any(self._notes.glob("*.safetensors.json"))

    def _take_over(self, other: Any) -> None:
        """The folder of another merge, of which nothing is there."""
        if not self._has_shards() and self._hold.take():
            self._hold.share()
        else:
            differing = [key for key, value in self._identity.items() if not isinstance(other, dict) or other.get(key) != value]
            raise CheckpointError(
                f"{self._state} is of another merge, with other {cut(', '.join(differing)) or 'keys'}: give all ranks the same "
                f"recipe, models and kind of device; where that merge is given up, delete {self._state}"
            )

    def _note(self, name: str) -> Path:
        return self._notes / f"{name}.json"

    def _write(self, path: Path, content: dict) -> None:
        write_sealed(path, json.dumps(content).encode())


@contextmanager
def held_record(state: Path, identity: dict, *, together: bool = False) -> Iterator[Record]:
    """The record in OUT.state, held by one process, or by those that merge ``together``; forgotten when the merge is over, or
    failed before any shard."""
    record = Record(state, identity, together=together)
    with held(state, together=together, entering=record.open):
        try:
            yield record
        finally:
            record.forget()


def _told_by(folder: Path) -> list[int]:
    """What a folder keeps when it is renamed: its number (inode), which others may have after it, and when its weights were
    written."""
    return [folder.stat().st_ino, max((path.stat().st_mtime_ns for path in folder.glob("*.safetensors")), default=0)]
