"""A checkpoint of torch.distributed.checkpoint (DCP), as FSDP and others write them: its model's tensors, whatever the number of
processes that wrote their parts."""

from __future__ import annotations

import io
import os
import pickle
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samerge_ext.checkpoints.dcp_metadata import Part, Stored, read_metadata
from samerge_ext.checkpoints.reading import MAX_JSON_BYTES, CheckpointError, cut


class DcpCheckpoint:
    """The model in a DCP checkpoint, opened by its ``.metadata``; `dcp_metadata.read_metadata` says what counts as the model. A
    part of a tensor is what torch.save made of it, in a .distcp file, of which no more numbers are read than are asked for; but
    all of a part that is transposed.

    names: in the order of the state dict. Raises CheckpointError for a damaged .metadata or one with code in it, and for a file
    that is missing or cut off; when a part is first read, for one that holds another tensor than .metadata says, or code.
    """

    def __init__(self, path: Path):
        self.path, self.tied = path, dict[str, str]()
        self._tensors = read_metadata(path)
        self.names = tuple(self._tensors)
        parts = {part.file: part for stored in self._tensors.values() for part in stored.parts}
        self.paths = (path, *(path.parent / file for file in parts))
        sizes = {file: self._size(path.parent / file) for file in parts}
        for name, stored in self._tensors.items():
            for part in stored.parts:
                if (end := part.begin + part.nbytes) > sizes[part.file]:
                    raise CheckpointError(
                        f"{path.parent / part.file} is cut off: '{name}' should end at byte {end} and it has {sizes[part.file]}; "
                        "copy it again"
                    )
        self._numbers: dict[Part, _Numbers] = {}

    def shape(self, name: str) -> torch.Size:
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, name: str) -> Tensor:
        """The tensor in new CPU memory, in its stored type and shape."""
        stored = self._tensors[name]
        out = torch.empty(stored.shape, dtype=stored.dtype, device="cpu")
        self.read_into(name, 0, out.view(-1))
        return out

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Numbers ``start`` … of a tensor, flattened, into ``out`` [n] of its type, contiguous and on the CPU."""
        stored = self._tensors[name]
        rows, *inner = stored.shape or (1,)
        width = torch.Size(inner).numel()
        if not out.numel():
            return
        first, last = start // width, -(-(start + out.numel()) // width)
        whole = out.numel() == (last - first) * width
        window = (out if whole else torch.empty((last - first) * width, dtype=out.dtype, device="cpu")).view(last - first, *inner)
        for part in stored.parts:
            (offset, *offsets), (size, *sizes) = part.offsets or (0,), part.sizes or (1,)
            begin, end = max(first, offset), min(last, offset + size)
            if begin < end:
                place = (slice(begin - first, end - first), *(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True)))
                self._read_rows(name, stored, part, begin - offset, window[place])
        if not whole:
            out.copy_(window.view(-1)[start - first * width : start - first * width + out.numel()])

    def _read_rows(self, name: str, stored: Stored, part: Part, first: int, out: Tensor) -> None:
        """Rows ``first`` … of a part into ``out`` [rows, …]."""
        path = self.path.parent / part.file
        with self._naming(name, path), open(path, "rb", buffering=0) as file:
            numbers = self._numbers.get(part)
            if numbers is None:
                numbers = self._numbers[part] = _numbers_of(file, part, stored.dtype)
            row = numbers.row_bytes
            if row is None:
                out.copy_(_whole(file, part)[first : first + len(out)])
                return
            into = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
            _fill(file, numbers.begin + first * row, into)
            if into is not out:
                out.copy_(into)

    def close(self) -> None:
        self._numbers = {}

    def _size(self, path: Path) -> int:
        try:
            return os.stat(path).st_size
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing; {self.path} places tensors in it: copy it too") from error

    @contextmanager
    def _naming(self, name: str, path: Path) -> Iterator[None]:
        try:
            yield
        except (CheckpointError, MemoryError):
            raise
        except pickle.UnpicklingError:
            raise CheckpointError(f"{path}: '{name}' is stored with code, which is never run; save the tensor alone") from None
        except OSError as error:
            raise CheckpointError(f"{path}: '{name}' cannot be read ({error}); restore the file") from error
        except Exception as error:  # torch and zipfile raise many types for what is damaged
            raise CheckpointError(
                f"{path}: '{name}' is damaged, or not of torch.save ({cut(str(error) or repr(error), 200)}); save it again"
            ) from error


@dataclass(frozen=True)
class _Numbers:
    """Where a part's numbers begin in its file, and the bytes of a row of them; None where rows lie in another order."""

    begin: int
    row_bytes: int | None


def _numbers_of(file: Any, part: Part, dtype: torch.dtype) -> _Numbers:
    """From the archive of torch.save, of which only the pickle and the directory are read."""
    with zipfile.ZipFile(_slice(file, part)) as archive:
        entries = archive.infolist()
        pickles = [entry for entry in entries if entry.filename.endswith(".pkl")]
        storages = [entry for entry in entries if "/data/" in entry.filename]
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or len(storages) != 1:
            raise ValueError("its archive is compressed, or is not of one tensor")
        if any(entry.file_size > MAX_JSON_BYTES for entry in pickles):
            raise ValueError(f"its pickle has more than {MAX_JSON_BYTES} bytes")
        orders = [archive.read(entry) for entry in entries if entry.filename.endswith("/byteorder") and entry.file_size < 16]
        (storage,) = storages
        header = os.pread(file.fileno(), 30, part.begin + storage.header_offset)
    if orders and orders != [sys.byteorder.encode()]:
        raise ValueError("its bytes are in another order than this machine's")
    tensor = torch.load(_slice(file, part), map_location="meta", weights_only=True)
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        raise ValueError("it is no dense tensor")
    if (tensor.dtype, tuple(tensor.shape)) != (dtype, part.sizes):
        raise ValueError(f"it is {tensor.dtype} {list(tensor.shape)} and .metadata says {dtype} {list(part.sizes)}")
    # Of a local header, whose name and extra field are as long as its bytes 26 … 29 say.
    data = storage.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if data + storage.file_size > part.nbytes or tensor.untyped_storage().nbytes() != storage.file_size:
        raise ValueError("it is cut off")
    begin = part.begin + data + int(tensor.storage_offset()) * tensor.itemsize
    rows = part.sizes[0] if part.sizes else 1
    as_they_are = tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())
    return _Numbers(begin, tensor.nbytes // rows if as_they_are else None)


def _whole(file: Any, part: Part) -> Tensor:
    return torch.load(_slice(file, part), map_location="cpu", weights_only=True).reshape(part.sizes or (1,))


def _fill(file: Any, begin: int, out: Tensor) -> None:
    view, done = out.view(-1).view(torch.uint8).numpy().data, 0
    while done < len(view):  # the kernel reads at most 2 GiB at once
        count = os.preadv(file.fileno(), [view[done:]], begin + done)
        if count == 0:
            raise ValueError("it is cut off")
        done += count


def _slice(file: Any, part: Part) -> io.BufferedReader:
    return io.BufferedReader(_Slice(file, part))


class _Slice(io.RawIOBase):
    """A part's bytes in an open file, as a file of its own."""

    def __init__(self, file: Any, part: Part):
        self._file, self._begin, self._nbytes, self._at = file, part.begin, part.nbytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._nbytes}[whence] + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._nbytes - self._at))
        found = os.preadv(self._file.fileno(), [memoryview(buffer)[:count]], self._begin + self._at)
        self._at += found
        return found
