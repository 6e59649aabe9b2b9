"""Model folders, sharded or not: their tensors read one at a time, and their configuration."""

from __future__ import annotations

import os
import re
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from samerge_ext.checkpoints.files import (
    WEIGHTS,
    CheckpointError,
    SafetensorsFile,
    check_relative,
    folder_of,
)
from samerge_ext.checkpoints.naming import unwrapped
from samerge_ext.checkpoints.reading import cut, read_json, shown
from samerge_ext.checkpoints.state_dicts import TorchFile

READERS: dict[str, type[SafetensorsFile | TorchFile]] = {
    ".safetensors": SafetensorsFile,
    ".bin": TorchFile,
    ".pt": TorchFile,
    ".pth": TorchFile,
    ".ckpt": TorchFile,
}
SHARD = re.compile(r"-\d{5}-of-(\d{5})\.(\w+)$")
OTHER_FORMATS = (".gguf", ".h5", ".msgpack", ".onnx", ".npz", ".ot", ".tflite", ".index")


ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


class Checkpoint:
    """The stored tensors of one model; a context manager. Made by `open_checkpoint`.

    path: the folder or file that was opened.
    names: every stored tensor once: shards by file name, within a shard in the order of the file; without what wrappers of a
        module put into them (`naming.unwrapped`).
    tied: other name of a tensor -> the name in `names`. Known for .bin files; safetensors stores a tied tensor under
        one name and does not say which others it has.

    The methods take both kinds of names and raise CheckpointError for an unknown one.
    """

    def __init__(self, path: Path, files: list[SafetensorsFile | TorchFile]):
        self.path = path
        self.tied: dict[str, str] = {}
        self._files = files
        self._places: dict[str, tuple[SafetensorsFile | TorchFile, str]] = {}
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
        """The stored type, float or not."""
        file, stored = self._find(name)
        return file.dtype(stored)

    def read(self, name: str) -> Tensor:
        """The tensor in new, contiguous CPU memory, in its stored type and shape."""
        file, stored = self._find(name)
        return file.read(stored)

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Numbers ``start`` … of a tensor, flattened, into ``out`` [n] of its stored type, contiguous and on the CPU."""
        file, stored = self._find(name)
        file.read_into(stored, start, out)

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

    def _find(self, name: str) -> tuple[SafetensorsFile | TorchFile, str]:
        """Which file has a tensor, and under which name."""
        if name not in self._places:
            raise CheckpointError(f"{self.path} has no tensor '{name}'; see its .names")
        return self._places[name]


def open_checkpoint(path: str | Path, *, beside_adapter: bool = False) -> Checkpoint:
    """Opens a model folder, an index or a single weight file (.safetensors, .bin, .pt, .pth, .ckpt) and checks its headers.

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
                raise CheckpointError(f"{weights} places {shown(name)} in {cut(shard)}, which lacks it; save the model again")
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
        if (shard := SHARD.search(path.name)) and int(shard[1]) > 1:
            raise CheckpointError(f"{path} is one of {int(shard[1])} shards; pass its folder, or the index beside it")
        return path
    if not path.is_dir():
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise CheckpointError(f"{path} is neither a folder nor a file{where}; download the model first and pass its folder")
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
    if adapters := sorted(file.parent.name for file in path.glob("*/adapter_config.json")):  # where PEFT saves those with a name
        raise CheckpointError(f"{path} holds PEFT adapters in folders of their own; pass one of them: {', '.join(adapters)}")
    raise CheckpointError(f"{path} holds none of {', '.join(WEIGHTS)}; {_instead(path)}")


def _instead(folder: Path) -> str:
    """What to do about a folder that does not hold a model's weights: by what it holds."""
    names = sorted(file.name for file in folder.iterdir() if file.suffix in READERS)
    if shards := [name for name in names if SHARD.search(name)]:
        index = SHARD.sub(r".\2.index.json", shards[0])
        return f"it has shards ({shards[0]} …) without their index: download {index}"
    if names:
        return f"pass one of its files by name: {', '.join(names)}"
    if models := sorted(place.name for place in folder.iterdir() if place.is_dir() and holds_model(place)):
        return f"pass one of the models in it: {', '.join(models)}"
    if list(folder.glob("global_step*")):
        return "it is a checkpoint of DeepSpeed: make a model of it with its zero_to_fp32.py"
    if list(folder.glob("**/*.distcp")):
        return "it is a sharded checkpoint of FSDP: make a model of it with `accelerate merge-weights`"
    if others := sorted(file.name for file in folder.iterdir() if file.suffix in OTHER_FORMATS):
        return f"{others[0]} is of another format: download the model's weights as safetensors, or save them so with transformers"
    return "download the model's weights"


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
        if not os.path.isfile(path.parent / shard):
            raise CheckpointError(f"{path.parent / shard} is missing; {path.name} places {shown(name)} in it: download it")
    return weight_map
