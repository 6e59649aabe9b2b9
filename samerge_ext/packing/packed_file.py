"""Packed weights in a file: made once, layer by layer, and read some numbers at a time.

A safetensors file. One flat body per role (`base`, and every task's vector, or its codes and its scales) in the order of the
layout, the small rest (unchanged layers, buffers, heads, LoRA factors) tensor by tensor, and in the header's metadata the
layout, the tasks, the CRC-32 of every body and that of the header itself. Ranges are read with preadv: pages of a mapped file
would count as this process's memory.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from samerge_ext.checkpoints.files import SAFETENSORS_CODES, SafetensorsFile
from samerge_ext.checkpoints.locks import partial_of
from samerge_ext.checkpoints.reading import MAX_JSON_BYTES, CheckpointError, object_in
from samerge_ext.checkpoints.saving import require_space
from samerge_ext.checkpoints.sealed import checksum_of
from samerge_ext.packing.factors import LORA
from samerge_ext.packing.in_pieces import InPieces, Room
from samerge_ext.packing.layout import Layout
from samerge_ext.packing.quantised import GROUP, QuantisedTaskVectors, is_shared, parts_of

VERSION = 3
_CHECKSUM = re.compile(rb'(?<="checksum": ")[0-9a-f]{8}(?=")')  # the header's, in the header
_AGAIN = "delete it, and it is made again from the model folders"


class InFile(InPieces[Room]):
    """What stays in a packed file."""

    reads_to = torch.device("cpu")

    def __init__(self, file: PackedFile, shape: torch.Size, form: str, nbytes: int, device: torch.device):
        self.file, self.shape, self.form, self.nbytes, self.device = file, shape, form, nbytes, device
        self.where = f"stay in {file.path}"

    def to(self, device: torch.device | str) -> NoReturn:
        raise ValueError("weights in a packed file are on no device; give PackedWeights.open(device=) the one to compute on")


class FileNumbers(InFile[Tensor]):
    """Base [N] or task vectors [T, N] as numbers, a body per row."""

    def __init__(self, file: PackedFile, bodies: tuple[str, ...], shape: torch.Size, dtype: torch.dtype, device: torch.device):
        super().__init__(file, shape, str(dtype), shape.numel() * dtype.itemsize, device)
        self.bodies, self.dtype = bodies, dtype

    def empty(self, length: int, device: torch.device | str, pin_memory: bool = False) -> Tensor:
        return torch.empty(*self.shape[:-1], length, dtype=self.dtype, device=device, pin_memory=pin_memory)

    def read_into(self, start: int, length: int, out: Tensor) -> None:
        for body, row in zip(self.bodies, out.view(len(self.bodies), -1), strict=True):
            self.file.read_into(body, start, row[:length])


class FileCodes(InFile[QuantisedTaskVectors]):
    """Quantised task vectors: the bodies of their codes and of their scales. form: one of `quantised.FORMATS`."""

    def __init__(self, codes: FileNumbers, scales: FileNumbers, form: str, shape: torch.Size):
        super().__init__(codes.file, shape, form, codes.nbytes + scales.nbytes, codes.device)
        self.codes, self.scales = codes, scales
        self._per_code = shape[-1] // codes.shape[-1]

    def empty(self, length: int, device: torch.device | str, pin_memory: bool = False) -> QuantisedTaskVectors:
        codes = self.codes.empty(length // self._per_code, device, pin_memory)
        scales = self.scales.empty(length // GROUP, device, pin_memory)
        return QuantisedTaskVectors(codes, scales, is_shared(self.form))

    def read_into(self, start: int, length: int, out: QuantisedTaskVectors) -> None:
        self.codes.read_into(start // self._per_code, length // self._per_code, out.codes)
        self.scales.read_into(start // GROUP, length // GROUP, out.scales)


class PackedFile(SafetensorsFile):
    """A packed file that is open for reading. about: what is in it, from the header's metadata."""

    def __init__(self, path: Path):
        if not Path(path).is_file():
            raise CheckpointError(f"{path} does not exist; make it with PackedWeights.from_folders(..., file=PATH)")
        self.about: dict = {}
        super().__init__(Path(path))

    def verify(self) -> None:
        """Reads everything once; raises CheckpointError where a body is not what was written."""
        for name, entry in self._entries.items():
            checksum = f"{checksum_of(self._file.fileno(), entry.begin, entry.nbytes):08x}"
            if checksum != self.about["checksums"][name]:
                noted = self.about["checksums"][name]
                raise self._damaged(f"'{name}' is damaged, its checksum is {checksum} in place of {noted}")

    def _damaged(self, fault: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {fault}. The file is truncated or damaged; {_AGAIN}")

    def _read_header(self) -> dict:
        """The header, once its checksum fits; bodies are left to `verify`."""
        length = int.from_bytes(os.pread(self._file.fileno(), 8, 0), "little")
        header = os.pread(self._file.fileno(), 8 + min(length, MAX_JSON_BYTES), 0)
        if len(header) < 8 + length:
            return super()._read_header()  # says what is wrong
        noted = _CHECKSUM.search(header)
        if noted is None or int(noted[0], 16) != zlib.crc32(_CHECKSUM.sub(b"0" * 8, header, count=1)):
            raise CheckpointError(f"{self.path} is no packed file of version {VERSION}, or its header is damaged; {_AGAIN}")
        entries = super()._read_header()
        self.about = object_in(self.path, self.metadata.get("packed", "{}").encode())
        if self.about.get("version") != VERSION:
            raise CheckpointError(f"{self.path} is no packed file of version {VERSION}; {_AGAIN}")
        return entries


class PackedFileWriter:
    """Writes a packed file: the layers one by one, each for the base and all tasks, then the small tensors.

    Everything goes to a partial file, which is renamed when it is whole and on the disk.
    """

    def __init__(
        self,
        path: Path,
        layout: Layout,
        rows: dict[str, tuple[torch.dtype, int]],  # see `rows_of`
        small: dict[str, Tensor],
        about: dict,
    ):
        self.path, self.layout = path, layout
        self._small = small
        self._rows = rows
        sizes = {name: (dtype, [layout.numel // per]) for name, (dtype, per) in rows.items()}
        sizes.update({name: (tensor.dtype, list(tensor.shape)) for name, tensor in small.items()})
        self._about = {"version": VERSION, **about, "checksums": dict.fromkeys(sizes, "0" * 8)}
        self._checksums = dict.fromkeys(sizes, 0)
        self._header: dict[str, dict[str, Any]] = {}
        position = 0
        for name, (dtype, shape) in sizes.items():
            end = position + torch.Size(shape).numel() * dtype.itemsize
            self._header[name] = {"dtype": SAFETENSORS_CODES[dtype], "shape": shape, "data_offsets": [position, end]}
            position = end
        self._begin = len(self._encoded())
        path.parent.mkdir(parents=True, exist_ok=True)
        require_space(path, self._begin + position)
        self._until_done = ExitStack()
        self._partial = self._until_done.enter_context(partial_of(path))
        self._file = self._until_done.enter_context(open(self._partial, "r+b", buffering=0))
        self._file.truncate(self._begin + position)
        self._written = dict.fromkeys(sizes, 0)

    def write(self, layer: int, tensors: Iterable[Tensor]) -> None:
        """One layer of every row, in their order; layers in the order of the layout."""
        _, length = self.layout.extent(layer)
        for (name, (dtype, per)), tensor in zip(self._rows.items(), tensors, strict=True):
            flat = torch.zeros(length // per, dtype=dtype)
            flat[: tensor.numel()] = tensor.reshape(-1)
            self._append(name, flat)

    def finish(self) -> PackedFile:
        """The file that was written, open, whatever else takes its place then."""
        for name, tensor in self._small.items():
            self._append(name, tensor.contiguous().reshape(-1))
        self._about["checksums"] = {name: f"{checksum:08x}" for name, checksum in self._checksums.items()}
        header = self._encoded()
        os.pwrite(self._file.fileno(), _CHECKSUM.sub(b"%08x" % zlib.crc32(header), header, count=1), 0)
        os.fsync(self._file.fileno())
        opened = PackedFile(self._partial)
        os.replace(self._partial, self.path)
        opened.path = self.path
        self.abandon()
        return opened

    def abandon(self) -> None:
        """Lets the partial file go."""
        self._until_done.close()

    def _append(self, name: str, flat: Tensor) -> None:
        view = flat.cpu().view(torch.uint8).numpy().data
        self._checksums[name] = zlib.crc32(view, self._checksums[name])
        position = self._begin + self._header[name]["data_offsets"][0] + self._written[name]
        self._written[name] += len(view)
        while len(view):
            count = os.pwrite(self._file.fileno(), view, position)
            view, position = view[count:], position + count

    def _encoded(self) -> bytes:
        """The file's head, its own checksum left at 0; its length does not depend on the checksums."""
        metadata = {"format": "pt", "checksum": "0" * 8, "packed": json.dumps(self._about)}
        header = json.dumps({"__metadata__": metadata, **self._header}).encode()
        header += b" " * (-len(header) % 8)
        return len(header).to_bytes(8, "little") + header


def rows_of(num_tasks: int, dtype: torch.dtype, form: torch.dtype | str) -> dict[str, tuple[torch.dtype, int]]:
    """The bodies of base and task vectors: name -> dtype and how many numbers an entry is for.

    form: of the task vectors, a dtype or one of `quantised.FORMATS`; LoRA factors are no rows.
    """
    if form == LORA:
        return {"base": (dtype, 1)}
    parts = {"task_vectors": (num_tasks, form, 1)} if isinstance(form, torch.dtype) else parts_of(num_tasks, form)
    rows = {f"{part}/{row}": (stored, per) for part, (count, stored, per) in parts.items() for row in range(count)}
    return {"base": (dtype, 1), **rows}


def file_numbers(file: PackedFile, part: str, device: torch.device) -> FileNumbers:
    """The bodies of one role: "base" [N], or a row each of "task_vectors" [T, N], "codes" or "scales"."""
    bodies = tuple(name for name in file.names if name.split("/")[0] == part)
    rows = () if part == "base" else (len(bodies),)
    return FileNumbers(file, bodies, torch.Size((*rows, *file.shape(bodies[0]))), file.dtype(bodies[0]), device)


def file_task_vectors(file: PackedFile, num_tasks: int, device: torch.device) -> FileNumbers | FileCodes:
    """Task vectors [T, N] that stay in a packed file."""
    if file.about["form"] is None:
        return file_numbers(file, "task_vectors", device)
    codes, scales = (file_numbers(file, part, device) for part in ("codes", "scales"))
    return FileCodes(codes, scales, file.about["form"], torch.Size((num_tasks, *file.shape("base"))))
