"""What packing folders takes beyond the packed weights."""

from pathlib import Path

import torch
from processes import give_freed_tensors_back, in_a_process
from safetensors.torch import save_file

import samerge_ext as sm
from samerge_ext.memory import PeakMemory

MEGA = 1 << 20
LAYERS = 16
TENSOR = 8  # MiB of a layer in fp32
EXPERTS = "abc"


def write_models(folder: Path) -> None:
    """In large and small."""
    for size, layers in {"large": LAYERS, "small": 1}.items():
        for seed, name in enumerate(("base", *EXPERTS)):
            torch.manual_seed(seed)
            (folder / size / name).mkdir(parents=True)
            tensors = {f"layer{i}": torch.randn(TENSOR * MEGA // 4) for i in range(layers)}
            save_file(tensors, folder / size / name / "model.safetensors")


def beyond_the_store(folder: Path, form: torch.dtype | str) -> float:
    """MiB, in a process of its own."""
    return in_a_process(_beyond_the_store, folder, form)


def _beyond_the_store(folder: Path, form: torch.dtype | str) -> float:
    """Of the large model, after the small one: what the libraries map of their files when code first runs is there by then."""
    give_freed_tensors_back()
    for size in ("small", "large"):
        experts = {task: folder / size / task for task in EXPERTS}
        with PeakMemory() as peak:
            packed = sm.PackedWeights.from_folders(folder / size / "base", experts, dtype=torch.bfloat16, task_vector_dtype=form)
    return (peak.rise - packed.base.nbytes - packed.task_vectors.nbytes) / MEGA
