"""Files that a run goes on from: whole, or an error with the mend."""

import os
import zlib

import pytest

from samerge_ext.checkpoints.reading import CheckpointError
from samerge_ext.checkpoints.sealed import checksum_of, read_sealed, write_sealed


def test_what_was_written_or_an_error(tmp_path):
    path, content = tmp_path / "state", bytes(range(40))
    write_sealed(path, content)
    assert read_sealed(path) == content
    whole = path.read_bytes()
    flipped = [whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :] for i in range(len(whole))]
    for damaged in (b"", whole + b" ", *(whole[:length] for length in range(len(whole))), *flipped):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="state is empty, cut off or damaged: .* restore it, or delete it"):
            read_sealed(path)


def test_checksums_of_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("samerge_ext.checkpoints.sealed._CHUNK", 7)
    content = os.urandom(100)
    (tmp_path / "file").write_bytes(content)
    with open(tmp_path / "file", "rb") as file:
        for begin, nbytes in [(0, 100), (3, 50), (99, 1), (20, 0)]:
            assert checksum_of(file.fileno(), begin, nbytes) == zlib.crc32(content[begin : begin + nbytes])
        assert checksum_of(file.fileno(), 90, 20) == zlib.crc32(content[90:]), "of what is there"
