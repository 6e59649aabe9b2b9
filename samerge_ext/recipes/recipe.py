"""`samerge merge`: a YAML file in mergekit's keys, with more of them for learned methods, and what runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from samerge_ext.budget.plan import PLAN_FILE, Plan, plan
from samerge_ext.checkpoints.saving import require_space, require_target
from samerge_ext.elementwise.file_merge import FileMerge, merge_files
from samerge_ext.learning.run_state import STATE_FILE
from samerge_ext.merged.result import Result
from samerge_ext.methods.adamerging import AdaMergingConfig, adamerging
from samerge_ext.methods.samerging import SAMergingConfig, samerging
from samerge_ext.methods.statsmerging import StatsMergingConfig, statsmerging
from samerge_ext.models.folders import FolderModel
from samerge_ext.packing.packed_weights import PackedWeights
from samerge_ext.recipes.data_free import METHODS, check_parameters, file_merge
from samerge_ext.statistics.features import FEATURES_FILE

LEARNED = {
    "samerging": (samerging, SAMergingConfig),
    "adamerging": (adamerging, AdaMergingConfig),
    "statsmerging": (statsmerging, StatsMergingConfig),
}
TASK_VECTOR_DTYPES = Literal["float32", "bfloat16", "float16", "int8", "int4", "int4-residual", "lora"]
PACKED_FILE = "packed.safetensors"  # in OUT.state, where a memory budget asks for it
DTYPES = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _Strict(BaseModel):
    """A key that nobody reads is an error."""

    model_config = ConfigDict(extra="forbid")


class ModelEntry(_Strict):
    """A model: its folder, and under `parameters` its weight and density as in mergekit."""

    model: Path
    parameters: dict[str, Any] = Field(default_factory=dict)


class CalibrationEntry(_Strict):
    """The calibration set: one file of unlabelled texts per task (a text a line, or .jsonl with the field "text")."""

    files: dict[str, Path]
    texts: int | None = Field(default=None, ge=1, description="use the first so many texts of each file")
    batch_size: int = Field(default=16, ge=1)
    max_length: int = Field(default=128, ge=1, description="tokens; longer texts are cut")


class Recipe(_Strict):
    """A merge, as a file describes it.

    merge_method: linear (weighted mean), task_arithmetic, ties, dare_linear, dare_ties, samerging, adamerging or statsmerging.
    base_model, models, dtype, out_dtype: as in mergekit. Data-free methods merge in dtype, by default what a tensor's types
        promote to, and write it unless out_dtype is given. Learned ones pack and write dtype; by default they merge in float32
        and write the base's dtypes. linear does without base_model.
    parameters: of data-free methods mergekit's (weight, normalize, lambda, density, rescale; int8_mask changes nothing), each
        one value, a gradient over the layers or values by name; and seed (dare), trim: tensor or vector (ties), align_norms.
        Of learned methods their configuration's fields.
    task_vector_dtype: of learned methods, how task vectors are stored while merging: the packed weights' dtype by default; int8,
        int4 and int4-residual quantise them; lora keeps the factors, where all models are LoRA adapters.
    tasks: names of the models without the base, in their order; the folders' names by default.
    heads: patterns of tensors that belong to a task and are kept per task.
    calibration: for learned methods.
    """

    merge_method: Literal[
        "linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "samerging", "adamerging", "statsmerging"
    ]
    base_model: Path | None = None
    models: list[ModelEntry]
    parameters: dict[str, Any] = Field(default_factory=dict)
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    out_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    task_vector_dtype: TASK_VECTOR_DTYPES | None = None
    tasks: list[str] | None = None
    heads: list[str] = Field(default_factory=list)
    calibration: CalibrationEntry | None = None

    @property
    def experts(self) -> list[ModelEntry]:
        """The models without the base, which mergekit's files may list among them; a mean counts it."""
        if self.merge_method == "linear":
            return self.models
        return [entry for entry in self.models if entry.model != self.base_model]

    @property
    def named_experts(self) -> list[tuple[str, ModelEntry]]:
        """The experts with their tasks."""
        return list(zip(self.tasks or (), self.experts, strict=True))

    def learned_from(self) -> tuple[Path, CalibrationEntry]:
        """The base and the calibration set of a learned method; raises ValueError for another one."""
        if self.base_model is None or self.calibration is None:
            raise ValueError(f"{self.merge_method} learns nothing; plans are for {', '.join(LEARNED)}")
        return self.base_model, self.calibration

    @model_validator(mode="after")
    def _agree(self) -> Recipe:
        if self.base_model is None and self.merge_method != "linear":
            raise ValueError(f"{self.merge_method} needs 'base_model'")
        if self.tasks is None:
            self.tasks = [entry.model.name for entry in self.experts]
        if len(self.tasks) != len(self.experts):
            raise ValueError(f"tasks names {len(self.tasks)}, models lists {len(self.experts)}; give one name per model")
        if (self.merge_method in LEARNED) != (self.calibration is not None):
            verb = "needs" if self.merge_method in LEARNED else "does not read"
            raise ValueError(f"{self.merge_method} {verb} 'calibration'")
        if self.merge_method in METHODS:
            check_parameters(self.merge_method, self.parameters, [entry.parameters for entry in self.experts])
            if self.task_vector_dtype:
                raise ValueError(f"{self.merge_method} does not read 'task_vector_dtype'; it stores no task vectors")
            return self
        if self.out_dtype:
            raise ValueError(f"{self.merge_method} does not read 'out_dtype'; dtype is what is written")
        if any(entry.parameters for entry in self.models):
            raise ValueError(f"{self.merge_method} learns the weights; remove 'parameters' of the models")
        try:
            self.method_settings()
        except TypeError as error:
            raise ValueError(f"parameters of {self.merge_method}: {error}") from error
        return self

    def method_settings(self) -> Any:
        """A learned method's configuration."""
        return LEARNED[self.merge_method][1](**self.parameters)


def load_recipe(path: Path, overrides: dict[str, Any]) -> Recipe:
    """Reads a YAML file; `overrides` replace its keys, those of `parameters` and `calibration` one by one.

    Raises ValueError naming the file and every key that is wrong.
    """
    try:
        content = yaml.safe_load(Path(path).read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected keys such as merge_method and models")
    for key, value in overrides.items():
        content[key] = {**(content.get(key) or {}), **value} if isinstance(value, dict) else value
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        faults = [f"  {'.'.join(map(str, fault['loc'])) or 'file'}: {fault['msg']}" for fault in error.errors()]
        raise ValueError("\n".join([f"{path} is no recipe that can be merged:", *faults])) from error


def plan_recipe(recipe: Recipe) -> Plan:
    """What every way to hold a learned merge's model would take, from the folders' headers and the calibration set."""
    base, _ = recipe.learned_from()
    experts = [(task, entry.model) for task, entry in recipe.named_experts]
    model, calibration = _model_and_calibration(recipe)
    packed = PackedWeights.describe(base, experts, conversion=model.conversion, **_packing(recipe))
    settings = recipe.method_settings()
    teachers = recipe.merge_method != "adamerging"
    return plan(model.module, packed, calibration, model.kind.logits, settings, teachers=teachers)


def run_recipe(recipe: Recipe, out: Path, *, overwrite: bool = False) -> Result | None:
    """Merges as the recipe says and writes the model folder `out`; nothing appears there before it is whole.

    What could fail for want of space or of a free target is checked first. Until the folder is written `OUT.state` holds how far
    the merge is, and the same recipe continues from it. Data-free methods go from file to file and return nothing.
    """
    dtype = DTYPES[recipe.dtype]
    if recipe.merge_method in METHODS:
        merge_files(_file_merge(recipe), out, overwrite=overwrite)
        return None
    require_target(out, overwrite=overwrite)
    base, _ = recipe.learned_from()
    experts = [(task, entry.model) for task, entry in recipe.named_experts]
    state = out.with_name(f"{out.name}.state")
    file = state / PACKED_FILE if (state / PACKED_FILE).exists() or _plans_a_file(recipe) else None
    model, calibration = _model_and_calibration(recipe)
    packed = PackedWeights.from_folders(base, experts, file=file, conversion=model.conversion, **_packing(recipe))
    sizes = zip(packed.layout.shapes, packed.layout.dtypes, strict=True)
    require_space(out, sum(shape.numel() * (dtype or base_dtype).itemsize for shape, base_dtype in sizes))
    method, config_type = LEARNED[recipe.merge_method]
    settings = config_type(**{"checkpoint_dir": state, **recipe.parameters})
    result = method(model.module, packed, calibration, model.kind.logits, config=settings)
    result.save_pretrained(out, dtype=dtype, overwrite=overwrite)
    for name in (STATE_FILE, FEATURES_FILE, PLAN_FILE, PACKED_FILE):  # features: of StatsMerging; the written folder has them too
        (state / name).unlink(missing_ok=True)
    if state.exists() and not any(state.iterdir()):
        state.rmdir()
    return result


def _file_merge(recipe: Recipe) -> FileMerge:
    return file_merge(
        recipe.merge_method,
        [(task, entry.model, entry.parameters) for task, entry in recipe.named_experts],
        recipe.base_model,
        recipe.parameters,
        heads=recipe.heads,
        dtype=DTYPES[recipe.dtype],
        out_dtype=DTYPES[recipe.out_dtype],
        identity=recipe.model_dump(mode="json", exclude_defaults=True),
    )


def _plans_a_file(recipe: Recipe) -> bool:
    """Whether the recipe has a memory budget that only a packed file fits."""
    settings = recipe.method_settings()
    if settings.memory_budget is None:
        return False
    return plan_recipe(recipe).choose(settings.memory_budget, settings.host_memory_budget).store == "file"


def _packing(recipe: Recipe) -> dict[str, Any]:
    """How a learned merge packs its weights."""
    form = DTYPES.get(recipe.task_vector_dtype, recipe.task_vector_dtype)
    return {"dtype": DTYPES[recipe.dtype] or torch.float32, "task_vector_dtype": form, "heads": recipe.heads}


def _model_and_calibration(recipe: Recipe) -> tuple[FolderModel, dict[str, list]]:
    """The model without memory for its weights, and the batches of every task."""
    base, options = recipe.learned_from()
    experts = {task: entry.model for task, entry in recipe.named_experts}
    model = FolderModel.of(base, experts, recipe.heads)
    return model, model.batches(
        options.files, limit=options.texts, batch_size=options.batch_size, max_length=options.max_length
    )
