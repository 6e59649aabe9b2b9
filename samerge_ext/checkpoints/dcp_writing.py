"""Model folders as checkpoints of torch.distributed.checkpoint (DCP), for those who train on with FSDP; torch writes them."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex

from samerge_ext.checkpoints.companions import Companions, without_quantisation
from samerge_ext.checkpoints.folder import Checkpoint, open_checkpoint
from samerge_ext.checkpoints.locks import partial_of
from samerge_ext.checkpoints.places import folder_of
from samerge_ext.checkpoints.reading import naming, read_json
from samerge_ext.checkpoints.saving import (
    no_space,
    out_of_space,
    replace_folder,
    require_apart,
    require_space,
    require_target,
    sync,
)


def save_dcp(model: str | Path, out_folder: str | Path, *, key: str | None = "model", overwrite: bool = False) -> Path:
    """Writes a model folder, or weight file, as a DCP checkpoint: what torch.distributed.checkpoint.load reads, in any number of
    processes and however they shard, into a state dict {key: module.state_dict()}.

    The folder has .metadata, a .distcp file for every tensor, and beside them the model's configuration, tokenizer and so on. It
    appears whole or not at all. Tensors have the names and types of the model's files, where tied ones may be stored once;
    quantised ones are dequantised.

    key: that the state dict is under; None for the state dict by itself. overwrite: replaces a model folder.

    Memory: one tensor. Returns the folder. Raises CheckpointError, before anything is written, for a model that cannot be read
    and a target that is taken, and for a full disk.
    """
    target = Path(os.path.realpath(out_folder))
    require_target(target, overwrite=overwrite)
    with open_checkpoint(model) as checkpoint:
        require_apart(target, [model, *checkpoint.files])
        companions = Companions(folder_of(model))
        companions.check()
        sizes = [checkpoint.shape(name).numel() * checkpoint.dtype(name).itemsize for name in checkpoint.names]
        require_space(target, sum(sizes))
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial_of(target, folder=True) as partial:
            try:
                _save(checkpoint, partial, key)
                companions.copy(partial)
                _without_quantisation(partial / "config.json")
                for path in (*partial.rglob("*"), partial):
                    sync(path)
                replace_folder(partial, target, overwrite=overwrite)
            except OSError as error:
                if out_of_space(error):
                    raise no_space(target, sum(sizes)) from error
                with naming(target):
                    raise
        sync(target.parent)
    return Path(out_folder)


def _save(checkpoint: Checkpoint, folder: Path, key: str | None) -> None:
    tensors = {
        name: torch.empty(checkpoint.shape(name), dtype=checkpoint.dtype(name), device="meta") for name in checkpoint.names
    }
    # torch holds all tensors of a file until it is written, and where there is a GPU looks ahead for tensors on it.
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=False, per_thread_copy_ahead=0)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
            dcp.save(
                tensors if key is None else {key: tensors},
                storage_writer=writer,
                planner=_OneByOne(checkpoint, key),
                no_dist=True,
            )
    except CheckpointException as error:  # which holds what went wrong as data
        (cause, _), *_ = error.failures.values()
        raise cause from None


class _OneByOne(DefaultSavePlanner):
    """Plans with tensors that have shapes and no memory; each is read when it is written."""

    def __init__(self, checkpoint: Checkpoint, key: str | None):
        super().__init__()
        self._checkpoint, self._prefix = checkpoint, "" if key is None else f"{key}."

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._checkpoint.read(index.fqn.removeprefix(self._prefix))


def _without_quantisation(config: Path) -> None:
    """Of tensors that are written dequantised."""
    if config.is_file():
        content = read_json(config)
        if (plain := without_quantisation(content)) != content:
            config.write_text(json.dumps(plain, indent=2), encoding="utf-8")
