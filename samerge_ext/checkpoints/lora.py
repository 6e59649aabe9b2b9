"""LoRA adapters, as PEFT saves them, as experts: base + scaling · B A, one tensor at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from samerge_ext.checkpoints.files import CheckpointError, SafetensorsFile
from samerge_ext.checkpoints.folder import open_checkpoint, read_json
from samerge_ext.checkpoints.sources import CheckpointSource, Source

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT wraps the model that it adapts twice
# How a pair of factors is named, and whether their product is the transpose of the weight's change.
FACTORS = {("lora_A.weight", "lora_B.weight"): False, ("lora_embedding_A", "lora_embedding_B"): True}


def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (Path(path) / CONFIG).is_file()


@contextmanager
def open_expert(path: str | Path, base: Source, label: str) -> Iterator[Source]:
    """The source of a model folder, or of an adapter of ``base``. Raises CheckpointError where it cannot be read."""
    if is_adapter(path):
        with AdapterSource(Path(path), base, label) as source:
            yield source
    else:
        with open_checkpoint(path) as checkpoint:
            yield CheckpointSource(checkpoint, label)


class AdapterSource(Source):
    """The model that a LoRA adapter makes of its base (arXiv 2106.09685): W + scaling · B A where it has factors
    A [r, n] and B [m, r], in fp32, with scaling alpha / r, or alpha / √r (rsLoRA); its own tensors where it has whole ones
    (biases, modules_to_save); the base's elsewhere.

    Raises CheckpointError for another kind of adapter, for DoRA, for factors of convolutions, and for a tensor whose place in
    the base is not found.
    """

    def __init__(self, folder: Path, base: Source, label: str):
        self.label = f"{label} ({folder})"
        self._base = base
        self._config = read_json(folder / CONFIG)
        if self._config.get("peft_type") != "LORA" or self._config.get("use_dora"):
            kind = "DORA" if self._config.get("use_dora") else self._config.get("peft_type")
            raise CheckpointError(f"{folder} is a {kind} adapter, only LORA is read; save the model of merge_and_unload()")
        if not (folder / WEIGHTS).is_file():
            raise CheckpointError(f"{folder} lacks {WEIGHTS}; save the adapter with safe_serialization=True")
        self._file = SafetensorsFile(folder / WEIGHTS)
        try:
            self._factors, self._whole = self._sorted()
        except BaseException:
            self._file.close()
            raise
        self.aliases = dict(base.aliases)
        self.names = (*base.names, *(name for name in self._whole if name not in base))
        self._stored = frozenset(self.names)

    def __enter__(self) -> AdapterSource:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def is_buffer(self, name: str) -> bool:
        return self._base.is_buffer(name) if name in self._base else super().is_buffer(name)

    def _shape(self, name: str) -> torch.Size:
        return self._file.shape(self._whole[name]) if name in self._whole else self._base.shape(name)

    def _dtype(self, name: str) -> torch.dtype:
        if name in self._whole:
            return self._file.dtype(self._whole[name])
        return torch.float32 if name in self._factors else self._base.dtype(name)

    def change(self, name: str) -> tuple[Tensor, Tensor] | Tensor | None:
        """What the adapter adds to a tensor of the base: the product of two factors [m, r] and [r, n], in fp32 and with the
        scaling in the first; where it has a tensor of its own, the difference; None where it adds nothing."""
        name = self.aliases.get(name, name)
        if name in self._whole:
            own = self._file.read(self._whole[name])
            wide = torch.promote_types(own.dtype, torch.float32)
            return own.to(wide) - self._base.read(name).to(wide)
        return self._product(name) if name in self._factors else None

    def _product(self, name: str) -> tuple[Tensor, Tensor]:
        first, second, transposed = self._factors[name]
        a, b = self._file.read(first).float(), self._file.read(second).float()  # [r, n], [m, r]
        b = b * self._scaling(name.removesuffix(".weight"), a.shape[0])
        return (a.T, b.T) if transposed else (b, a)

    def _read(self, name: str) -> Tensor:
        if name in self._whole:
            return self._file.read(self._whole[name])
        if name not in self._factors:
            return self._base.read(name)
        left, right = self._product(name)
        return torch.addmm(self._base.read(name).float(), left, right)

    def _scaling(self, module: str, rank: int) -> float:
        alpha = self._config["lora_alpha"]
        for pattern, own in (self._config.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = own
                break
        return alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)

    def _sorted(self) -> tuple[dict[str, tuple[str, str, bool]], dict[str, str]]:
        """Name in the base -> its factors' names in the file and whether they are transposed; name -> whole tensor's name."""
        factors, whole, paired = {}, {}, set()
        for stored in self._file.names:
            name = stored.removeprefix(PREFIX)
            for (a, b), transposed in FACTORS.items():
                if name.endswith(f".{a}"):
                    partner, target = stored.removesuffix(a) + b, f"{name.removesuffix(a)}weight"
                    # Some layers, as GPT-2's, store their weight [n, m].
                    transposed = transposed or bool(self._config.get("fan_in_fan_out"))
                    self._check(stored, partner, target, transposed)
                    factors[self._base.aliases.get(target, target)] = stored, partner, transposed
                    paired |= {stored, partner}
        for stored in self._file.names:
            if stored not in paired:
                if "lora_" in stored:
                    raise CheckpointError(
                        f"{self.label}: '{stored}' is not a pair of LoRA factors; save merge_and_unload()'s model"
                    )
                whole[stored.removeprefix(PREFIX)] = stored
        return factors, whole

    def _check(self, first: str, second: str, target: str, transposed: bool) -> None:
        if second not in self._file.names or target not in self._base:
            missing = f"{self._base.label} lacks '{target}'" if second in self._file.names else f"'{second}' is missing"
            raise CheckpointError(f"{self.label}: '{first}' has no place: {missing}; is it an adapter of this base?")
        a, b, weight = self._file.shape(first), self._file.shape(second), self._base.shape(target)
        change = [a[-1], b[0]] if transposed else [b[0], a[-1]]
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or change != list(weight):
            raise CheckpointError(
                f"{self.label}: factors {list(b)} · {list(a)} do not make a change of '{target}' {list(weight)}; only linear "
                "layers and embeddings of this base can be merged"
            )
