"""A safetensors file: its tensors' names, types and shapes, one tensor at a time; and what holds of all kinds of weight files."""

from __future__ import annotations

import math
import os
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from torch import Tensor

from samerge_ext.checkpoints.reading import MAX_JSON_BYTES, CheckpointError, cut, naming, parse_json, shown

# The types of the safetensors format that torch has; the two newest are missing from older versions of torch.
SAFETENSORS_DTYPES = {
    code: getattr(torch, name)
    for code, name in {
        "F64": "float64",
        "F32": "float32",
        "F16": "float16",
        "BF16": "bfloat16",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2",
        "F8_E4M3FNUZ": "float8_e4m3fnuz",
        "F8_E5M2FNUZ": "float8_e5m2fnuz",
        "F8_E8M0": "float8_e8m0fnu",
        "F4": "float4_e2m1fn_x2",
        "I64": "int64",
        "I32": "int32",
        "I16": "int16",
        "I8": "int8",
        "U64": "uint64",
        "U32": "uint32",
        "U16": "uint16",
        "U8": "uint8",
        "BOOL": "bool",
        "C64": "complex64",
    }.items()
    if hasattr(torch, name)
}
SAFETENSORS_CODES = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}

MAX_NAME = 1000  # characters of a tensor's name, which messages repeat
MAX_DIMENSIONS = 64  # what torch can compute with


class Entry(NamedTuple):
    """A tensor of a safetensors file. begin: its first byte, counted from the start of the file."""

    dtype: torch.dtype
    shape: torch.Size
    begin: int
    nbytes: int


class SafetensorsFile:
    """A safetensors file: 8 bytes of little-endian header length, a JSON header, the tensors without gaps.

    The header is checked whole when the file is opened. Reads are `preadv` into a new buffer: pages of a mapped file
    would stay in the process's resident memory for as long as it is open.

    names: in the order of their bytes in the file. metadata: of the header.
    Raises CheckpointError where the file is cut off or its header does not describe its bytes.
    """

    def __init__(self, path: Path):
        self.path, self.paths = path, (path,)
        self.tied: dict[str, str] = {}
        self.metadata: dict[str, str] = {}
        refuse_pointer(path)
        self._file = open(path, "rb", buffering=0)
        try:
            with naming(path):
                self._entries = self._read_header()
        except BaseException:
            self._file.close()
            raise
        self.names = tuple(self._entries)

    def shape(self, name: str) -> torch.Size:
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entries[name].dtype

    def read(self, name: str) -> Tensor:
        """The tensor in new CPU memory, in its stored type and shape."""
        entry = self._entries[name]
        buffer = torch.empty(entry.nbytes, dtype=torch.uint8, device="cpu")  # [nbytes]
        self._fill(buffer.numpy().data, name, entry.begin)
        return buffer.view(entry.dtype).reshape(entry.shape)

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Numbers ``start`` … of a tensor, flattened, into ``out`` [n] of its type, contiguous and on the CPU."""
        entry = self._entries[name]
        self._fill(out.view(torch.uint8).numpy().data, name, entry.begin + start * entry.dtype.itemsize)

    def _fill(self, view: memoryview, name: str, begin: int) -> None:
        done = 0
        while done < len(view):  # the kernel reads at most 2 GiB at once
            try:
                count = os.preadv(self._file.fileno(), [view[done:]], begin + done)
            except OSError as error:
                raise CheckpointError(f"{self.path}: '{name}' cannot be read ({error}); restore the file") from error
            if count == 0:
                raise CheckpointError(f"{self.path} was cut off while '{name}' was being read; restore the file")
            done += count

    def close(self) -> None:
        self._file.close()

    def _read_header(self) -> dict[str, Entry]:
        file_bytes = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(os.pread(self._file.fileno(), 8, 0), "little")
        data = 8 + length
        if file_bytes < 8 or data > file_bytes:
            raise self._damaged(f"its header should end at byte {data} and the file has {file_bytes}")
        if length > MAX_JSON_BYTES:
            raise self._damaged(f"its header claims {length} bytes, more than the format's {MAX_JSON_BYTES}")
        try:
            header = parse_json(os.pread(self._file.fileno(), length, 8), _unique)
        except ValueError as error:
            raise self._damaged(f"its header is not valid JSON ({error})") from error
        if not isinstance(header, dict):
            raise self._damaged("its header is not a JSON object")
        metadata = header.pop("__metadata__", None) or {}
        if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
            raise self._damaged("its header's __metadata__ is not made of texts")
        self.metadata = metadata
        entries = {name: self._entry(name, spec, data) for name, spec in header.items()}
        ordered = sorted(entries.items(), key=lambda item: (item[1].begin, item[1].nbytes))
        self._check_extents(ordered, data, file_bytes)
        return dict(ordered)

    def _entry(self, name: str, spec: object, data: int) -> Entry:
        if not is_name(name):
            raise self._damaged(f"{shown(name)} is no tensor's name")
        match spec:
            case {"dtype": str(code), "shape": [*shape], "data_offsets": [begin, end]} if len(shape) <= MAX_DIMENSIONS and all(
                type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end)
            ):
                pass
            case _:
                raise self._damaged(f"the header's entry for '{name}' lacks a valid dtype, shape or data_offsets")
        if code not in SAFETENSORS_DTYPES:
            raise CheckpointError(
                f"{self.path}: '{name}' has type {cut(code)}, which torch {torch.__version__} lacks; "
                f"convert it to one of {', '.join(SAFETENSORS_DTYPES)}"
            )
        dtype = SAFETENSORS_DTYPES[code]
        if code == "F4" and shape:  # the header counts numbers, torch counts pairs of them
            shape[-1], odd = divmod(shape[-1], 2)
            if odd:
                raise self._damaged(f"'{name}' has an odd number of F4 columns")
        nbytes = math.prod(shape) * dtype.itemsize
        if math.prod(n for n in shape if n) >= 2**60:
            raise self._damaged(f"'{name}' has a shape of more numbers than there are, {shape}")
        if end - begin != nbytes:
            span = end - begin
            raise self._damaged(f"'{name}', {code} {shape}, takes {nbytes} bytes and its data_offsets span {span}")
        return Entry(dtype, torch.Size(shape), data + begin, nbytes)

    def _check_extents(self, ordered: list[tuple[str, Entry]], data: int, file_bytes: int) -> None:
        """Tensors fill the file from its header to its end: first within the file, then without gap or overlap."""
        for name, entry in ordered:
            end = entry.begin + entry.nbytes
            if end > file_bytes:
                raise self._damaged(f"'{name}' should end at byte {end} and the file has {file_bytes}")
        position = data
        for name, entry in ordered:
            if entry.begin != position:
                fault = "after a gap" if entry.begin > position else "inside the tensor before it"
                raise self._damaged(f"'{name}' begins at byte {entry.begin}, {fault}: {position} was expected")
            position += entry.nbytes
        if position != file_bytes:
            raise self._damaged(f"{file_bytes - position} bytes at its end belong to no tensor")

    def _damaged(self, fault: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: {fault}. The file is truncated, damaged or not safetensors; download it or save it again"
        )


def check_relative(name: str, what: str) -> None:
    """Refuses a file name that leads out of the folder it belongs to."""
    parts = PurePosixPath(name)
    if not is_name(name) or not parts.parts or parts.is_absolute() or ".." in parts.parts:
        raise CheckpointError(f"{what} {shown(name)} is outside of its folder; use a relative path without '..'")


def refuse_pointer(path: Path) -> None:
    with open(path, "rb") as file:
        head = file.read(24)
    if head == b"version https://git-lfs.":
        raise CheckpointError(f"{path} is a git-lfs pointer, not the weights; run `git lfs pull` in its repository")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(f"{path} is a web page, not the weights; download it again, logged in where that is needed")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"it names {shown(name)} twice")
    return result


def is_name(name: str) -> bool:
    """Whether a tensor may be called so: in words that can be printed and written."""
    return len(name) <= MAX_NAME and name.isprintable()
