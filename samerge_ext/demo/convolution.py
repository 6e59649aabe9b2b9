"""A small convolutional text classifier: an expert that shares nothing with the encoder but its task.

Words are hashed into a table of embeddings that are trained from scratch; there is no tokenizer, no attention and no
pretrained weight. Its logits are those of a linear layer over the largest responses of its filters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from zlib import crc32

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, max_pool1d

from samerge_ext.checkpoints.saving import atomic_write
from samerge_ext.demo.data import Split, Task


@dataclass(frozen=True)
class Convolution:
    """How the classifier is built and trained: epochs of Adam on the task's labelled training texts."""

    buckets: int = 1 << 14
    width: int = 64
    filters: int = 96
    spans: tuple[int, ...] = (1, 2, 3)  # words that a filter sees
    max_words: int = 64
    dropout: float = 0.5
    epochs: int = 6
    batch: int = 32
    learning_rate: float = 2e-3


class TextConvolution(nn.Module):
    """words [B, S] int64, 0 where a text has ended -> logits [B, classes]."""

    def __init__(self, classes: int, settings: Convolution):
        super().__init__()
        self.embeddings = nn.Embedding(settings.buckets, settings.width, padding_idx=0)
        self.convolutions = nn.ModuleList(nn.Conv1d(settings.width, settings.filters, span) for span in settings.spans)
        self.dropout = nn.Dropout(settings.dropout)
        self.head = nn.Linear(settings.filters * len(settings.spans), classes)

    def forward(self, words: Tensor) -> Tensor:
        embedded = self.embeddings(words).transpose(1, 2)  # [B, width, S]
        responses = [torch.relu(convolution(embedded)) for convolution in self.convolutions]
        largest = [max_pool1d(response, response.shape[-1]).squeeze(-1) for response in responses]  # [B, filters] each
        return self.head(self.dropout(torch.cat(largest, 1)))


def hashed(texts: Sequence[str], settings: Convolution) -> Tensor:
    """words [B, S] int64: each word's bucket, 1 … buckets − 1; S is at least the longest span."""
    rows = [
        [1 + crc32(word.encode()) % (settings.buckets - 1) for word in re.findall(r"\w+|[^\w\s]", text.lower())] for text in texts
    ]
    length = max(max(settings.spans), *(min(len(row), settings.max_words) for row in rows))
    words = torch.zeros(len(rows), length, dtype=torch.int64)
    for i, row in enumerate(rows):
        words[i, : len(row)] = torch.tensor(row[:length], dtype=torch.int64)
    return words


def train(task: Task, settings: Convolution, seed: int) -> TextConvolution:
    """The classifier after its epochs on ``task.train``; ``seed`` picks its start, its dropout and the batches."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        module = TextConvolution(task.classes, settings).train()
        optimizer = torch.optim.Adam(module.parameters(), lr=settings.learning_rate)
        labels = torch.tensor(task.train.labels)
        for _ in range(settings.epochs):
            for chunk in torch.randperm(len(task.train)).split(settings.batch):
                logits = module(hashed([task.train.texts[i] for i in chunk.tolist()], settings))
                optimizer.zero_grad()
                cross_entropy(logits, labels[chunk]).backward()
                optimizer.step()
    return module.eval()


def cached(task: Task, settings: Convolution, seed: int, folder: Path) -> TextConvolution:
    """The trained classifier, from its file or trained now; the file's name holds a digest of all it was made from."""
    recipe = [asdict(settings), task.name, task.descriptions, asdict(task.train), seed]
    digest = sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    path = folder / f"convolution-{task.name}-seed{seed}-{digest}.safetensors"
    if not path.exists():
        state = {name: tensor.contiguous() for name, tensor in train(task, settings, seed).state_dict().items()}
        with atomic_write(path) as file:
            file.write(save(state))
    module = TextConvolution(task.classes, settings)
    module.load_state_dict(load_file(path))
    return module.eval()


@torch.inference_mode()
def accuracy(module: TextConvolution, split: Split, settings: Convolution, size: int = 64) -> float:
    """Share of the split's texts whose highest logit is their class."""
    correct = 0
    for start in range(0, len(split), size):
        words = hashed(split.texts[start : start + size], settings)
        correct += (module(words).argmax(-1) == torch.tensor(split.labels[start : start + size])).sum().item()
    return correct / len(split)
