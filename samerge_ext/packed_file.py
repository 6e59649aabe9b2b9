"""Packed weights in a file: made once, layer by layer, and read some numbers at a time.

A safetensors file. One flat body per role (`base`, and every task's vector) in the order of the layout, the small rest
(unchanged layers, buffers, heads) tensor by tensor, and in the header's metadata the layout, the tasks and the CRC-32 of every
body. Ranges are read with preadv: pages of a mapped file would count as this process's memory.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from samerge_ext.checkpoint_files import SAFETENSORS_CODES, CheckpointError, SafetensorsFile
from samerge_ext.checkpoint_saving import require_space
from samerge_ext.layout import Layout

VERSION = 1
_CHUNK = 4 << 20  # bytes that are read at once to check a body


@dataclass(frozen=True, eq=False)
class FileNumbers:
    """Base [N] or task vectors [T, N] that stay in a packed file; ``device`` is where they are computed with."""

    file: PackedFile
    bodies: tuple[str, ...]
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def empty(self, length: int, device: torch.device | str, pin_memory: bool = False) -> Tensor:
        """Room for ``length`` of the numbers."""
        return torch.empty(*self.shape[:-1], length, dtype=self.dtype, device=device, pin_memory=pin_memory)

    def read_into(self, start: int, length: int, out: Tensor) -> None:
        """Reads numbers ``start`` … into the first places of ``out`` [≥ length] or [T, ≥ length], on the CPU."""
        for body, row in zip(self.bodies, out.view(len(self.bodies), -1), strict=True):
            self.file.read_into(body, start, row[:length])

    def __getitem__(self, index):
        raise TypeError(f"these weights stay in {self.file.path}; what needs them whole takes packed.in_memory()")

    def __iter__(self):
        return self[:]

    def in_memory(self) -> Tensor:
        """All of them, on the device."""
        numbers = self.empty(self.shape[-1], "cpu")
        self.read_into(0, self.shape[-1], numbers)
        return numbers.to(self.device)


class PackedFile(SafetensorsFile):
    """A packed file that is open for reading. about: what is in it, from the header's metadata."""

    def __init__(self, path: Path):
        if not Path(path).is_file():
            raise CheckpointError(f"{path} does not exist; make it with PackedWeights.from_folders(..., file=PATH)")
        self.about: dict = {}
        super().__init__(Path(path))
        if self.about.get("version") != VERSION:
            self.close()
            raise CheckpointError(f"{path} is no packed file of version {VERSION}; make it again from the model folders")

    def verify(self) -> None:
        """Reads everything once; raises CheckpointError where a body is not what was written."""
        buffer = memoryview(bytearray(_CHUNK))
        for name, entry in self._entries.items():
            checksum, done = 0, 0
            while done < entry.nbytes:
                view = buffer[: min(_CHUNK, entry.nbytes - done)]
                count = os.preadv(self._file.fileno(), [view], entry.begin + done)
                checksum = zlib.crc32(view[:count], checksum)
                done += count or entry.nbytes  # cut off: the checksum will not fit
            if f"{checksum:08x}" != self.about["checksums"][name]:
                raise CheckpointError(
                    f"{self.path}: '{name}' is damaged, its checksum is {checksum:08x} in place of "
                    f"{self.about['checksums'][name]}; make the file again from the folders"
                )

    def _damaged(self, fault: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {fault}. The file is truncated or damaged; make it again from the folders")

    def _read_header(self) -> dict:
        entries = super()._read_header()
        length = int.from_bytes(os.pread(self._file.fileno(), 8, 0), "little")
        metadata = json.loads(os.pread(self._file.fileno(), length, 8)).get("__metadata__", {})
        self.about = json.loads(metadata.get("packed", "{}"))
        return entries


class PackedFileWriter:
    """Writes a packed file: the layers one by one, each for the base and all tasks, then the small tensors.

    Everything goes to `PATH.partial`, which is renamed when it is whole and on the disk.
    """

    def __init__(
        self,
        path: Path,
        layout: Layout,
        num_tasks: int,
        dtypes: tuple[torch.dtype, torch.dtype],
        small: dict[str, Tensor],
        about: dict,
    ):
        self.path, self.partial, self.layout = path, path.with_name(f"{path.name}.partial"), layout
        self._small = small
        self._rows = dict(zip(body_names(num_tasks), [dtypes[0], *[dtypes[1]] * num_tasks], strict=True))
        sizes = {name: (dtype, [layout.numel]) for name, dtype in self._rows.items()}
        sizes.update({name: (tensor.dtype, list(tensor.shape)) for name, tensor in small.items()})
        self._about = {"version": VERSION, **about, "checksums": dict.fromkeys(sizes, "0" * 8)}
        self._checksums = dict.fromkeys(sizes, 0)
        self._header, position = {}, 0
        for name, (dtype, shape) in sizes.items():
            end = position + torch.Size(shape).numel() * dtype.itemsize
            self._header[name] = {"dtype": SAFETENSORS_CODES[dtype], "shape": shape, "data_offsets": [position, end]}
            position = end
        self._begin = len(self._encoded())
        path.parent.mkdir(parents=True, exist_ok=True)
        require_space(path, self._begin + position)
        self._file = open(self.partial, "wb", buffering=0)
        self._file.truncate(self._begin + position)
        self._written = dict.fromkeys(sizes, 0)

    def write(self, layer: int, tensors: Iterable[Tensor]) -> None:
        """One layer of the base and of every task vector, in this order; layers in the order of the layout."""
        _, length = self.layout.extent(layer)
        for (name, dtype), tensor in zip(self._rows.items(), tensors, strict=True):
            flat = torch.zeros(length, dtype=dtype)
            flat[: tensor.numel()] = tensor.reshape(-1)
            self._append(name, flat)

    def finish(self) -> None:
        for name, tensor in self._small.items():
            self._append(name, tensor.contiguous().reshape(-1))
        self._about["checksums"] = {name: f"{checksum:08x}" for name, checksum in self._checksums.items()}
        os.pwrite(self._file.fileno(), self._encoded(), 0)
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self.partial, self.path)

    def abandon(self) -> None:
        self._file.close()
        self.partial.unlink(missing_ok=True)

    def _append(self, name: str, flat: Tensor) -> None:
        view = memoryview(flat.cpu().view(torch.uint8).numpy())
        self._checksums[name] = zlib.crc32(view, self._checksums[name])
        position = self._begin + self._header[name]["data_offsets"][0] + self._written[name]
        self._written[name] += len(view)
        while len(view):
            count = os.pwrite(self._file.fileno(), view, position)
            view, position = view[count:], position + count

    def _encoded(self) -> bytes:
        """The file's head; its length does not depend on the checksums."""
        header = json.dumps({"__metadata__": {"format": "pt", "packed": json.dumps(self._about)}, **self._header}).encode()
        header += b" " * (-len(header) % 8)
        return len(header).to_bytes(8, "little") + header


def body_names(num_tasks: int) -> list[str]:
    return ["base", *(f"task_vectors/{task}" for task in range(num_tasks))]


def file_numbers(file: PackedFile, num_tasks: int, device: torch.device) -> tuple[FileNumbers, FileNumbers]:
    """Base [N] and task vectors [T, N] of a packed file."""
    base, *tasks = body_names(num_tasks)
    shape = file.shape(base)
    rows = torch.Size((num_tasks, *shape))
    return (
        FileNumbers(file, (base,), shape, file.dtype(base), device),
        FileNumbers(file, tuple(tasks), rows, file.dtype(tasks[0]), device),
    )
