"""Writing a model folder or a file that appears whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from samerge_ext.checkpoints.companions import Companions
from samerge_ext.checkpoints.files import SAFETENSORS_DTYPES, check_relative
from samerge_ext.checkpoints.locks import partial_of, sibling, sweep
from samerge_ext.checkpoints.places import WEIGHTS, folder_of
from samerge_ext.checkpoints.reading import CheckpointError, naming


def save_checkpoint(
    out_folder: str | Path,
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    *,
    metadata: Mapping[str, str] | None = None,
    companions_from: str | Path | Companions | None = None,
    extra_files: Mapping[str, bytes | str] | None = None,
    shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> Path:
    """Writes a model folder: model.safetensors, or shards and their index where it is larger than `shard_size`.

    Everything is written under a temporary name beside the folder, which is renamed at the end: whatever goes wrong
    before, nothing appears and what was there stays.

    tensors: each under one name, on any device. Of an iterable at most one shard is held at a time, and a tensor must
        keep its values until its shard is written.
    metadata: joins {"format": "pt"} in the header of every weight file.
    companions_from: a model folder whose configuration, tokenizer and so on are copied (`companions.copy_companions`).
    extra_files: path within the folder -> content; wins over a companion of the same name. Safetensors files go into
        subfolders, the top level is for the weights.
    shard_size: bytes, or a number with KB, MB, GB or TB (powers of 1000). A larger tensor gets a shard of its own.
    overwrite: replaces an existing model folder with all its contents. A folder without config.json or weights is
        refused even so.

    Returns the folder. Raises CheckpointError where the target is taken, a tensor cannot be stored or the space does
    not suffice: before anything is written if the tensors come as a mapping, else before each shard.
    """
    target = Path(os.path.realpath(out_folder))
    limit = parse_size(shard_size)
    contents = {name: data.encode() if isinstance(data, str) else data for name, data in (extra_files or {}).items()}
    for name in contents:
        check_relative(name, "extra file")
        if "/" not in name and name.endswith((".safetensors", ".safetensors.index.json")):
            raise CheckpointError(f"extra file '{name}' could be taken for the weights; put it in a subfolder")
    require_target(target, overwrite=overwrite)
    extra_bytes = sum(map(len, contents.values()))
    if isinstance(tensors, Mapping):
        for name, tensor in tensors.items():
            _check_storable(target, name, tensor)
        require_space(target, sum(tensor.nbytes for tensor in tensors.values()) + extra_bytes)
        tensors = tensors.items()
    target.parent.mkdir(parents=True, exist_ok=True)
    with partial_of(target, folder=True) as temporary:
        writer = _ShardWriter(temporary, target, limit, {"format": "pt", **(metadata or {})})
        try:
            if companions_from is not None:
                if not isinstance(companions_from, Companions):
                    companions_from = Companions(folder_of(companions_from))
                companions_from.copy(temporary)
            for name, data in contents.items():
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                (temporary / name).write_bytes(data)
            for name, tensor in tensors:
                writer.add(name, tensor)
            writer.finish()
            for path in (*temporary.rglob("*"), temporary):
                sync(path)
            replace_folder(temporary, target, overwrite=overwrite)
        except BaseException as error:
            if out_of_space(error):
                raise no_space(target, writer.total_bytes + extra_bytes) from error
            with naming(target):
                raise
    sync(target.parent)
    return Path(out_folder)


def require_space(path: str | Path, num_bytes: int) -> None:
    """Raises CheckpointError unless `num_bytes` are free where `path` is or will be. For use before long work."""
    if free_bytes(Path(path)) < num_bytes:
        raise no_space(Path(path), num_bytes)


def require_target(path: str | Path, *, overwrite: bool = False) -> None:
    """Raises CheckpointError unless a model folder may be written at `path`. For use before long work."""
    target = Path(os.path.realpath(path))
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file; choose another folder")
    if not overwrite:
        raise CheckpointError(f"{target} exists and is not empty; choose another folder or pass overwrite=True (--overwrite)")
    if not any((target / name).exists() for name in ("config.json", *WEIGHTS)):
        raise CheckpointError(f"{target} is not a model folder, overwrite=True would delete it; choose another folder")


def require_apart(path: str | Path, inputs: Collection[str | Path]) -> None:
    """Raises CheckpointError where writing the model folder ``path``, or its .state, would touch an input.

    inputs: model folders and weight files. Neither may be, contain or lie inside a folder, nor contain a file; links count where
    they lie and where they lead to, also those inside of a folder.
    """
    target = Path(os.path.realpath(path))
    for written in (target, target.with_name(f"{target.name}.state")):
        for given in map(Path, inputs):
            place = Path(os.path.realpath(given))
            if place in written.parents:
                raise CheckpointError(f"{written} lies inside {given}, which is merged; write to a folder beside it")
            way = Path(os.path.abspath(given))
            links = [each for each in (place.iterdir() if place.is_dir() else ()) if each.is_symlink()]
            places = {place, *(Path(os.path.realpath(each)) for each in links)}
            places |= {Path(os.path.realpath(each.parent), each.name) for each in (way, *way.parents)}
            if any(written == each or written in each.parents for each in places):
                raise CheckpointError(f"{written} is or holds {given}, which is merged; write to another folder")


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """A file, binary ("wb") or UTF-8 text ("w"), that takes the place of `path` when the block ends without exception.

    It is written under a temporary name in the same folder, made where missing, flushed to the disk and renamed;
    otherwise it is removed, and what was at `path` stays. Raises CheckpointError where there is no space.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial_of(path) as temporary:
            with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException as error:
        if out_of_space(error):
            raise no_space(path) from error
        with naming(path):
            raise
    sync(path.parent)


class _ShardWriter:
    """Gathers tensors and writes a shard whenever the next one would take it past `limit` bytes."""

    def __init__(self, folder: Path, target: Path, limit: int, metadata: dict[str, str]):
        self.total_bytes = 0
        self._folder, self._target, self._limit, self._metadata = folder, target, limit, metadata
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._names: set[str] = set()

    def add(self, name: str, tensor: Tensor) -> None:
        if name in self._names:
            raise CheckpointError(f"{self._target}: two tensors are called '{name}'; give each its own name")
        _check_storable(self._target, name, tensor)
        if self._pending and self._pending_bytes + tensor.nbytes > self._limit:
            self._write()
        self._names.add(name)
        self._pending[name] = tensor.detach().cpu().contiguous()
        self._pending_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes

    def finish(self) -> None:
        """Writes the last shard, gives all of them their names, and writes the index where there are several."""
        if not self._names:
            raise CheckpointError(f"{self._target}: there are no tensors to save")
        self._write()
        count = len(self._shards)
        if count == 1:
            os.rename(self._part(0), self._folder / "model.safetensors")
            return
        weight_map = {}
        for i, names in enumerate(self._shards):
            file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            os.rename(self._part(i), self._folder / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")

    def _part(self, i: int) -> Path:
        return self._folder / f"part-{i}.safetensors"

    def _write(self) -> None:
        require_space(self._target, self._pending_bytes)
        path = self._part(len(self._shards))
        try:
            save_file(self._pending, path, self._metadata)
        except RuntimeError as error:
            raise CheckpointError(
                f"{self._target}: a shard cannot be saved; where tensors share memory, pass one of their names. {error}"
            ) from error
        except SafetensorError as error:
            if code := re.search(r"\(os error (\d+)\)", str(error)):
                raise OSError(int(code[1]), os.strerror(int(code[1])), str(self._target)) from error
            raise
        # The library makes files that only their owner can read; give them what the folder got from the umask.
        os.chmod(path, self._folder.stat().st_mode & 0o666)
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0


def _check_storable(target: Path, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in SAFETENSORS_DTYPES.values() or tensor.layout != torch.strided or tensor.is_meta:
        raise CheckpointError(
            f"{target}: '{name}' ({tensor.dtype}, {tensor.layout}, on {tensor.device}) has no form in safetensors; "
            f"convert it to a dense tensor with values, of {', '.join(map(str, SAFETENSORS_DTYPES.values()))}"
        )


def replace_folder(temporary: Path, target: Path, *, overwrite: bool = False) -> None:
    """Renames a folder to one that may exist, which steps aside first, as rename replaces only empty folders.

    Raises CheckpointError, as `require_target`, where the target has been taken meanwhile.
    """
    require_target(target, overwrite=overwrite)
    old = sibling(target, "old")
    if target.exists():
        os.rename(target, old)
    try:
        os.rename(temporary, target)
    except BaseException:
        if old.exists():
            os.rename(old, target)
        raise
    if old.exists():
        shutil.rmtree(old)
    sweep(target, "old")


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk, so that after a power cut a new name never stands for old bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def parse_size(size: int | str) -> int:
    """Bytes of a shard: a number of them, or one with KB, MB, GB or TB (powers of 1000). Raises ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])B", str(size).strip().upper())
    num_bytes = int(float(found[1]) * 1000 ** (1 + "KMGT".index(found[2]))) if found else size
    if not isinstance(num_bytes, int) or num_bytes <= 0:
        raise ValueError(f"shard_size {size!r}: give a number of bytes, or a text such as '5GB' or '500MB'")
    return num_bytes


def out_of_space(error: BaseException | None) -> bool:
    """Whether a full disk caused it: torch.save says so in an earlier exception."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__context__
    return False


def no_space(path: Path, num_bytes: int | None = None) -> CheckpointError:
    """The error of a disk that is or would be full."""
    needed = "" if num_bytes is None else f"{num_bytes} bytes are needed, "
    free = f"{free_bytes(path)} bytes are free"
    return CheckpointError(f"no space to write {path}: {needed}{free}; make room or choose another place")


def free_bytes(path: Path) -> int:
    """Free bytes of the file system that a path, existing or not, belongs to."""
    path = Path(os.path.abspath(path))
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
