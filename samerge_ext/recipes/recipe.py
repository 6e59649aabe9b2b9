"""What a YAML file in mergekit's keys says, with more of them for learned methods."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, TypeAdapter, ValidationError, field_validator, model_validator

from samerge_ext.checkpoints.places import find_weights, is_adapter
from samerge_ext.checkpoints.reading import CheckpointError, cut, read_bytes, shown
from samerge_ext.checkpoints.task_names import check_task_name, names_of_folders
from samerge_ext.checkpoints.tokenizers import TokenizerConfig
from samerge_ext.learning.config import LearningConfig
from samerge_ext.methods.configs import AdaMergingConfig, SAMergingConfig, StatsMergingConfig
from samerge_ext.recipes.entries import (
    CalibrationEntry,
    ModelEntry,
    SliceEntry,
    Strict,
    TokenizerEntry,
    check_keys,
    mapping_of,
    parse_model,
)
from samerge_ext.recipes.mergekit_keys import as_recipe
from samerge_ext.recipes.parameters import METHODS, check_count, check_parameters
from samerge_ext.recipes.yaml_text import MAX_BYTES, parse_yaml

LEARNED: dict[str, type[LearningConfig]] = {
    "samerging": SAMergingConfig,
    "adamerging": AdaMergingConfig,
    "statsmerging": StatsMergingConfig,
}
TASK_VECTOR_DTYPES = Literal["float32", "bfloat16", "float16", "int8", "int4", "int4-residual", "lora"]
MAX_FAULTS = 10  # that are listed
IN_PYTHON = {  # methods that are none of a recipe's, and why
    "emr": "emr makes a model for each task, which differ from the experts only in that all of them take little room together; "
    "sm.emr makes them in Python"
}
Dtype = Literal["float32", "bfloat16", "float16", "float64"]


class Recipe(Strict):
    """A merge, as a file describes it.

    merge_method: one of mergekit's (`parameters.METHODS`), samerging, adamerging or statsmerging. Where a file leaves it
        out it is wudi, or samerging with a calibration set.
    base_model, models, dtype, out_dtype: as in mergekit. Data-free methods merge in dtype, by default what a tensor's types
        promote to, and write it unless out_dtype is given. Learned ones pack and write dtype; by default they merge in float32
        and write the base's dtypes. linear, nuslerp, multislerp, karcher and passthrough do without base_model.
    slices: of data-free methods, what the merged model's layers are; models are then those that are in them.
    parameters: of data-free methods mergekit's (`parameters.METHODS`; int8_mask changes nothing), each one value, a gradient over
        the layers or values by name; and seed (dare, della), trim: tensor or vector (ties), align_norms, device.
        Of learned methods their configuration's fields.
    task_vector_dtype: of learned methods, how task vectors are stored while merging: the packed weights' dtype by default; int8,
        int4 and int4-residual quantise them; lora keeps the factors, where all models are LoRA adapters.
    tasks: names of the models without the base, in their order; the folders' names by default.
    heads: patterns of tensors that belong to a task and are kept per task.
    keep: patterns of tensors that not all models have, and that stay as they are: the base's, or else the first model's that has
        them, whose config.json and tokenizer then go along. Learned methods keep the base's alone.
    tokenizer: whose goes along, base, union or a model, and where rows of tokens that models lack are from; a text alone is the
        source, `tokenizer_source` too. Left out, it is the base's, and all models must have its tokens.
    chat_template: auto (most models'), base, a model, a file, chatml, or the template itself.
    calibration: for learned methods.
    reestimate_batchnorm: of learned methods, whether BatchNorm's running statistics are estimated anew on the calibration set,
        once the weights are learned (`methods.reestimate_batchnorm`).
    """

    merge_method: str
    base_model: Path | None = None
    models: list[ModelEntry]
    slices: list[SliceEntry] | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    task_vector_dtype: TASK_VECTOR_DTYPES | None = None
    tasks: list[str] | None = None
    heads: list[str] = Field(default_factory=list)
    keep: list[str] = Field(default_factory=list)
    tokenizer: TokenizerEntry | None = None
    chat_template: str | None = None
    calibration: CalibrationEntry | None = None
    reestimate_batchnorm: bool = False
    _file: Path | None = PrivateAttr(None)

    @contextmanager
    def named(self) -> Iterator[None]:
        """A ValueError from inside also says which file the recipe was read from."""
        try:
            yield
        except ValueError as error:
            note = f"while merging as {self._file} says"
            if self._file is not None and note not in getattr(error, "__notes__", ()):
                error.add_note(note)
            raise

    @property
    def experts(self) -> list[ModelEntry]:
        """The models without the base, which mergekit's files may list among them; a mean counts it."""
        if self._base_is_a_model:
            return self.models
        base = None if self.base_model is None else os.path.realpath(self.base_model)
        return [entry for entry in self.models if entry.adapter or os.path.realpath(entry.model) != base]

    @property
    def _base_is_a_model(self) -> bool:
        """Whether the base counts as one of the models, where it is listed."""
        return self.merge_method in METHODS and METHODS[self.merge_method].base == "one"

    @property
    def named_experts(self) -> list[tuple[str, ModelEntry]]:
        """The experts with their tasks."""
        return list(zip(self.tasks or (), self.experts, strict=True))

    def learned_from(self) -> tuple[Path, CalibrationEntry]:
        """The base and the calibration set of a learned method; raises ValueError for another one."""
        if self.base_model is None or self.calibration is None:
            raise ValueError(f"{self.merge_method} learns nothing; plans are for {', '.join(LEARNED)}")
        return self.base_model, self.calibration

    @field_validator("merge_method")
    @classmethod
    def _known_method(cls, method: str) -> str:
        known = (*METHODS, *LEARNED)
        if method in IN_PYTHON:
            raise ValueError(IN_PYTHON[method])
        if method not in known:
            meant = method.lower().replace("-", "_")
            hint = f"; it is written {meant}" if meant in known else ""
            raise ValueError(f"{shown(method)} is not a method here{hint}. Those that are: {', '.join(known)}")
        return method

    @field_validator("tokenizer", mode="before")
    @classmethod
    def _source_alone(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str | Path) else value

    @model_validator(mode="after")
    def _rows_of_a_base(self) -> Recipe:
        if self.base_model is None and self.tokenizer and "missing" in self.tokenizer.model_fields_set:
            if self.tokenizer.missing == "base":
                raise ValueError("tokenizer: missing: base takes the rows of 'base_model', which is not given; leave it out")
        return self

    @property
    def tokenizer_config(self) -> TokenizerConfig | None:
        """Whose tokenizer is asked for; where there is no base, no model's rows are put before others'."""
        config = self.tokenizer.config() if self.tokenizer else None
        return replace(config, missing="mean") if config and self.base_model is None else config

    @field_validator("base_model", mode="before")
    @classmethod
    def _base_alone(cls, value: Any) -> Path | None:
        model, adapter = parse_model(value)
        if adapter is not None:
            raise ValueError(
                f"{shown(value)}: a base with an adapter; merge the two with peft (merge_and_unload), save and give that folder"
            )
        return model

    @model_validator(mode="after")
    def _agree(self) -> Recipe:
        if self.base_model is None and (self.merge_method in LEARNED or METHODS[self.merge_method].needs_base):
            raise ValueError(f"{self.merge_method} needs 'base_model'")
        self._take_adapters_of_the_base()
        if not self.experts:
            raise ValueError(f"'models' lists no model{' beside the base' if self.models else ''}; give those to merge")
        if self.tasks is None:
            self.tasks = names_of_folders(entry.place for entry in self.experts)
        if len(self.tasks) != len(self.experts):
            raise ValueError(f"tasks names {len(self.tasks)}, models lists {len(self.experts)}; give one name per model")
        for task in self.tasks:
            check_task_name(task)
            if self.tasks.count(task) > 1:
                raise ValueError(f"tasks names {shown(task)} twice; give every model a name of its own")
        if (self.merge_method in LEARNED) != (self.calibration is not None):
            verb = "needs" if self.merge_method in LEARNED else "does not read"
            raise ValueError(f"{self.merge_method} {verb} 'calibration'")
        if self.reestimate_batchnorm and self.merge_method in METHODS:
            raise ValueError(
                f"{self.merge_method} goes from file to file and runs no model, which 'reestimate_batchnorm' does; use a learned "
                f"method, {', '.join(LEARNED)}, or sm.reestimate_batchnorm in Python"
            )
        if self.merge_method in METHODS:
            if self.slices is None:
                check_count(self.merge_method, [str(entry.place) for entry in self.experts])
            self._check_parameters()
            if self.task_vector_dtype:
                raise ValueError(f"{self.merge_method} does not read 'task_vector_dtype'; it stores no task vectors")
            return self
        if self.slices is not None:
            raise ValueError(f"{self.merge_method} merges models whole; give 'models' in the place of 'slices'")
        if self.out_dtype:
            raise ValueError(f"{self.merge_method} does not read 'out_dtype'; dtype is what is written")
        if any(entry.parameters for entry in self.models):
            raise ValueError(f"{self.merge_method} learns the weights; remove 'parameters' of the models")
        try:
            settings = self.method_settings()
            settings.weights(tuple(self.tasks))
        except ValueError as error:
            raise ValueError(f"parameters of {self.merge_method}: {error}") from error
        if self.reestimate_batchnorm and (settings.streamed or settings.memory_budget is not None):
            raise ValueError("'reestimate_batchnorm' runs the whole merged model; leave out streamed and memory_budget")
        if settings.train_heads and not self.heads:
            raise ValueError("train_heads needs 'heads', the patterns of the tensors that belong to a task")
        return self

    def _check_parameters(self) -> None:
        for parameters, entries in [(self.parameters, self.experts), *((s.parameters, s.sources) for s in self.slices or ())]:
            check_parameters(self.merge_method, parameters, [(str(entry.place), entry.parameters) for entry in entries])
        if self.slices is not None:
            for key in ("heads", "keep"):
                if getattr(self, key):
                    raise ValueError(f"'{key}' is of models that are merged whole; leave it out of a recipe with slices")
            for key in ("align_norms", "trim"):
                if self.parameters.get(key, False) not in (False, "tensor"):
                    raise ValueError(f"'{key}' is of models that are merged whole; leave it out of a recipe with slices")

    def _take_adapters_of_the_base(self) -> None:
        """An adapter on the base, base+adapter, is an expert by its own folder."""
        for entry in (*self.models, *(source for one in self.slices or () for source in one.sources)):
            if entry.adapter is None:
                continue
            if not is_adapter(entry.adapter):
                raise ValueError(
                    f"{entry.adapter} holds no PEFT adapter (adapter_config.json); after + an adapter's folder is expected"
                )
            if self.base_model is not None and os.path.realpath(entry.model) == os.path.realpath(self.base_model):
                entry.model, entry.adapter = entry.adapter, None

    def require_files(self) -> None:
        """Raises CheckpointError for a model that is not there, OSError for a calibration file."""
        if self.base_model:
            find_weights(self.base_model, beside_adapter=self._base_is_a_model)
        for entry in self.models:
            if not is_adapter(entry.model):
                find_weights(entry.model, beside_adapter=True)
        for path in self.calibration.paths if self.calibration else ():
            path.stat()

    def method_settings(self, **defaults: Any) -> Any:
        """A learned method's configuration: its parameters as the fields' types, before ``defaults``. Raises ValueError."""
        config = LEARNED[self.merge_method]
        check_keys(self.parameters, [field.name for field in fields(config)])
        try:
            return TypeAdapter(config).validate_python({**defaults, **self.parameters})  # YAML reads 1e-3 as a text
        except ValidationError as error:
            raise ValueError("; ".join(_faults(error))) from error


def load_recipe(path: Path, overrides: dict[str, Any]) -> Recipe:
    """Reads a YAML file; `overrides` replace its keys, those of `parameters` and `calibration` one by one.

    Raises ValueError naming the file and every key that is wrong.
    """
    try:
        content = parse_yaml(read_bytes(Path(path), MAX_BYTES)) or {}
    except CheckpointError:
        raise
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected keys such as merge_method and models")
    try:
        for key, value in overrides.items():
            content[key] = {**mapping_of(content, key), **value} if isinstance(value, dict) else value
        if content.get("merge_method") is None:
            content["merge_method"] = "wudi" if content.get("calibration") is None else "samerging"
        recipe = Recipe.model_validate(as_recipe(content))
        recipe._file = Path(path)
        return recipe
    except ValidationError as error:
        faults = _faults(error, "file")
    except ValueError as error:
        faults = [f"file: {error}"]
    raise ValueError("\n  ".join([f"{path} is no recipe that can be merged:", *faults]))


def _faults(error: ValidationError, whole: str = "") -> list[str]:
    """pydantic's faults, each after the key that it is in; whole: what those of no key are said of."""
    faults = error.errors(include_url=False, include_input=False)
    found = [
        (".".join(cut(str(key), 40) for key in fault["loc"]) or whole, fault["msg"].removeprefix("Value error, "))
        for fault in faults[:MAX_FAULTS]
    ]
    more = [f"and {len(faults) - MAX_FAULTS} more"] if len(faults) > MAX_FAULTS else []
    return [f"{key}: {text}" if key else text for key, text in found] + more
