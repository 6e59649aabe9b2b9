"""What transformers knows of a folder's architecture, where it is installed: other names of its tensors, and those it ignores."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from samerge_ext.checkpoints.folder import open_checkpoint, read_config
from samerge_ext.checkpoints.naming import is_derived_buffer
from samerge_ext.checkpoints.places import folder_of
from samerge_ext.checkpoints.reading import CheckpointError, shown
from samerge_ext.checkpoints.settings import Settings, leaf_of, model_settings

# What a config.json counts modules by, of which each has tensors, and what it measures them by.
COUNTS = re.compile(r"(layers?|depths?|blocks|experts)$")
SIZES = re.compile(r"(size|dim|heads|positions?|embeddings|ctx|channels|width|n_embd|n_inner|d_\w+)$")
MAX_COUNT, MAX_SIZE = 1024, 2**27


@dataclass(frozen=True)
class Architecture:
    """rename: stored name -> the module's, None where it is not known. ignored: patterns of tensors that are not loaded.
    ties: whether one tensor may stand for embeddings and head."""

    rename: Callable[[str], str] | None = None
    ignored: tuple[re.Pattern, ...] = ()
    ties: bool = True

    @classmethod
    def of_folder(cls, folder: str | Path) -> Architecture:
        """What config.json of a model folder names; without transformers, or for remote code, its tables are not known."""
        if not (folder_of(folder) / "config.json").is_file():
            return cls()
        config = read_config(folder)
        ties = config.get("tie_word_embeddings") is not False
        if find_spec("transformers") is None:
            return cls(ties=ties)
        module = _empty(folder, named_architecture(config) or "")
        ignored = tuple(map(re.compile, getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()))
        return cls(_renaming(module), ignored, ties)

    def ignores(self, name: str, shape: torch.Size) -> bool:
        """Whether a tensor is a buffer that the model makes for itself, or one that is not loaded."""
        return is_derived_buffer(name, shape) or any(pattern.search(name) for pattern in self.ignored)


def named_architecture(config: Mapping[str, Any]) -> str | None:
    """The first class that a config.json names."""
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None


@contextmanager
def bounded_by_tensors(path: str | Path, name: str = "config.json", settings: Settings | None = None) -> Iterator[None]:
    """A model that is made inside of a folder's config.json is not larger than one whose weights the folder holds: what a line of
    the file says may take hours and all memory.

    name, settings: of another file in the folder than config.json, and what it says.

    Raises CheckpointError where it counts more layers than tensors are stored, or measures them by what no tensor is, or has
    several times as many parameters.
    """
    stored = _number_of_tensors(path)
    config, most = folder_of(path) / name, max(MAX_COUNT, stored)
    for key, value in (model_settings(read_config(path)) if settings is None else settings).items():
        numbers = [n for n in (value if isinstance(value, list) else [value]) if isinstance(n, int | float)]
        bounds = [most] * bool(COUNTS.search(leaf_of(key))) + [MAX_SIZE] * bool(SIZES.search(leaf_of(key)))
        if numbers and bounds and sum(numbers) > min(bounds):
            raise CheckpointError(
                f"{config}: {key} is {shown(value)}, and the folder has {stored} tensors; download the file that belongs to them"
            )
    register, registered = nn.Module.register_parameter, 0

    def counting(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        nonlocal registered
        registered += 1
        if registered > 4 * most:  # a tensor on disk may be several of the module's
            raise CheckpointError(f"{config} is of a model of more than {4 * most} tensors, and the folder has {stored} tensors")
        register(self, name, param)

    nn.Module.register_parameter = counting  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _number_of_tensors(path: str | Path) -> int:
    """In the headers of a model folder, or of that which a weight file is in; 0 where there are none to read."""
    for place in (path, folder_of(path)):
        try:
            with open_checkpoint(place, beside_adapter=True) as checkpoint:
                return len(checkpoint.names) + len(checkpoint.tied)
        except CheckpointError:  # a shard by itself
            continue
    return 0


def _empty(path: str | Path, architecture: str) -> Any:
    """A model of a folder's class without memory; None where transformers has no such class or makes none of its config.json."""
    import transformers

    try:
        with bounded_by_tensors(path), torch.device("meta"):
            config = transformers.AutoConfig.from_pretrained(folder_of(path), local_files_only=True, trust_remote_code=False)
            return getattr(transformers, architecture)._from_config(config)
    except Exception:  # of any type: a config.json may hold anything, and general rules are left
        return None


def _renaming(module: Any) -> Callable[[str], str] | None:
    """What a stored name is called in a module, by transformers' tables; None where it has none, as before version 5."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, apply_renamings
    except ImportError:
        return None
    if module is None:
        return None
    renamings = [each for each in get_model_conversion_mapping(module) if isinstance(each, WeightRenaming)]
    return lambda name: apply_renamings(name, renamings)
