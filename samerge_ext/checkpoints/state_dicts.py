"""A state dict that torch.save wrote: its tensors' names, types and shapes, and one tensor at a time."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from samerge_ext.checkpoints.files import is_name, refuse_pointer
from samerge_ext.checkpoints.reading import MAX_JSON_BYTES, CheckpointError, cut, shown

# Pages of a mapped file that were read count as this process's memory until the file is mapped again.
MAX_MAPPED_BYTES = 64 << 20


class TorchFile:
    """A state dict written by torch.save, read with weights_only=True, so that code in it is never run.

    The file is mapped, and mapped again whenever 64 MiB of it have been touched. Files in the format from before torch
    1.6 cannot be mapped and are held in memory whole while open.

    names: in the state dict's order, tensors that share their memory once. tied: other name -> name in `names`.
    Raises CheckpointError where the file is damaged, holds code, takes more memory than its bytes, or is not a flat dictionary
    of dense tensors; a checkpoint of open_clip's training is the state dict in it.
    """

    def __init__(self, path: Path):
        self.path, self.paths = path, (path,)
        refuse_pointer(path)
        with open(path, "rb") as file:
            self._mappable = file.read(4) == b"PK\x03\x04"
        if self._mappable:
            self._check_archive()
        self._identity = _identity(path)
        self._tensors = self._load()
        self._touched = 0
        self._check()
        self.tied: dict[str, str] = {}
        first_at: dict[tuple, str] = {}
        for name, tensor in self._tensors.items():
            where = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if tensor.numel() and where in first_at:
                self.tied[name] = first_at[where]
            else:
                first_at[where] = name
        self.names = tuple(name for name in self._tensors if name not in self.tied)
        self._types = {name: (tensor.shape, tensor.dtype) for name, tensor in self._tensors.items()}

    def shape(self, name: str) -> torch.Size:
        return self._types[name][0]

    def dtype(self, name: str) -> torch.dtype:
        return self._types[name][1]

    def read(self, name: str) -> Tensor:
        """The tensor in new, contiguous CPU memory, in its stored type and shape."""
        tensor = self._tensors[name].detach().clone(memory_format=torch.contiguous_format)
        self._forget(tensor.nbytes)
        return tensor

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Numbers ``start`` … of a tensor, flattened, into ``out`` [n] of its type."""
        out.copy_(self._tensors[name].detach().reshape(-1)[start : start + out.numel()])
        self._forget(out.nbytes)

    def _forget(self, nbytes: int) -> None:
        """Maps the file again once enough of it was touched."""
        self._touched += nbytes
        if self._mappable and self._touched > MAX_MAPPED_BYTES:
            if _identity(self.path) != self._identity:
                raise CheckpointError(f"{self.path} changed while it was being read; read it again")
            self._tensors = self._load()
            self._touched = 0

    def close(self) -> None:
        self._tensors = {}

    def _load(self) -> dict[str, Tensor]:
        try:
            loaded = torch.load(self.path, map_location="cpu", weights_only=True, mmap=self._mappable)
            return loaded["state_dict"] if _is_open_clips(loaded) else loaded
        except MemoryError:
            raise
        except pickle.UnpicklingError as error:
            called = re.search(r"GLOBAL\s+([\w.]+)", str(error))
            fault = f"its pickle refers to {called[1]}" if called else "its pickle is damaged or not only tensors"
            # torch's own message, left out here, advises to load the file with its code.
            raise CheckpointError(
                f"{self.path}: {fault}, and code in a weight file is never run; "
                "where you trust its source, convert to safetensors"
            ) from None
        except Exception as error:  # torch raises many types for a file that is cut off or of another format
            raise self._damaged(cut(repr(error), 200)) from error

    def _damaged(self, fault: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is truncated, damaged or not of torch.save ({fault}); download it or save it again")

    def _check_archive(self) -> None:
        """torch.save compresses nothing: what is read takes no more than the file."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                entries = archive.infolist()
        except OSError:
            raise
        except Exception as error:  # of many types, from a directory of any bytes
            raise self._damaged(cut(repr(error), 200)) from error
        if any(entry.filename.endswith(".pkl") and entry.file_size > MAX_JSON_BYTES for entry in entries):
            raise self._damaged(f"it names its tensors in more than {MAX_JSON_BYTES} bytes")
        packed = [entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
        if packed or sum(entry.file_size for entry in entries) > os.path.getsize(self.path):
            raise CheckpointError(
                f"{self.path} is a compressed archive, which torch.save does not write and which may fill the memory; where you "
                "trust its source, load it and save it again"
            )

    def _check(self) -> None:
        if not isinstance(self._tensors, dict):
            kind = type(self._tensors).__name__
            raise CheckpointError(f"{self.path} holds a {kind}, not a state dict; save module.state_dict() instead")
        file_bytes = os.path.getsize(self.path)
        for name, tensor in self._tensors.items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise CheckpointError(
                    f"{self.path}: entry {shown(name)} is a {type(tensor).__name__}, not a tensor; "
                    "save the model's state dict by itself, without wrapper or training state"
                )
            if not is_name(name):
                raise self._damaged(f"{shown(name)} is no tensor's name")
            if tensor.layout != torch.strided or tensor.is_quantized:
                raise CheckpointError(f"{self.path}: '{name}' is sparse or quantised; save it as a dense tensor")
            if tensor.is_meta or tensor.numel() * tensor.itemsize > file_bytes:
                raise CheckpointError(
                    f"{self.path}: '{name}' {cut(str(list(tensor.shape)))} is without numbers, or expanded from fewer; "
                    "save it as a tensor of its own (contiguous)"
                )


def _is_open_clips(loaded: object) -> bool:
    """Whether a file is a checkpoint of open_clip's training, whose state dict lies among the state of an optimizer and so on."""
    return isinstance(loaded, dict) and {"epoch", "name", "state_dict"} <= loaded.keys()


def _identity(path: Path) -> tuple[int, int, int]:
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns
