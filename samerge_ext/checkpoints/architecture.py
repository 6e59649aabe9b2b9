"""What transformers knows of a folder's architecture, where it is installed: other names of its tensors, and those it ignores."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from samerge_ext.checkpoints.files import folder_of
from samerge_ext.checkpoints.folder import read_config
from samerge_ext.checkpoints.naming import is_derived_buffer


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
        import transformers
        from transformers.core_model_loading import apply_renamings

        module = getattr(transformers, next(iter(config.get("architectures") or ()), ""), None)
        ignored = tuple(map(re.compile, getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()))
        renamings = _renamings(folder_of(folder), module, config)
        return cls((lambda name: apply_renamings(name, renamings)) if renamings else None, ignored, ties)

    def ignores(self, name: str, shape: torch.Size) -> bool:
        """Whether a tensor is a buffer that the model makes for itself, or one that is not loaded."""
        return is_derived_buffer(name, shape) or any(pattern.search(name) for pattern in self.ignored)


def _renamings(folder: Path, architecture: Any, config: dict) -> list:
    """transformers' renamings of stored names, each for its part of a model; those of the type alone where there is no model."""
    import transformers
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    try:
        with torch.device("meta"):
            module = architecture(transformers.AutoConfig.from_pretrained(folder, local_files_only=True))
        conversions = get_model_conversion_mapping(module)
    except (AttributeError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError):
        conversions = get_checkpoint_conversion_mapping(config.get("model_type", "")) or ()
    return [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
