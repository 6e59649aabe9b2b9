"""How far a merge from file to file is, kept beside what it writes, so that it can go on after an interruption."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from samerge_ext.checkpoints.locks import held, remove
from samerge_ext.checkpoints.reading import CheckpointError
from samerge_ext.checkpoints.sealed import read_sealed_object, write_sealed
from samerge_ext.checkpoints.shards import Shard, checksum_on_disk

RECORD = "merge.json"  # in OUT.state: what is merged, and how far it is


class Record:
    """The progress of a merge in OUT.state.

    content: "identity"; "factors" and "trims" once they are found; for each finished shard its "checksum", and what is left to
    trim after it; "whole", the number (inode) that the folder keeps when it becomes OUT. folder: what becomes OUT.
    """

    def __init__(self, state: Path, identity: dict):
        self._path, self.folder = state / RECORD, state / "merged"
        self.content = read_sealed_object(self._path) if self._path.exists() else {}
        if self.content and not isinstance(self.content.get("shards"), list):
            raise CheckpointError(f"{self._path} is no record of a merge; remove {state} and merge again")
        if self.content.get("identity") != identity:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._path.unlink(missing_ok=True)
            self.content = {}
            self.note(identity=identity, shards=[])

    def is_over(self, target: Path) -> bool:
        """Whether all that an interruption left to do is to forget the merge."""
        return not self.folder.exists() and target.exists() and target.stat().st_ino == self.content.get("whole")

    def left(self, shards: list[Shard]) -> list[Shard]:
        """The shards from the first one on that is not on the disk as it was written."""
        self.folder.mkdir(exist_ok=True)
        noted = self.content["shards"]
        whole = 0
        for shard, finished in zip(shards, noted, strict=False):
            if checksum_on_disk(self.folder, shard) != finished["checksum"]:
                break
            whole += 1
        if whole < len(noted):
            self.note(shards=noted[:whole])
        return shards[whole:]

    def note(self, **entries: Any) -> None:
        self.content.update(entries)
        write_sealed(self._path, json.dumps(self.content).encode())


@contextmanager
def held_record(state: Path, identity: dict) -> Iterator[Record]:
    """The record in OUT.state, held by one process at a time; removed when the merge is over, or failed before any shard."""
    with held(state):
        record = Record(state, identity)
        keep = True
        try:
            yield record
            keep = False
        finally:
            if not (keep and record.content["shards"]):
                shutil.rmtree(record.folder, ignore_errors=True)
                remove(state / RECORD)
