"""Checksums: of files that a run goes on from, and of parts of larger ones."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

from samerge_ext.checkpoints.reading import CheckpointError, naming, object_in
from samerge_ext.checkpoints.saving import atomic_write

_CHUNK = 4 << 20  # bytes that are read at once


def write_sealed(path: Path, content: bytes) -> None:
    """Writes a file, whole or not at all: the content's CRC-32 on a line, then the content."""
    with atomic_write(path) as file:
        file.write(b"%08x\n" % zlib.crc32(content) + content)


def read_sealed(path: Path) -> bytes:
    """The content of such a file. Raises CheckpointError where it is not what was written."""
    with naming(path):
        checksum, _, content = path.read_bytes().partition(b"\n")
    if checksum != b"%08x" % zlib.crc32(content):
        raise CheckpointError(
            f"{path} is empty, cut off or damaged: its checksum does not fit; restore it, or delete it to begin again without it"
        )
    return content


def read_sealed_object(path: Path) -> dict[str, Any]:
    """The object in JSON that is such a file's content."""
    return object_in(path, read_sealed(path))


def checksum_of(file: int, begin: int, nbytes: int) -> int:
    """The CRC-32 of a part of an open file; of what there is where that is cut off."""
    buffer = memoryview(bytearray(min(_CHUNK, nbytes)))
    checksum, done = 0, 0
    while done < nbytes:
        count = os.preadv(file, [buffer[: nbytes - done]], begin + done)
        if count == 0:
            break
        checksum = zlib.crc32(buffer[:count], checksum)
        done += count
    return checksum
