"""What kind of model a folder holds, by transformers' own tables, and an empty module of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from samerge_ext.checkpoints.architecture import bounded_by_tensors, named_architecture
from samerge_ext.checkpoints.folder import read_config
from samerge_ext.checkpoints.lora import CONFIG as ADAPTER_CONFIG
from samerge_ext.checkpoints.places import is_adapter
from samerge_ext.checkpoints.reading import cut, read_json, shown
from samerge_ext.models import logits
from samerge_ext.models.on_meta import parameters_on_meta
from samerge_ext.models.zero_shot import zero_shot_classification

ANYTHING_ELSE = "for others call samerge_ext.samerging with your own logits function"


@dataclass(frozen=True)
class Kind:
    """A kind of models: what is distilled, and from what.

    table: transformers' one of its classes, MODEL_FOR_table_MAPPING_NAMES. suffix: what most of them end in.
    task_type: PEFT's name of it. logits: its function, or what makes it of the tasks' heads where these are none of the model's.
    reads: "texts" or "pictures". special_tokens: whether logits at [CLS] and the like count.
    """

    table: str
    suffix: str
    task_type: str | None
    logits: Callable[..., Any]
    reads: str = "texts"
    special_tokens: bool = True

    @property
    def name(self) -> str:
        """What messages call it: "sequence classification"."""
        return self.logits.__name__.replace("_", " ")


ZERO_SHOT = Kind("ZERO_SHOT_IMAGE_CLASSIFICATION", "CLIPModel", None, zero_shot_classification, reads="pictures")
KINDS = (
    Kind("SEQUENCE_CLASSIFICATION", "ForSequenceClassification", "SEQ_CLS", logits.sequence_classification),
    Kind("TOKEN_CLASSIFICATION", "ForTokenClassification", "TOKEN_CLS", logits.token_classification, special_tokens=False),
    Kind("IMAGE_CLASSIFICATION", "ForImageClassification", None, logits.image_classification, reads="pictures"),
    Kind("MASKED_LM", "ForMaskedLM", None, logits.masked_lm, special_tokens=False),
    Kind("SEQ_TO_SEQ_CAUSAL_LM", "ForConditionalGeneration", "SEQ_2_SEQ_LM", logits.seq2seq_lm),
    Kind("CAUSAL_LM", "ForCausalLM", "CAUSAL_LM", logits.causal_lm),
    ZERO_SHOT,
)
TOWERS = ("VisionModel", "VisionModelWithProjection")  # what the classes of a zero-shot model's image tower end in


def kind_of(architecture: str | None) -> Kind | None:
    """The kind of a transformers class; None where there is none that can be distilled."""
    import transformers

    for kind in KINDS:
        for classes in _table(kind).values():
            if architecture in ((classes,) if isinstance(classes, str) else classes):
                return kind
    if architecture is None or not hasattr(transformers, architecture):
        return None
    # T5ForConditionalGeneration is in the table; …ForConditionalGeneration alone may be of any kind.
    named = (kind for kind in KINDS if architecture.endswith(kind.suffix) and kind.suffix != "ForConditionalGeneration")
    return next(named, None)


def find_architecture(base: Path, experts: Mapping[str, Path]) -> tuple[Path, str, Kind]:
    """The folder whose config.json describes the merged model, its class and its kind.

    Full models say it themselves. An adapter says it by its task_type, without one by the class that PEFT noted, and is of the
    base's class otherwise; its configuration is the base's.
    Raises ValueError for an architecture of no kind, and where experts are of different kinds.
    """
    found = {task: _of_expert(path, base) for task, path in experts.items()}
    first = next(iter(found))
    for task, (_, architecture, kind) in found.items():
        if kind is not found[first][2]:
            raise ValueError(
                f"'{first}' is for {found[first][2].name} ({found[first][1]}), '{task}' for {kind.name} ({architecture}); "
                f"from the command line all are of one kind, {ANYTHING_ELSE}"
            )
    return next((each for task, each in found.items() if not is_adapter(experts[task])), next(iter(found.values())))


def empty_model(folder: Path, architecture: str, rows: int | None = None) -> nn.Module:
    """A model of a folder's configuration, its parameters on `meta` and its buffers there.

    rows: of its embeddings, where they are others than the folder's.
    Raises ValueError, naming the folder, where transformers cannot make it.
    """
    import transformers

    with bounded_by_tensors(folder), parameters_on_meta():
        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            if rows is not None:
                config.vocab_size = config.get_text_config().vocab_size = rows
            return getattr(transformers, architecture)._from_config(config, dtype=torch.float32)
        except Exception as error:  # of any type: a config.json may hold anything
            fault = cut(str(error), 500)
            raise ValueError(f"transformers makes no {cut(architecture)} of {folder}/config.json: {fault}") from error


def _of_expert(path: Path, base: Path) -> tuple[Path, str, Kind]:
    if not is_adapter(path):
        return _of_tower(path, base) or _of_folder(path)
    config = read_json(path / ADAPTER_CONFIG)
    task_type = config.get("task_type")
    mapping = config.get("auto_mapping")
    noted = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    if task_type is None:
        by_class = kind_of(noted)
        return _of_folder(base) if noted is None or by_class is None else (base, noted, by_class)
    kind = next((kind for kind in KINDS if kind.task_type == task_type), None)
    if kind is None:
        known = ", ".join(kind.task_type for kind in KINDS if kind.task_type)
        raise ValueError(
            f"{path}/{ADAPTER_CONFIG} has the task_type {shown(task_type)}; learned merges from the command line know {known}, "
            f"{ANYTHING_ELSE}"
        )
    content = read_config(base)
    own, model_type = named_architecture(content), content.get("model_type")
    if own is not None and kind_of(own) is kind:
        return base, own, kind
    classes: Any = _table(kind).get(model_type) if isinstance(model_type, str) else None
    if classes is None:
        of_base = f"the base's type, {shown(model_type)}"
        raise ValueError(f"{path} is for {kind.name}, for which transformers has no model of {of_base}")
    return base, classes if isinstance(classes, str) else classes[0], kind


def _of_tower(path: Path, base: Path) -> tuple[Path, str, Kind] | None:
    """The whole model that an image tower alone is of, its base; None for other folders."""
    if not (named_architecture(read_config(path)) or "").endswith(TOWERS):
        return None
    whole = named_architecture(read_config(base))
    return (base, whole, ZERO_SHOT) if whole is not None and kind_of(whole) is ZERO_SHOT else None


def _of_folder(path: Path) -> tuple[Path, str, Kind]:
    architecture = named_architecture(read_config(path))
    kind = kind_of(architecture)
    if architecture is None or kind is None:
        raise ValueError(
            f"{path}/config.json names the architecture {shown(architecture)}; learned merges from the command line know "
            f"{', '.join('…' + kind.suffix for kind in KINDS)} of transformers, {ANYTHING_ELSE}"
        )
    return path, architecture, kind


def _table(kind: Kind) -> Mapping[str, str | tuple[str, ...]]:
    """model_type -> class or classes."""
    from transformers.models.auto import modeling_auto

    return getattr(modeling_auto, f"MODEL_FOR_{kind.table}_MAPPING_NAMES")
