"""The `.metadata` of a checkpoint that torch.distributed.checkpoint (DCP) wrote: which tensors there are, and where their parts
lie.

It is a pickle, and torch.distributed.checkpoint loads it as one, with whatever code it refers to. Here what it refers to is
looked up in a table: the few classes that torch writes become records without methods, types of numbers are torch's, and all
else is refused. So no code runs, neither the file's nor that of torch's classes.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from samerge_ext.checkpoints.files import MAX_DIMENSIONS, SAFETENSORS_DTYPES, check_relative, is_name
from samerge_ext.checkpoints.reading import MAX_JSON_BYTES, CheckpointError, cut, read_bytes, shown

# What training states call the model in them.
MODEL_KEYS = ("model", "module", "state_dict", "model_state_dict")
# Keys of Megatron-LM, which knows no path to a tensor.
OF_AN_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")
MOST_BESIDE = 1024  # parts of a tensor that have rows in common, as parts along its second dimension do


@dataclass(frozen=True)
class Part:
    """Numbers offsets … offsets + sizes of a tensor, along each dimension; ``nbytes`` of a file from ``begin`` on are what
    torch.save made of them."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    begin: int
    nbytes: int


@dataclass(frozen=True)
class Stored:
    """A tensor and its parts, which fill it; parts without numbers are left out."""

    dtype: torch.dtype
    shape: torch.Size
    parts: tuple[Part, ...]


def read_metadata(path: Path) -> dict[str, Stored]:
    """The tensors of the model in a checkpoint, by their names in it: those under one of `MODEL_KEYS`, wherever it is, or else
    those of the state dict itself. Other tensors (an optimizer's) and what is no tensor are no part of a model.

    Raises CheckpointError where the file is damaged, refers to anything but what torch.distributed.checkpoint writes, or does not
    describe whole tensors in the folder's files.
    """
    data = read_bytes(path, MAX_JSON_BYTES)
    try:
        content = _Unpickler(io.BytesIO(data)).load()
        tensors, paths = _tensors(content), _paths(content)
        names = _of_model({key: paths.get(key, (key,)) for key in tensors})
        places = _places(content, names.values())
        found = {name: _stored(name, tensors[key], places[key]) for name, key in names.items()}
    except _Refused as error:
        raise CheckpointError(
            f"{path} refers to {error}, which torch.distributed.checkpoint does not write for tensors, and code in a checkpoint "
            "is never run; where you trust its source, save the model's state dict by itself"
        ) from None
    except MemoryError:
        raise
    except (_Fault, CheckpointError) as error:
        raise CheckpointError(f"{path}: {error}; save the checkpoint again") from error
    except Exception as error:  # of any type, from a pickle of any bytes
        raise CheckpointError(
            f"{path} is cut off, damaged or not of torch.distributed.checkpoint ({cut(repr(error), 200)}); save it again"
        ) from error
    if not found:
        kinds = ", ".join(sorted({shown(place[0]) for place in paths.values() if place}))
        raise CheckpointError(
            f"{path} describes no model's tensors, but {cut(kinds, 200) or 'nothing'}; save the model's state dict, by itself or "
            "under the key 'model'"
        )
    return found


class _Refused(Exception):
    """What a pickle refers to and must not."""


class _Fault(Exception):
    """What is wrong with a tensor."""


class _Record:
    """An object of a class that torch writes, with its attributes as they are."""

    def __setstate__(self, state: Any) -> None:
        self.__dict__["state"] = state

    def get(self, name: str) -> Any:
        state = self.__dict__.get("state")
        return state.get(name) if isinstance(state, dict) else None


class _Tensor(_Record): ...


class _Properties(_Record): ...


class _Index(_Record): ...


def _alone(value: Any) -> Any:
    return value


def _joined(*parts: Any) -> str:
    return "/".join(map(str, parts))


_OF_METADATA, _OF_PLANS = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner"
_KNOWN: Mapping[tuple[str, str], type | Callable] = {
    (_OF_METADATA, "Metadata"): _Record,
    (_OF_METADATA, "TensorStorageMetadata"): _Tensor,
    (_OF_METADATA, "BytesStorageMetadata"): _Record,
    (_OF_METADATA, "TensorProperties"): _Properties,
    (_OF_METADATA, "ChunkStorageMetadata"): _Record,
    (_OF_METADATA, "MetadataIndex"): _Index,
    (_OF_METADATA, "StorageMeta"): _Record,
    (_OF_METADATA, "_MEM_FORMAT_ENCODING"): _alone,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Record,
    # What every rank wrote, which Megatron-LM keeps beside it all.
    (_OF_PLANS, "SavePlan"): _Record,
    (_OF_PLANS, "WriteItem"): _Record,
    (_OF_PLANS, "WriteItemType"): _alone,
    (_OF_PLANS, "TensorWriteData"): _Record,
    (_OF_PLANS, "BytesIOWriteData"): _Record,
    ("torch.serialization", "_get_layout"): _alone,
    ("torch", "Size"): tuple,
    ("pathlib", "PosixPath"): _joined,
    ("pathlib", "WindowsPath"): _joined,
    ("pathlib._local", "PosixPath"): _joined,  # of Python 3.13
    ("collections", "OrderedDict"): dict,
}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in SAFETENSORS_DTYPES.values()}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) not in _KNOWN:
            raise _Refused(cut(f"{module}.{name}"))
        return _KNOWN[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("objects beside it")


def _tensors(content: Any) -> dict[str, _Tensor]:
    """By the keys of the flattened state dict."""
    return {key: entry for key, entry in content.get("state_dict_metadata").items() if isinstance(entry, _Tensor)}


def _paths(content: Any) -> dict[str, tuple]:
    """Key of the flattened state dict -> the keys that lead there."""
    paths = content.get("planner_data")
    return {key: path for key, path in paths.items() if isinstance(path, tuple)} if isinstance(paths, dict) else {}


def _of_model(paths: Mapping[str, tuple]) -> dict[str, str]:
    """Name of a tensor in the model -> its key."""
    roots = {path[: depth + 1] for path in paths.values() for depth, part in enumerate(path[:-1]) if part in MODEL_KEYS}
    if not roots:
        return {key: key for key, path in paths.items() if len(path) == 1 and not OF_AN_OPTIMIZER.match(key)}
    root = min(roots, key=lambda root: (len(root), MODEL_KEYS.index(root[-1])))
    names: dict[str, str] = {}
    for key, path in paths.items():
        if path[: len(root)] == root:
            name = ".".join(map(str, path[len(root) :]))
            if name in names:
                raise _Fault(f"two tensors are called {shown(name)}")
            names[name] = key
    return names


def _places(content: Any, keys: Iterable[str]) -> dict[str, dict[tuple, _Record]]:
    """Key -> offsets of a part -> where it lies."""
    places: dict[str, dict[tuple, _Record]] = {key: {} for key in keys}
    for index, place in content.get("storage_data").items():
        if isinstance(index, _Index) and index.get("fqn") in places:
            places[index.get("fqn")][_numbers(index.get("offset"))] = place
    return places


def _stored(name: str, tensor: _Tensor, places: Mapping[tuple, _Record]) -> Stored:
    if not is_name(name):
        raise _Fault(f"{shown(name)} is no tensor's name")
    properties = tensor.get("properties").__dict__.get("state")
    dtype = properties[0] if isinstance(properties, tuple) else properties.get("dtype")
    if not isinstance(dtype, torch.dtype):
        raise _Fault(f"'{name}' is of no type that is known")
    shape = _numbers(tensor.get("size"))
    parts = []
    for chunk in tensor.get("chunks"):
        offsets, sizes = _numbers(chunk.get("offsets")), _numbers(chunk.get("sizes"))
        if len(offsets) != len(shape) or len(sizes) != len(shape):
            raise _Fault(f"a part of '{name}' has other dimensions than the tensor")
        if 0 not in sizes:
            parts.append(_part(name, offsets, sizes, places.get(offsets)))
    _check_whole(name, shape, parts)
    return Stored(dtype, torch.Size(shape), tuple(parts))


def _part(name: str, offsets: tuple[int, ...], sizes: tuple[int, ...], place: _Record | None) -> Part:
    if place is None:
        raise _Fault(f"it does not say where the part of '{name}' at {cut(str(list(offsets)))} lies")
    if place.get("transform_descriptors"):
        raise _Fault(f"'{name}' is written through {shown(place.get('transform_descriptors'))}, which is not read here")
    file, begin, nbytes = place.get("relative_path"), place.get("offset"), place.get("length")
    if not isinstance(file, str):
        raise _Fault(f"it does not say which file the part of '{name}' at {cut(str(list(offsets)))} lies in")
    check_relative(file, f"a part of '{name}' in")
    return Part(offsets, sizes, file, *_numbers((begin, nbytes)))


def _numbers(values: Any) -> tuple[int, ...]:
    """Sizes or offsets. Raises _Fault for anything else."""
    found = isinstance(values, tuple) and len(values) <= MAX_DIMENSIONS
    if not found or any(type(n) is not int or not 0 <= n < 2**60 for n in values):
        raise _Fault(f"{shown(values)} are no sizes")
    return values


def _check_whole(name: str, shape: tuple[int, ...], parts: list[Part]) -> None:
    """Parts lie within the tensor, have as many numbers as it and none in common: they fill it."""
    if sum(math.prod(part.sizes) for part in parts) != math.prod(shape):
        raise _Fault(f"the parts of '{name}' do not have the numbers of {cut(str(list(shape)))}")
    beside: list[Part] = []
    for part in sorted(parts, key=lambda part: part.offsets):
        if any(offset + size > whole for offset, size, whole in zip(part.offsets, part.sizes, shape, strict=True)):
            raise _Fault(f"a part of '{name}' lies outside of {cut(str(list(shape)))}")
        beside = [other for other in beside if not shape or other.offsets[0] + other.sizes[0] > part.offsets[0]]
        if any(_overlap(part, other) for other in beside):
            raise _Fault(f"two parts of '{name}' have numbers in common")
        beside.append(part)
        if len(beside) > MOST_BESIDE:
            raise _Fault(f"more than {MOST_BESIDE} parts of '{name}' have rows in common")


def _overlap(a: Part, b: Part) -> bool:
    each = zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)
    return all(first < second + width and second < first + size for first, size, second, width in each)
