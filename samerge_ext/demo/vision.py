"""EfficientNet-Lite0 fine-tuned on one task of pictures each, with frozen heads, and what the cells of the vision study share.

A task's head is the mean of the *pretrained* encoder's features over each class's training pictures, of unit length, times SCALE.
Everything else is fine-tuned: kernels, and BatchNorm's weights and biases.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from tqdm import tqdm

from samerge_ext.checkpoints.locks import partial_of
from samerge_ext.demo.corpora import PINS
from samerge_ext.demo.efficientnet import PACKAGE, EfficientNet, load_efficientnet
from samerge_ext.demo.experts import Evaluator, Heads, batch_order, learning_rate_share
from samerge_ext.demo.pictures import PictureSplit, PictureTask, load_picture_tasks
from samerge_ext.demo.workbench import Bench

JUDGED = 50  # pictures in a batch
# Normalised by the batch, an expert's features begin far from its head: a small rate does not bring them back in fifty steps.
OWN_STATISTICS_RATE = 1e-3


@dataclass(frozen=True)
class VisionProtocol:
    """How pictures are drawn and experts are made.

    side: of the pictures, in pixels. pictures: of each split of a task at most.
    own_statistics: BatchNorm normalises by the batch while an expert learns, and its running statistics follow; else they are the
        pretrained ones throughout, and the same in all experts.
    The rest: as of `experts.Protocol`.
    """

    name: str
    tasks: tuple[str, ...]
    side: int
    pictures: dict[str, int] = field(hash=False)
    steps: int
    batch: int
    learning_rate: float
    own_statistics: bool = False
    warmup: int = 5
    weight_decay: float = 0.01
    gradient_norm: float = 1.0


SMALL = VisionProtocol(
    "small",
    tasks=("fashion", "digits", "defects", "wafers", "emoji", "scripts"),
    side=64,
    pictures={"train": 1000, "tuning": 64, "calibration": 128, "test": 200},
    steps=50,
    batch=32,
    learning_rate=3e-4,
)


def encode(module: nn.Module, pictures: Tensor) -> Tensor:
    """uint8 [B, 3, S, S] -> features [B, 1280] of unit length."""
    # The convolutions are half as fast again where channels lie side by side.
    values = (pictures.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
    return normalize(module(values), dim=-1)


def channels_last(module: EfficientNet) -> EfficientNet:
    """The module with its kernels as `encode` lays pictures out."""
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
    return module


class PictureEvaluator(Evaluator):
    """`Evaluator` of pictures: uint8 [N, 3, S, S] and labels [N] of each task."""

    encode = staticmethod(encode)

    def __init__(self, splits: dict[str, PictureSplit], heads: Heads, what: str, progress: bool = False):
        self.heads, self.what, self.progress = heads, what, progress
        self.batches = {
            task: list(zip(split.pictures.split(JUDGED), split.labels.split(JUDGED), strict=True))
            for task, split in splits.items()
        }


class VisionBench(Bench):
    """What the cells of one seed share. The seed varies experts (order of their batches) and the calibration pictures."""

    encode = staticmethod(encode)

    def __init__(self, protocol: VisionProtocol, seed: int, cache: Path, progress: bool = True):
        super().__init__(protocol, seed, Path(cache) / "vision", progress)

    @cached_property
    def tasks(self) -> dict[str, PictureTask]:
        return load_picture_tasks(self.protocol.tasks, self.protocol.side, self.protocol.pictures)

    @cached_property
    def heads(self) -> Heads:
        return build_heads(self.tasks)

    @cached_property
    def base(self) -> Path:
        folder = self.cache / f"base-{PINS[PACKAGE]}"
        if not folder.exists():
            save_folder(load_efficientnet(), folder)
        return folder

    def expert(self, task: str) -> Path:
        folder = self.expert_path(task)
        if not folder.exists():
            save_folder(fine_tune(self.tasks[task], self.heads, self.protocol, self.seed, self.progress), folder)
        return folder

    def expert_path(self, task: str) -> Path:
        """Named after all that the expert is made from."""
        recipe = asdict(self.protocol) | {"tasks": task, "seed": self.seed, "backbone": PINS[PACKAGE]}
        digest = sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
        return self.cache / "experts" / f"{task}-seed{self.seed}-{digest}"

    def load(self, folder: Path) -> EfficientNet:
        from safetensors.torch import load_file

        module = EfficientNet()
        module.load_state_dict(load_file(folder / "model.safetensors"))
        return channels_last(module).eval()

    def with_own_statistics(self) -> VisionBench:
        """The same of experts with BatchNorm statistics of their own."""
        other = self.at_seed(self.seed)
        other.protocol = replace(self.protocol, own_statistics=True, learning_rate=OWN_STATISTICS_RATE)
        return other

    def evaluator(self, split: str) -> PictureEvaluator:
        splits = {name: getattr(task, split) for name, task in self.tasks.items()}
        return PictureEvaluator(splits, self.heads, f"{split} pictures", self.progress)

    def calibration(self, samples: int, batch: int) -> dict[str, list[Tensor]]:
        drawn = torch.Generator().manual_seed(self.seed)
        found = {}
        for name, task in self.tasks.items():
            chosen = torch.randperm(len(task.calibration), generator=drawn)[:samples]
            found[name] = list(task.calibration.pictures[chosen].split(batch))
        return found


@torch.no_grad()
def build_heads(tasks: dict[str, PictureTask]) -> Heads:
    """Each class's mean feature over the task's training pictures, of unit length."""
    backbone = channels_last(load_efficientnet())
    prototypes = {}
    for name, task in tasks.items():
        features = torch.cat([encode(backbone, pictures) for pictures in task.train.pictures.split(JUDGED)])
        means = [features[task.train.labels == label].mean(0) for label in range(len(task.classes))]
        prototypes[name] = normalize(torch.stack(means), dim=-1)
    return Heads(prototypes)


def fine_tune(task: PictureTask, heads: Heads, protocol: VisionProtocol, seed: int, progress: bool = False) -> EfficientNet:
    """An expert: the backbone after ``protocol.steps`` steps of AdamW on ``task.train``; ``seed`` picks the batches."""
    module = channels_last(load_efficientnet()).train(protocol.own_statistics)
    trained = list(module.parameters())
    optimizer = torch.optim.AdamW(trained, lr=protocol.learning_rate, weight_decay=protocol.weight_decay)
    share = lambda step: learning_rate_share(step, protocol.steps, protocol.warmup)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    order = batch_order(len(task.train), protocol.steps, protocol.batch, seed)
    for indices in tqdm(order, desc=f"expert '{task.name}'", unit="step", leave=False, disable=not progress):
        logits = heads(encode(module, task.train.pictures[indices]), task.name)
        loss = cross_entropy(logits, task.train.labels[indices])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, protocol.gradient_norm)
        optimizer.step()
        schedule.step()
    return module.eval()


def save_folder(module: EfficientNet, folder: Path) -> None:
    """Writes model.safetensors under a temporary name, then renames the folder."""
    from safetensors.torch import save_file

    folder.parent.mkdir(parents=True, exist_ok=True)
    with partial_of(folder, folder=True) as partial:
        save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, partial / "model.safetensors")
        if not folder.exists():  # another process may have finished the same expert meanwhile
            partial.rename(folder)
