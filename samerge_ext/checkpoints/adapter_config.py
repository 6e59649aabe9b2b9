"""What the adapter_config.json of a LoRA adapter says: its scaling, its tokens, its base, and what cannot be merged."""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path
from typing import Any

from samerge_ext.checkpoints.folder import read_json
from samerge_ext.checkpoints.places import CheckpointError

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

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether a layer stores its weight [n, m]. One flag for all layers: the last that PEFT looked at decided it."""
        return bool(self._values.get("fan_in_fan_out"))

    def scaling(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / √r (rsLoRA), of a module by its name in the model that was adapted."""
        alpha = self._values.get("lora_alpha", 8)
        for pattern, own in (self._values.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = own
                break
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
        if base is None or not named or _is_named(base, named):
            return
        warnings.warn(
            f"{self.folder} says that it is an adapter of '{named}', and the base here is {base}: "
            "make sure that they are the same weights, an adapter of another base is noise",
            stacklevel=2,
        )

    def _refuse_other_kinds(self) -> None:
        kind = self._values.get("peft_type")
        if kind in PROMPTS:
            self._refuse(f"a {kind} adapter", mergeable=False)
        if kind not in ("LORA", "TRAINABLE_TOKENS"):
            self._refuse(f"a {kind} adapter")
        for setting, (name, mergeable) in VARIANTS.items():
            if self._values.get(setting):
                self._refuse(f"a {name} adapter", mergeable)
        start = str(self._values.get("init_lora_weights")).lower()
        for prefix, name in INITIALISATIONS.items():
            if start.startswith(prefix):
                self._refuse(f"a LORA adapter initialised by {name}, which changes the base's own weights,")

    def _refuse(self, what: str, mergeable: bool = True) -> None:
        if mergeable:
            raise CheckpointError(f"{self.folder} is {what} and only LORA on the base as it is stored is read; {MERGE_IT}")
        raise CheckpointError(
            f"{self.folder} is {what} and cannot be merged into weights, nor can it by peft's merge_and_unload(); leave it out"
        )


def _is_named(base: Path, named: str) -> bool:
    """Whether a name, of a folder or on the hub, is that of a base's folder."""
    if Path(named).is_dir():
        return Path(named).resolve() == base.resolve()
    config = base / "config.json"
    itself = read_json(config).get("_name_or_path") if config.is_file() else None
    cached = "models--" + named.replace("/", "--")  # the hub's cache: models--OWNER--NAME/snapshots/COMMIT
    last = _last(named)
    return last in (_last(str(base)), _last(str(base.resolve())), _last(str(itself))) or cached in base.resolve().parts


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2].lower()
