"""A merge of small bodies and large heads that are learned, in a process of its own: prints [planned, measured, planned without
heads] bytes."""

import json
import tempfile

import torch
from torch import nn

import samerge_ext as sm
from samerge_ext.budget.plan import plan
from samerge_ext.memory import peak_resident_bytes

CLASSES, WIDTH, TASKS = 60_000, 64, "ab"


class Model(nn.Module):
    def __init__(self, classes=2):
        super().__init__()
        self.body, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, classes, bias=False)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


def main():
    torch.manual_seed(0)
    base, experts = Model(), {task: Model(CLASSES) for task in TASKS}
    packed = sm.PackedWeights.from_modules(base, experts, heads="head.*")
    del experts
    batches = {task: [torch.randn(1, WIDTH) for _ in range(4)] for task in TASKS}

    def logits(module, batch, task):
        return module(batch)

    with tempfile.TemporaryDirectory() as folder:
        settings = {"steps": 2, "progress": False, "checkpoint_dir": folder, "checkpoint_every": 1, "measure_every": 1}
        without, planned = (
            plan(Model(), packed, batches, logits, sm.SAMergingConfig(train_heads=patterns)).ways[0].device_bytes
            for patterns in ((), "head.*")
        )
        config = sm.SAMergingConfig(train_heads="head.*", memory_budget="1TB", **settings)
        sm.samerging(Model(), packed, batches, logits, config=config)
    print(json.dumps([planned, peak_resident_bytes(), without]))


if __name__ == "__main__":
    main()
