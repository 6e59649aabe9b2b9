"""Checkpoints as torch.distributed.checkpoint writes them in one process."""

import warnings

import torch
import torch.distributed.checkpoint as dcp


def tensors(seed=0):
    """Of several types and shapes: a scalar, none at all, and one whose rows do not lie one after the other."""
    torch.manual_seed(seed)
    return {
        "layers.0.weight": torch.randn(7, 5),
        "layers.0.bias": torch.randn(7, dtype=torch.bfloat16),
        "turned": torch.randn(6, 4).t(),
        "part": torch.randn(20, 3)[4:9],
        "scale": torch.tensor(2.5, dtype=torch.float64),
        "ids": torch.arange(5),
        "none": torch.empty(0, 3),
    }


def save(state, folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, storage_writer=dcp.FileSystemWriter(folder, **options), no_dist=True)
    return folder
