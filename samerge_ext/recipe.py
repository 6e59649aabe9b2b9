"""`samerge merge`: a YAML file in mergekit's keys, with more of them for learned methods, and what runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from samerge_ext.adapters import is_adapter
from samerge_ext.checkpoints import require_space, require_target
from samerge_ext.features import FEATURES_FILE
from samerge_ext.methods.adamerging import AdaMergingConfig, adamerging
from samerge_ext.methods.arithmetic import task_arithmetic
from samerge_ext.methods.samerging import SAMergingConfig, samerging
from samerge_ext.methods.statsmerging import StatsMergingConfig, statsmerging
from samerge_ext.models.hugging_face import empty_model, read_texts, text_batches
from samerge_ext.models.on_meta import parameters_on_meta
from samerge_ext.packing import PackedWeights
from samerge_ext.plan import PLAN_FILE, Plan, plan
from samerge_ext.result import Result
from samerge_ext.run_state import STATE_FILE

LEARNED = {
    "samerging": (samerging, SAMergingConfig),
    "adamerging": (adamerging, AdaMergingConfig),
    "statsmerging": (statsmerging, StatsMergingConfig),
}
TASK_VECTOR_DTYPES = Literal["float32", "bfloat16", "float16", "int8", "int4", "int4-residual"]
PACKED_FILE = "packed.safetensors"  # in OUT.state, where a memory budget asks for it
DTYPES = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _Strict(BaseModel):
    """A key that nobody reads is an error."""

    model_config = ConfigDict(extra="forbid")


class ModelEntry(_Strict):
    """An expert: its folder, and `weight` under `parameters` as in mergekit."""

    model: Path
    parameters: dict[Literal["weight"], float] = Field(default_factory=dict)


class CalibrationEntry(_Strict):
    """The calibration set: one file of unlabelled texts per task (a text a line, or .jsonl with the field "text")."""

    files: dict[str, Path]
    texts: int | None = Field(default=None, ge=1, description="use the first so many texts of each file")
    batch_size: int = Field(default=16, ge=1)
    max_length: int = Field(default=128, ge=1, description="tokens; longer texts are cut")


class Recipe(_Strict):
    """A merge, as a file describes it.

    merge_method: linear (weighted mean), task_arithmetic, samerging, adamerging or statsmerging.
    base_model, models, dtype: as in mergekit. dtype is that of the packed and of the written weights; by default the merge
        runs in float32 and the base's dtypes are written.
    parameters: for task_arithmetic `lambda`, for linear `normalize`, for learned methods their configuration's fields.
    task_vector_dtype: how task vectors are stored while merging: the packed weights' dtype by default; int8, int4 and
        int4-residual quantise them.
    tasks: names of the models, in their order; the folders' names by default.
    heads: patterns of tensors that belong to a task and are kept per task.
    calibration: for learned methods.
    """

    merge_method: Literal["linear", "task_arithmetic", "samerging", "adamerging", "statsmerging"]
    base_model: Path
    models: list[ModelEntry]
    parameters: dict[str, Any] = Field(default_factory=dict)
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    task_vector_dtype: TASK_VECTOR_DTYPES | None = None
    tasks: list[str] | None = None
    heads: list[str] = Field(default_factory=list)
    calibration: CalibrationEntry | None = None

    @model_validator(mode="after")
    def _agree(self) -> Recipe:
        if self.tasks is None:
            self.tasks = [entry.model.name for entry in self.models]
        if len(self.tasks) != len(self.models):
            raise ValueError(f"tasks names {len(self.tasks)}, models lists {len(self.models)}; give one name per model")
        if (self.merge_method in LEARNED) != (self.calibration is not None):
            verb = "needs" if self.merge_method in LEARNED else "does not read"
            raise ValueError(f"{self.merge_method} {verb} 'calibration'")
        if self.merge_method in LEARNED and any(entry.parameters for entry in self.models):
            raise ValueError(f"{self.merge_method} learns the weights; remove 'parameters' of the models")
        self.method_settings()
        return self

    def method_settings(self) -> Any:
        """The checked `parameters`: a learned method's configuration, or the data-free method's keywords."""
        if self.merge_method in LEARNED:
            try:
                return LEARNED[self.merge_method][1](**self.parameters)
            except TypeError as error:
                raise ValueError(f"parameters of {self.merge_method}: {error}") from error
        known = {"linear": {"normalize"}, "task_arithmetic": {"lambda"}}[self.merge_method]
        unknown = set(self.parameters) - known
        if unknown:
            raise ValueError(f"parameters of {self.merge_method}: unknown {sorted(unknown)}; known are {sorted(known)}")
        return self.parameters


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
    if recipe.merge_method not in LEARNED:
        raise ValueError(f"{recipe.merge_method} learns nothing; plans are for {', '.join(LEARNED)}")
    experts = [(task, entry.model) for task, entry in zip(recipe.tasks, recipe.models, strict=True)]
    packed = PackedWeights.describe(recipe.base_model, experts, dtype=DTYPES[recipe.dtype] or torch.float32, heads=recipe.heads)
    module, logits, calibration = _model_and_calibration(recipe)
    settings = recipe.method_settings()
    teachers = recipe.merge_method != "adamerging"
    return plan(module, packed, calibration, logits, settings, teachers=teachers, device=settings.device)


def run_recipe(recipe: Recipe, out: Path, *, overwrite: bool = False) -> Result:
    """Merges as the recipe says and writes the model folder `out`; nothing appears there before it is whole.

    What could fail for want of space or of a free target is checked first. A learned merge keeps its state in
    `OUT.state` until the folder is written, and continues from it.
    """
    require_target(out, overwrite=overwrite)
    dtype = DTYPES[recipe.dtype]
    experts = [(task, entry.model) for task, entry in zip(recipe.tasks, recipe.models, strict=True)]
    state = out.with_name(f"{out.name}.state")
    budget = recipe.method_settings().memory_budget if recipe.merge_method in LEARNED else None
    in_file = (state / PACKED_FILE).exists() or (budget is not None and plan_recipe(recipe).choose(budget).store == "file")
    packed = PackedWeights.from_folders(
        recipe.base_model,
        experts,
        dtype=dtype or torch.float32,
        task_vector_dtype=DTYPES.get(recipe.task_vector_dtype, recipe.task_vector_dtype),
        heads=recipe.heads,
        file=state / PACKED_FILE if in_file else None,
    )
    sizes = zip(packed.layout.shapes, packed.layout.dtypes, strict=True)
    require_space(out, sum(shape.numel() * (dtype or base_dtype).itemsize for shape, base_dtype in sizes))
    result = _learned(recipe, packed, state) if recipe.merge_method in LEARNED else _data_free(recipe, packed)
    result.save_pretrained(out, dtype=dtype, overwrite=overwrite)
    for name in (STATE_FILE, FEATURES_FILE, PLAN_FILE, PACKED_FILE):  # features: of StatsMerging; the written folder has them too
        (state / name).unlink(missing_ok=True)
    if state.exists() and not any(state.iterdir()):
        state.rmdir()
    return result


def _data_free(recipe: Recipe, packed: PackedWeights) -> Result:
    weights = [entry.parameters.get("weight") for entry in recipe.models]
    settings = recipe.method_settings()
    if recipe.merge_method == "task_arithmetic":
        scale = settings.get("lambda", 1.0)
        return task_arithmetic(packed, [scale * (0.3 if weight is None else weight) for weight in weights])
    shares = torch.tensor([1.0 if weight is None else weight for weight in weights])
    if settings.get("normalize", True):
        shares /= shares.sum()
    elif abs(shares.sum() - 1) > 1e-6:
        raise ValueError(f"linear without normalize needs weights that sum to 1, they sum to {shares.sum():g}")
    result = task_arithmetic(packed, shares)
    result.method = "linear"
    return result


def _learned(recipe: Recipe, packed: PackedWeights, state: Path) -> Result:
    method, config_type = LEARNED[recipe.merge_method]
    module, logits, calibration = _model_and_calibration(recipe)
    return method(module, packed, calibration, logits, config=config_type(**{"checkpoint_dir": state, **recipe.parameters}))


def _model_and_calibration(recipe: Recipe) -> tuple:
    """The model without memory for its weights, its logits function, and the batches of every task."""
    first = next((entry.model for entry in recipe.models if not is_adapter(entry.model)), recipe.base_model)
    with parameters_on_meta():
        module, logits = empty_model(first)
    options = recipe.calibration
    calibration = {
        task: text_batches(read_texts(path, options.texts), first, options.batch_size, options.max_length)
        for task, path in options.files.items()
    }
    return module, logits, calibration
