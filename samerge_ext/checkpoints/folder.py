"""Model folders, sharded or not: their tensors read one at a time, and their configuration."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from samerge_ext.checkpoints.coded import Coded, coded_weights
from samerge_ext.checkpoints.dcp import DcpCheckpoint
from samerge_ext.checkpoints.files import SafetensorsFile, check_relative
from samerge_ext.checkpoints.naming import unwrapped
from samerge_ext.checkpoints.places import METADATA, SUFFIXES, find_weights, folder_of
from samerge_ext.checkpoints.reading import CheckpointError, cut, read_json, shown
from samerge_ext.checkpoints.state_dicts import TorchFile

WeightFile = SafetensorsFile | TorchFile | DcpCheckpoint


class StoredTensors:
    """The tensors of weight files as they are stored; names and tied as of a `Checkpoint`."""

    def __init__(self, path: Path, files: list[WeightFile]):
        self.path, self.files = path, files
        self.tied: dict[str, str] = {}
        self._places: dict[str, tuple[WeightFile, str]] = {}
        plain = unwrapped(name for file in files for name in (*file.names, *file.tied))
        for file in files:
            for name in (*file.names, *file.tied):
                other, _ = self._places.setdefault(plain[name], (file, name))
                if other is not file:
                    raise CheckpointError(f"'{name}' is in both {other.path} and {file.path}; save the model again")
            self.tied.update({plain[alias]: plain[name] for alias, name in file.tied.items()})
        self.names = tuple(plain[name] for file in files for name in file.names)

    def shape(self, name: str) -> torch.Size:
        file, stored = self._find(name)
        return file.shape(stored)

    def dtype(self, name: str) -> torch.dtype:
        file, stored = self._find(name)
        return file.dtype(stored)

    def read(self, name: str) -> Tensor:
        file, stored = self._find(name)
        return file.read(stored)

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        file, stored = self._find(name)
        file.read_into(stored, start, out)

    def _find(self, name: str) -> tuple[WeightFile, str]:
        """Which file has a tensor, and under which name."""
        if name not in self._places:
            raise CheckpointError(f"{self.path} has no tensor '{name}'; see its .names")
        return self._places[name]


class Checkpoint:
    """The tensors of one model; a context manager. Made by `open_checkpoint`.

    path: the folder or file that was opened.
    names: every tensor once: shards by file name, within a shard in the order of the file; without what wrappers of a module put
        into them (`naming.unwrapped`). Codes and what belongs to them are one tensor, the weight that they stand for.
    tied: other name of a tensor -> the name in `names`. Known for .bin files; safetensors stores a tied tensor under
        one name and does not say which others it has.

    The methods take both kinds of names and raise CheckpointError for an unknown one.
    """

    def __init__(self, path: Path, stored: StoredTensors, coded: dict[str, Coded]):
        self.path, self.tied = path, stored.tied
        self._stored, self._coded = stored, coded
        called = {weight.parts[0]: name for name, weight in coded.items()}
        parts = {part for weight in coded.values() for part in weight.parts[1:]}
        self.names = tuple(called.get(name, name) for name in stored.names if name not in parts)

    def shape(self, name: str) -> torch.Size:
        coded = self._coded_as(name)
        return coded.shape if coded else self._stored.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """The stored type, float or not; float32 of codes."""
        return torch.float32 if self._coded_as(name) else self._stored.dtype(name)

    def weight_dtype(self, name: str) -> torch.dtype:
        """As `dtype`; of codes the type of the model that was quantised."""
        coded = self._coded_as(name)
        return coded.dtype if coded else self._stored.dtype(name)

    def read(self, name: str) -> Tensor:
        """The tensor in new, contiguous CPU memory, in its type and shape."""
        coded = self._coded_as(name)
        if coded is None:
            return self._stored.read(name)
        out = torch.empty(coded.shape, dtype=torch.float32, device="cpu")
        coded.read_into(self._stored, 0, out.view(-1))
        return out

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Numbers ``start`` … of a tensor, flattened, into ``out`` [n] of its type, contiguous and on the CPU."""
        coded = self._coded_as(name)
        if coded is None:
            self._stored.read_into(name, start, out)
        else:
            coded.read_into(self._stored, start, out)

    def _coded_as(self, name: str) -> Coded | None:
        return self._coded.get(self.tied.get(name, name))

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files, each once."""
        return tuple(path for file in self._stored.files for path in file.paths)

    def close(self) -> None:
        for file in self._stored.files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_checkpoint(path: str | Path, *, beside_adapter: bool = False) -> Checkpoint:
    """Opens a model folder, an index, a single weight file (.safetensors, .bin, .pt, .pth, .ckpt) or a checkpoint of
    torch.distributed.checkpoint (.metadata) and checks its headers.

    A folder holds one of `WEIGHTS`. All tensors of its shards count, also those that the index does not list. Memory
    beyond the tensors that were read: the headers, and for each .bin 64 MiB or its largest tensor (the whole file for
    one from before torch 1.6).

    beside_adapter: open a model also where an adapter lies in its folder; transformers would put that on top.

    Raises CheckpointError, naming the file, the tensor and the fix, for: no weights, an adapter, a file that is
    truncated or whose header lies, an index that names a shard or a tensor that is not there, a tensor in two shards,
    a pickle with code in it (which is never run), codes of quantised weights that are not read here (`coded`).
    """
    path = Path(path)
    weights = find_weights(path, beside_adapter=beside_adapter)
    indexed: dict[str, str] = {}
    paths = [weights]
    if weights.name.endswith(".index.json"):
        indexed = _read_index(weights)
        paths = [weights.parent / shard for shard in sorted(set(indexed.values()))]
    with ExitStack() as stack:
        files: list[WeightFile] = []
        for file in paths:
            files.append(_reader(file)(file))
            stack.callback(files[-1].close)
        stored = {file.path: {*file.names, *file.tied} for file in files}
        for name, shard in indexed.items():
            if name not in stored[weights.parent / shard]:
                raise CheckpointError(f"{weights} places {shown(name)} in {cut(shard)}, which lacks it; save the model again")
        tensors = StoredTensors(path, files)
        checkpoint = Checkpoint(path, tensors, coded_weights(tensors, folder_of(path) / "config.json"))
        stack.pop_all()
    return checkpoint


def read_config(path: str | Path) -> dict:
    """The config.json of a model folder, or of the folder that a weight file is in. Raises CheckpointError."""
    config = folder_of(path) / "config.json"
    if not config.is_file():
        raise CheckpointError(f"{config} is missing; copy it from the model that the weights belong to")
    return read_json(config)


def _reader(path: Path) -> type[WeightFile]:
    if path.suffix == ".gguf":
        raise CheckpointError(f"{path} is a GGUF file: make a model folder of it with `samerge from-gguf {path.name} FOLDER`")
    if path.name == METADATA:
        return DcpCheckpoint
    if path.suffix not in SUFFIXES:
        raise CheckpointError(f"{path}: a weight file ends in one of {', '.join(SUFFIXES)}; convert to safetensors")
    return SafetensorsFile if path.suffix == ".safetensors" else TorchFile


def _read_index(path: Path) -> dict[str, str]:
    """The weight_map of an index: tensor name -> shard, each of which exists in the index's folder."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(s, str) for s in weight_map.values()):
        raise CheckpointError(f"{path} has no weight_map from tensors to files; download it or save the model again")
    for name, shard in weight_map.items():
        check_relative(shard, f"{path}: shard")
        if not os.path.isfile(path.parent / shard):
            raise CheckpointError(f"{path.parent / shard} is missing; {path.name} places {shown(name)} in it: download it")
    return weight_map
