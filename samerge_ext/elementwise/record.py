"""How far a merge from file to file is, kept beside what it writes, so that it can go on after an interruption."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from samerge_ext.checkpoints.reading import CheckpointError, read_json
from samerge_ext.checkpoints.saving import atomic_write

RECORD = "merge.json"  # in OUT.state: what is merged, and how far it is


class Record:
    """The progress of a merge in OUT.state.

    content: "identity"; "factors" and "trims" once they are found; for each finished shard what is left to trim after it;
    "whole". folder: what becomes OUT.
    """

    def __init__(self, state: Path, identity: dict):
        self._path, self.folder = state / RECORD, state / "merged"
        self.content = read_json(self._path) if self._path.exists() else {}
        if self.content and not isinstance(self.content.get("shards"), list):
            raise CheckpointError(f"{self._path} is no record of a merge; remove {state} and merge again")
        if self.content.get("identity") != identity:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._path.unlink(missing_ok=True)
            self.folder.mkdir()
            self.content = {}
            self.note(identity=identity, shards=[])

    def is_whole(self) -> bool:
        return self.content.get("whole", False)

    def note(self, **entries: Any) -> None:
        self.content.update(entries)
        with atomic_write(self._path) as file:
            file.write(json.dumps(self.content).encode())


@contextmanager
def held_record(state: Path, identity: dict) -> Iterator[Record]:
    """The record in OUT.state, held by one process at a time; removed when the merge is over, or failed before any shard."""
    state.mkdir(parents=True, exist_ok=True)
    with open(state / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"{state} is held by another merge; wait for its end or choose another folder") from error
        record = Record(state, identity)
        keep = True
        try:
            yield record
            keep = False
        finally:
            if not (keep and record.content["shards"]):
                shutil.rmtree(record.folder, ignore_errors=True)
                for path in (state / RECORD, state / "lock", *state.glob(f".{RECORD}.*.tmp")):
                    path.unlink(missing_ok=True)
                if not any(state.iterdir()):  # a learned merge may have left its own state there
                    state.rmdir()
