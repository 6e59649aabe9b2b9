"""Where tensors come from: modules, state dicts and checkpoint folders, read one tensor at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from samerge_ext.checkpoints.folder import Checkpoint
from samerge_ext.checkpoints.naming import is_derived_buffer

# Running statistics of normalisation layers, as state dicts and checkpoints name them.
STATISTICS = ("*running_mean", "*running_var")


class Source(ABC):
    """Named tensors of one model.

    label: what messages call it.
    names: every stored tensor once, in order.
    aliases: other name of a tied tensor -> the name it is stored under; every method takes both.
    files: what it is read from.
    """

    label: str
    names: tuple[str, ...]
    aliases: dict[str, str]
    files: tuple[Path, ...] = ()
    _stored: Container[str]

    def __contains__(self, name: str) -> bool:
        return name in self.aliases or name in self._stored

    def shape(self, name: str) -> torch.Size:
        return self._shape(self.aliases.get(name, name))

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype(self.aliases.get(name, name))

    def read(self, name: str) -> Tensor:
        return self._read(self.aliases.get(name, name))

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Numbers ``start`` … of a tensor, flattened, into ``out`` [n] of its type, contiguous and on the CPU."""
        self._read_into(self.aliases.get(name, name), start, out)

    def stored_name(self, name: str) -> str:
        """What a tensor is called where it is stored."""
        return self.aliases.get(name, name)

    def weight_dtype(self, name: str) -> torch.dtype:
        """The type that the model keeps a tensor in; `dtype` may be wider, where the tensor is computed when it is read."""
        return self.dtype(name)

    def read_shaped(self, name: str, shape: torch.Size) -> Tensor:
        """As `read`; raises ValueError where the tensor has another shape than it had when it was packed."""
        if (found := self.shape(name)) != shape:
            raise ValueError(f"{self.label}: '{name}' was {list(shape)} when packed and is {list(found)} now")
        return self.read(name)

    def is_buffer(self, name: str) -> bool:
        """Whether a tensor is a buffer. Without its module: integers, running statistics, and what a model makes for itself."""
        return not self.dtype(name).is_floating_point or matches(name, STATISTICS) or is_derived_buffer(name, self.shape(name))

    @abstractmethod
    def _shape(self, name: str) -> torch.Size: ...

    @abstractmethod
    def _dtype(self, name: str) -> torch.dtype: ...

    @abstractmethod
    def _read(self, name: str) -> Tensor: ...

    def _read_into(self, name: str, start: int, out: Tensor) -> None:
        out.copy_(self._read(name).reshape(-1)[start : start + out.numel()])


class _Held(Source):
    """Tensors that are in memory already."""

    _stored: dict[str, Tensor]

    def _shape(self, name: str) -> torch.Size:
        return self._stored[name].shape

    def _dtype(self, name: str) -> torch.dtype:
        return self._stored[name].dtype

    def _read(self, name: str) -> Tensor:
        return self._stored[name].detach()


class ModuleSource(_Held):
    """The parameters and persistent buffers of a module."""

    def __init__(self, module: nn.Module, label: str):
        self.label = label
        parameters = dict(module.named_parameters())
        stored_as = {id(p): name for name, p in parameters.items()}
        everything = module.named_parameters(remove_duplicate=False)
        self.aliases = {name: stored_as[id(p)] for name, p in everything if name not in parameters}
        persistent = module.state_dict(keep_vars=True).keys()
        self._buffers = {name: b for name, b in module.named_buffers() if name in persistent}
        self._stored = {**parameters, **self._buffers}
        self.names = tuple(self._stored)

    def is_buffer(self, name: str) -> bool:
        return name in self._buffers


class StateDictSource(_Held):
    """A state dict."""

    def __init__(self, tensors: Mapping[str, Tensor], label: str):
        self.label = label
        self.aliases = {}
        self._stored = {}
        first_at: dict[tuple, str] = {}
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{label}: '{name}' is a {type(tensor).__name__}, not a tensor; pass module.state_dict()")
            where = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if tensor.numel() and where in first_at:
                self.aliases[name] = first_at[where]
            else:
                first_at[where] = name
                self._stored[name] = tensor
        self.names = tuple(self._stored)


class CheckpointSource(Source):
    """A model folder, opened as a `folder.Checkpoint`."""

    def __init__(self, checkpoint: Checkpoint, label: str):
        self.label = f"{label} ({checkpoint.path})"
        self.names = checkpoint.names
        self.aliases = dict(checkpoint.tied)
        self._stored = frozenset(checkpoint.names)
        self.files, self._checkpoint = checkpoint.files, checkpoint

    def _shape(self, name: str) -> torch.Size:
        return self._checkpoint.shape(name)

    def _dtype(self, name: str) -> torch.dtype:
        return self._checkpoint.dtype(name)

    def weight_dtype(self, name: str) -> torch.dtype:
        return self._checkpoint.weight_dtype(self.aliases.get(name, name))

    def _read(self, name: str) -> Tensor:
        return self._checkpoint.read(name)

    def _read_into(self, name: str, start: int, out: Tensor) -> None:
        self._checkpoint.read_into(name, start, out)


# Tasks and the models that were fine-tuned for them.
Experts = Sequence[tuple[str, Source]]


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a tensor's name fits one of the shell-style patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)
