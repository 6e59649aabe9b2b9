"""What packing folders takes beyond the packed weights, measured in a process of its own.

    python tests/support/packing_memory.py FOLDER FORM     # prints MiB; FORM: bfloat16 or one of the quantised ones
"""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import samerge_ext as sm
from samerge_ext.memory import PeakMemory

MEGA = 1 << 20
LAYERS = 16
TENSOR = 8  # MiB of a layer in fp32


def write_models(folder: Path) -> None:
    for seed, name in enumerate(("base", "a", "b", "c")):
        torch.manual_seed(seed)
        (folder / name).mkdir()
        save_file({f"layer{i}": torch.randn(TENSOR * MEGA // 4) for i in range(LAYERS)}, folder / name / "model.safetensors")


def beyond_the_store(folder: Path, form: str) -> float:
    """MiB."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576"}  # freed tensors go back to the system at once
    command = [sys.executable, __file__, folder, form]
    return float(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


def main(folder: str, form: str) -> None:
    """The second time: what the libraries map of their files when code first runs is there by then."""
    experts = {task: Path(folder) / task for task in "abc"}
    dtypes = {"dtype": torch.bfloat16, "task_vector_dtype": torch.bfloat16 if form == "bfloat16" else form}
    for _ in range(2):
        packed = None
        with PeakMemory() as peak:
            packed = sm.PackedWeights.from_folders(Path(folder) / "base", experts, **dtypes)
    print((peak.rise - packed.base.nbytes - packed.task_vectors.nbytes) / MEGA)


if __name__ == "__main__":
    main(*sys.argv[1:])
