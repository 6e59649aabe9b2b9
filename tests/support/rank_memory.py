"""A merge from a packed file that learns coefficients of components, in a process of its own, where their factors are as many
numbers as the task vectors: prints [planned, measured, planned without components] bytes."""

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import samerge_ext as sm
from samerge_ext.budget.plan import plan
from samerge_ext.memory import PeakMemory, resident_bytes, trim_heap

ROWS, WIDTH, TASKS = 400_000, 16, "abc"
SLACK = 1.01  # what the process takes before a plan is not the same to the byte


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.body = nn.Embedding(ROWS, WIDTH), nn.Linear(WIDTH, 8)

    def forward(self, tokens):
        return self.body(self.table(tokens).mean(1))


def write(folder):
    """Base and experts; returns their files."""
    torch.manual_seed(0)
    paths = {name: folder / f"{name}.safetensors" for name in ("base", *TASKS)}
    tensors = {name: tensor.detach().clone() for name, tensor in Model().named_parameters()}
    for path in paths.values():
        save_file(tensors, path)
        tensors = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in tensors.items()}
    return paths.pop("base"), paths


def main():
    with tempfile.TemporaryDirectory() as folder:
        models = write(Path(folder))
        packed = sm.PackedWeights.from_folders(*models, file=Path(folder) / "packed")
        with sm.models.parameters_on_meta():
            module = Model()
        batches = {task: [torch.randint(ROWS, (4, 5)) for _ in range(2)] for task in TASKS}

        def logits(module, batch, task):
            return module(batch)

        trim_heap()
        settings = {"steps": 2, "progress": False}
        components = {**settings, "granularity": "rank", "rank": WIDTH}
        without, planned = (
            plan(module, packed, batches, logits, sm.SAMergingConfig(**config)).ways[-1].device_bytes
            for config in (settings, components)
        )
        config = sm.SAMergingConfig(**components, memory_budget=int(SLACK * planned))
        before = resident_bytes()
        with PeakMemory() as peak:
            result = sm.samerging(module, packed, batches, logits, config=config)
        assert result.merged is None
    print(json.dumps([int(SLACK * planned), before + peak.rise, without]))


if __name__ == "__main__":
    main()
