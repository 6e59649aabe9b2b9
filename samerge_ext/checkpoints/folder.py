"""Model folders, sharded or not: their tensors read one at a time, and their configuration."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from samerge_ext.checkpoints.files import (
    WEIGHTS,
    CheckpointError,
    SafetensorsFile,
    TorchFile,
    check_relative,
    folder_of,
)

READERS: dict[str, type[SafetensorsFile | TorchFile]] = {
    ".safetensors": SafetensorsFile,
    ".bin": TorchFile,
    ".pt": TorchFile,
    ".pth": TorchFile,
}


ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


class Checkpoint:
    """The stored tensors of one model; a context manager. Made by `open_checkpoint`.

    path: the folder or file that was opened.
    names: every stored tensor once: shards by file name, within a shard in the order of the file.
    tied: other name of a tensor -> the name in `names`. Known for .bin files; safetensors stores a tied tensor under
        one name and does not say which others it has.

    The methods take both kinds of names and raise CheckpointError for an unknown one.
    """

    def __init__(self, path: Path, files: list[SafetensorsFile | TorchFile]):
        self.path = path
        self.tied: dict[str, str] = {}
        self._files = files
        self._file_of: dict[str, SafetensorsFile | TorchFile] = {}
        for file in files:
            for name in (*file.names, *file.tied):
                other = self._file_of.setdefault(name, file)
                if other is not file:
                    raise CheckpointError(f"'{name}' is in both {other.path} and {file.path}; save the model again")
            self.tied.update(file.tied)
        self.names = tuple(name for file in files for name in file.names)

    def shape(self, name: str) -> torch.Size:
        return self._find(name).shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """The stored type, float or not."""
        return self._find(name).dtype(name)

    def read(self, name: str) -> Tensor:
        """The tensor in new, contiguous CPU memory, in its stored type and shape."""
        return self._find(name).read(name)

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Numbers ``start`` … of a tensor, flattened, into ``out`` [n] of its stored type, contiguous and on the CPU."""
        self._find(name).read_into(name, start, out)

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files, each once."""
        return tuple(file.path for file in self._files)

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _find(self, name: str) -> SafetensorsFile | TorchFile:
        if name not in self._file_of:
            raise CheckpointError(f"{self.path} has no tensor '{name}'; see its .names")
        return self._file_of[name]


def open_checkpoint(path: str | Path, *, beside_adapter: bool = False) -> Checkpoint:
    """Opens a model folder, an index or a single weight file (.safetensors, .bin, .pt, .pth) and checks its headers.

    A folder holds one of `WEIGHTS`. All tensors of its shards count, also those that the index does not list. Memory
    beyond the tensors that were read: the headers, and for each .bin 64 MiB or its largest tensor (the whole file for
    one from before torch 1.6).

    beside_adapter: open a model also where an adapter lies in its folder; transformers would put that on top.

    Raises CheckpointError, naming the file, the tensor and the fix, for: no weights, an adapter, a file that is
    truncated or whose header lies, an index that names a shard or a tensor that is not there, a tensor in two shards,
    a pickle with code in it (which is never run).
    """
    path = Path(path)
    weights = _find_weights(path, beside_adapter)
    indexed: dict[str, str] = {}
    paths = [weights]
    if weights.name.endswith(".index.json"):
        indexed = _read_index(weights)
        paths = [weights.parent / shard for shard in sorted(set(indexed.values()))]
    with ExitStack() as stack:
        files: list[SafetensorsFile | TorchFile] = []
        for file in paths:
            files.append(_reader(file)(file))
            stack.callback(files[-1].close)
        stored = {file.path: {*file.names, *file.tied} for file in files}
        for name, shard in indexed.items():
            if name not in stored[weights.parent / shard]:
                raise CheckpointError(f"{weights} places '{name}' in {shard}, which lacks it; save the model again")
        checkpoint = Checkpoint(path, files)
        stack.pop_all()
    return checkpoint


def read_config(path: str | Path) -> dict:
    """The config.json of a model folder, or of the folder that a weight file is in. Raises CheckpointError."""
    config = folder_of(path) / "config.json"
    if not config.is_file():
        raise CheckpointError(f"{config} is missing; copy it from the model that the weights belong to")
    return read_json(config)


def holds_model(folder: Path) -> bool:
    """Whether a folder holds the weights of a full model, whatever else."""
    return any((folder / name).is_file() for name in WEIGHTS)


def _find_weights(path: Path, beside_adapter: bool) -> Path:
    """The weight file or index that a path stands for."""
    if path.is_file():
        if path.name.startswith("adapter_model."):
            raise _adapter(path)
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path} is neither a folder nor a file; download the model first and pass its folder")
    if (path / "adapter_config.json").exists():
        if not holds_model(path):
            raise _adapter(path)
        if any((path / name).is_file() for name in ADAPTER_WEIGHTS) and not beside_adapter:
            raise CheckpointError(
                f"{path} holds a model and a PEFT adapter, which transformers puts on top of it: merge the two, or move the "
                "files of one to a folder of its own"
            )
    for name in WEIGHTS:
        if (path / name).is_file():
            return path / name
    others = sorted(file.name for file in path.iterdir() if file.suffix in READERS)
    if adapters := sorted(file.parent.name for file in path.glob("*/adapter_config.json")):  # where PEFT saves those with a name
        raise CheckpointError(f"{path} holds PEFT adapters in folders of their own; pass one of them: {', '.join(adapters)}")
    advice = f"pass one of its files by name: {', '.join(others)}" if others else "download the model's weights"
    raise CheckpointError(f"{path} holds none of {', '.join(WEIGHTS)}; {advice}")


def _adapter(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is a PEFT adapter (adapter_config.json), not a model: pass its folder as an expert of its base, or load it "
        "with peft, call merge_and_unload() and save the model that it returns"
    )


def _reader(path: Path) -> type[SafetensorsFile | TorchFile]:
    if path.suffix not in READERS:
        raise CheckpointError(f"{path}: a weight file ends in one of {', '.join(READERS)}; convert to safetensors")
    return READERS[path.suffix]


def _read_index(path: Path) -> dict[str, str]:
    """The weight_map of an index: tensor name -> shard, each of which exists in the index's folder."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(s, str) for s in weight_map.values()):
        raise CheckpointError(f"{path} has no weight_map from tensors to files; download it or save the model again")
    for name, shard in weight_map.items():
        check_relative(shard, f"{path}: shard")
        if not (path.parent / shard).is_file():
            raise CheckpointError(f"{path.parent / shard} is missing; {path.name} places '{name}' in it: download it")
    return weight_map


def read_json(path: Path) -> dict:
    """The object in a JSON file; raises CheckpointError where there is none."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download it or save it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__} in place of an object; download it again")
    return content
