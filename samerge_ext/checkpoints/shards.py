"""Safetensors shards whose layout is known before their contents, so that these are written as they come."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from samerge_ext.checkpoints.files import SAFETENSORS_CODES
from samerge_ext.checkpoints.locks import locked
from samerge_ext.checkpoints.reading import CheckpointError
from samerge_ext.checkpoints.sealed import checksum_of

SYNCED_BYTES = 64 << 20  # written before the disk is waited for, so that the end of a shard does not wait for all of it


@dataclass(frozen=True)
class Shard:
    """A file and where its tensors lie in it. begins: name -> first byte, from the start of the file."""

    file: str
    header: bytes
    begins: dict[str, int]
    total_bytes: int


def plan_shards(tensors: Iterable[tuple[str, torch.dtype, torch.Size]], limit: int) -> list[Shard]:
    """Shards of at most ``limit`` bytes of tensors, in their order; a larger tensor has one of its own."""
    groups: list[list[tuple[str, torch.dtype, torch.Size]]] = [[]]
    filled = 0
    for name, dtype, shape in tensors:
        nbytes = shape.numel() * dtype.itemsize
        if groups[-1] and filled + nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append((name, dtype, shape))
        filled += nbytes
    if len(groups) == 1:
        return [_shard("model.safetensors", groups[0])]
    return [_shard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups, 1)]


def _shard(file: str, tensors: list[tuple[str, torch.dtype, torch.Size]]) -> Shard:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins, end = {}, 0
    for name, dtype, shape in sorted(tensors, key=lambda tensor: -tensor[1].itemsize):  # so that all of them are aligned
        begins[name] = end
        end += shape.numel() * dtype.itemsize
        entries[name] = {"dtype": SAFETENSORS_CODES[dtype], "shape": list(shape), "data_offsets": [begins[name], end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return Shard(file, header, {name: len(header) + begin for name, begin in begins.items()}, len(header) + end)


def checksum_on_disk(folder: Path, shard: Shard) -> str | None:
    """A checksum of the shard's header and of all its tensors; None where there is no such file."""
    try:
        with open(folder / shard.file, "rb") as file:
            if os.fstat(file.fileno()).st_size != shard.total_bytes or file.read(len(shard.header)) != shard.header:
                return None
            begins = [*shard.begins.values(), shard.total_bytes]
            return _of_all(shard, [checksum_of(file.fileno(), begin, end - begin) for begin, end in pairwise(begins)])
    except FileNotFoundError:
        return None


def _of_all(shard: Shard, checksums: Iterable[int]) -> str:
    return f"{zlib.crc32(b''.join(checksum.to_bytes(4, 'little') for checksum in checksums), zlib.crc32(shard.header)):08x}"


def index_of(shards: list[Shard]) -> str:
    """The content of model.safetensors.index.json."""
    total = sum(shard.total_bytes - len(shard.header) for shard in shards)
    weight_map = {name: shard.file for shard in shards for name in shard.begins}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)


class ShardWriter:
    """Writes one shard, from any number of threads, each its own tensors; a context manager.

    The file has its name only once it is whole and on the disk: at the end of a block without exception. Raises CheckpointError
    where another process is writing the same shard.
    """

    def __init__(self, folder: Path, shard: Shard):
        self._checksums = dict.fromkeys(shard.begins, 0)
        self._shard, self._path = shard, folder / shard.file
        self._part = folder / f"{shard.file}.part"
        self._unsynced = 0

    def __enter__(self) -> ShardWriter:
        try:
            self._file = locked(self._part, os.O_WRONLY | os.O_CREAT)
        except (BlockingIOError, FileNotFoundError) as error:  # it is being written, or just got its name
            raise CheckpointError(f"{self._part} is written by another process; give every process a rank of its own") from error
        os.ftruncate(self._file, 0)
        self._put(memoryview(self._shard.header), 0)
        return self

    def write(self, name: str, start: int, numbers: Tensor) -> None:
        """Numbers ``start`` … of a tensor, [n], contiguous; of each tensor in their order."""
        view = numbers.view(torch.uint8).numpy().data
        self._checksums[name] = zlib.crc32(view, self._checksums[name])
        self._put(view, self._shard.begins[name] + start * numbers.dtype.itemsize)

    def checksum(self) -> str:
        """As `checksum_on_disk` of what was written."""
        return _of_all(self._shard, self._checksums.values())

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            if kind is None:
                os.ftruncate(self._file, self._shard.total_bytes)
                os.fsync(self._file)
                os.rename(self._part, self._path)
        finally:
            os.close(self._file)
            self._part.unlink(missing_ok=True)

    def _put(self, view: memoryview, begin: int) -> None:
        done = 0
        while done < len(view):
            done += os.pwrite(self._file, view[done:], begin + done)
        self._unsynced += done
        if self._unsynced >= SYNCED_BYTES:
            self._unsynced = 0
            os.fdatasync(self._file)
