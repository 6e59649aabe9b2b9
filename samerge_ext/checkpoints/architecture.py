"""What transformers knows of a folder's architecture, where it is installed: other names of its tensors, and those it ignores."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from samerge_ext.checkpoints.folder import read_config
from samerge_ext.checkpoints.naming import is_derived_buffer
from samerge_ext.checkpoints.places import folder_of


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
        module = _empty(folder_of(folder), next(iter(config.get("architectures") or ()), ""))
        ignored = tuple(map(re.compile, getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()))
        return cls(_renaming(module), ignored, ties)

    def ignores(self, name: str, shape: torch.Size) -> bool:
        """Whether a tensor is a buffer that the model makes for itself, or one that is not loaded."""
        return is_derived_buffer(name, shape) or any(pattern.search(name) for pattern in self.ignored)


def _empty(folder: Path, architecture: str) -> Any:
    """A model of a folder's class without memory; None where transformers has no such class or makes none of its config.json."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
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
