"""What the adapter_config.json of a LoRA adapter says: its scaling, its tokens, its base, and what cannot be merged."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from samerge_ext.checkpoints.patterns import Patterns
from samerge_ext.checkpoints.reading import CheckpointError, cut, read_json, shown

MAX_ALPHA = 2**63  # of a number in a configuration: beyond are infinities, NaN, and what no tensor can be multiplied by
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

MERGE_IT = "load it on its base with peft, call merge_and_unload(), save the model that it returns and pass that folder"
# Kinds of adapters that are prompts, not changes of weights.
PROMPTS = (
    "ADAPTION_PROMPT",
    "CARTRIDGE",
    "CPT",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
)
# Initialisations that move a part of the base into the factors: what was trained is not base + factors.
INITIALISATIONS = {"pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "loftq": "LoftQ", "lora_ga": "LoRA-GA"}
# Settings of other kinds of LoRA: what they are called, and whether peft itself can merge them.
VARIANTS = {
    "use_bdlora": ("block-diagonal LORA (use_bdlora)", True),
    "kasa_config": ("KaSA", True),
    "monteclora_config": ("MonteCLoRA", True),
    "layer_replication": ("layer_replication", False),
    "target_parameters": ("target_parameters (mixture of experts)", True),
    "alora_invocation_tokens": ("aLoRA (activated LoRA)", False),
    "use_qalora": ("QALoRA", False),
    "arrow_config": ("Arrow", False),
}


class AdapterConfig:
    """The settings of a LoRA adapter, or of one of trainable tokens alone.

    Raises CheckpointError, naming the kind and what to do, for all that is not base + scaling · B A of the base as it is stored.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._values: dict[str, Any] = read_json(folder / CONFIG)
        self._refuse_other_kinds()
        self._check_values()

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether a layer stores its weight [n, m]. One flag for all layers: the last that PEFT looked at decided it."""
        return bool(self._values.get("fan_in_fan_out"))

    def scaling(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / √r (rsLoRA), of a module by its name in the model that was adapted."""
        with self._naming_patterns():
            own = self._alphas.find(module)
        alpha: float = self._values.get("lora_alpha", 8) if own is None else own
        return alpha / (math.sqrt(rank) if self._values.get("use_rslora") else rank)

    def tokens(self, module: str) -> list[int]:
        """The rows of an embedding that were trained one by one."""
        indices = self._values.get("trainable_token_indices", self._values.get("token_indices"))
        if isinstance(indices, dict):
            named = [own for name, own in indices.items() if module == name or module.endswith(f".{name}")]
            indices = named[0] if named else None
        if indices is None:
            raise CheckpointError(f"{self.folder}: {CONFIG} does not say which tokens of '{module}' were trained; {MERGE_IT}")
        return list(indices)

    def warn_of_another_base(self, base: Path | None) -> None:
        """Warns where the adapter names another base than the folder that it is put on."""
        named = self._values.get("base_model_name_or_path")
        if base is None or not named or not isinstance(named, str) or _is_named(base, named):
            return
        warnings.warn(
            f"{self.folder} says that it is an adapter of {shown(named)}, and the base here is {base}: "
            "make sure that they are the same weights, an adapter of another base is noise",
            stacklevel=2,
        )

    def _check_values(self) -> None:
        """Refuses values that are not of the type that PEFT writes, or that no adapter can have."""
        values, is_lora = self._values, self._values.get("peft_type") == "LORA"
        for key in ("use_rslora", "fan_in_fan_out"):
            self._require(isinstance(values.get(key) or False, bool), key, values.get(key), "true or false")
        if is_lora:
            self._require(_is_number(values.get("lora_alpha", 8)), "lora_alpha", values.get("lora_alpha"), "a finite number")
            self._require(_is_count(values.get("r", 8)), "r", values.get("r"), "a rank of 1 or more")
        for key, fits, expected in (
            ("alpha_pattern", _is_number, "finite numbers by the names of layers"),
            ("rank_pattern", _is_count, "ranks by the names of layers"),
        ):
            given = values.get(key) or {}
            self._require(isinstance(given, dict) and all(map(fits, given.values())), key, given, expected)
        for key in ("trainable_token_indices", "token_indices"):
            indices = values.get(key)
            lists = indices.values() if isinstance(indices, dict) else [indices or []]
            whole = all(isinstance(each, list) and all(type(index) is int for index in each) for each in lists)
            self._require(whole, key, indices, "numbers of tokens, by the names of layers where it is of several")
        with self._naming_patterns():
            self._alphas = Patterns(values.get("alpha_pattern") or {})

    @contextmanager
    def _naming_patterns(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise CheckpointError(f"{self.folder / CONFIG}: alpha_pattern: {error}; name the layers in full, say") from error

    def _require(self, fits: bool, key: str, value: object, expected: str) -> None:
        if not fits:
            raise CheckpointError(
                f"{self.folder / CONFIG}: {key} is {shown(value)}, and {expected} is expected; save the adapter again with peft"
            )

    def _refuse_other_kinds(self) -> None:
        kind = self._values.get("peft_type")
        if kind in PROMPTS:
            self._refuse(f"a {kind} adapter", mergeable=False)
        if kind not in ("LORA", "TRAINABLE_TOKENS"):
            self._refuse(f"a {cut(str(kind)) if isinstance(kind, str) else shown(kind)} adapter")
        for setting, (name, mergeable) in VARIANTS.items():
            if self._values.get(setting):
                self._refuse(f"a {name} adapter", mergeable)
        start = self._values.get("init_lora_weights")
        for prefix, name in INITIALISATIONS.items():
            if isinstance(start, str) and start.lower().startswith(prefix):
                self._refuse(f"a LORA adapter initialised by {name}, which changes the base's own weights,")

    def _refuse(self, what: str, mergeable: bool = True) -> None:
        if mergeable:
            raise CheckpointError(f"{self.folder} is {what} and only LORA on the base as it is stored is read; {MERGE_IT}")
        raise CheckpointError(
            f"{self.folder} is {what} and cannot be merged into weights, nor can it by peft's merge_and_unload(); leave it out"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MAX_ALPHA


def _is_count(value: object) -> bool:
    return type(value) is int and 1 <= value < MAX_ALPHA


def _is_named(base: Path, named: str) -> bool:
    """Whether a name, of a folder or on the hub, is that of a base's folder."""
    if os.path.isdir(named):
        return Path(named).resolve() == base.resolve()
    config = base / "config.json"
    itself = read_json(config).get("_name_or_path") if config.is_file() else None
    cached = "models--" + named.replace("/", "--")  # the hub's cache: models--OWNER--NAME/snapshots/COMMIT
    last = _last(named)
    return last in (_last(str(base)), _last(str(base.resolve())), _last(str(itself))) or cached in base.resolve().parts


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2].lower()
