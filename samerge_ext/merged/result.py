"""What a merge method returns, and how it is saved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from samerge_ext.checkpoints.companions import Companions, with_dtype, without_quantisation
from samerge_ext.checkpoints.folder import read_config
from samerge_ext.checkpoints.places import folder_of
from samerge_ext.checkpoints.saving import require_apart, save_checkpoint
from samerge_ext.merged.model import MergedModel
from samerge_ext.packing.components import Components
from samerge_ext.packing.packed_weights import PackedWeights
from samerge_ext.reports.inputs import IN_MEMORY, described
from samerge_ext.reports.report import Report, facts_of_run, versions
from samerge_ext.reports.writing import report_files
from samerge_ext.statistics.features import FEATURES_FILE, Features
from samerge_ext.statistics.learner import LEARNER_FILE, StatsMergeLearner

STREAMED_SHARD = "256MB"  # a shard is held in memory until it is written


@dataclass
class Result:
    """A merged model.

    packed: what was merged. coefficients: [T, L], None for methods that have none.
    merged: [N], the packed layers; None where the model was streamed, whose layers are merged one by one as they are saved.
    method, config, seconds: how it was made. module: the merged module, where one was given.
    history: per step of a learned method the loss, each task's loss and the gradient norm; where batches were held back, their
        loss before the steps at which it was measured.
    component_coefficients: layer -> [T, k] of its task vectors' leading singular components, where these were learned;
        ``coefficients`` are then those of the rest. components: the factors of these, where there is no ``merged``.
    planned_bytes: the peak of memory that a plan foresaw, where one was made.
    heads: task -> its own tensors: those that were learned as they are now, the others as they were packed.
    buffers: running statistics that were estimated anew; the others are the average of the experts'.
    learner, features: what predicted the coefficients, and from which statistics, where that is how they were made.
    """

    packed: PackedWeights
    coefficients: Tensor | None
    merged: Tensor | None
    method: str
    config: Any = None
    history: list[dict] = field(default_factory=list)
    seconds: float = 0.0
    module: nn.Module | None = None
    learner: StatsMergeLearner | None = None
    features: Features | None = None
    heads: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    component_coefficients: dict[str, Tensor] = field(default_factory=dict)
    components: Components | None = None
    planned_bytes: int | None = None
    buffers: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.heads = self.heads or self.packed.heads

    @classmethod
    def of_model(cls, model: MergedModel, method: str, config: Any, history: list[dict], seconds: float) -> Result:
        """The model as it is merged now; its gradient buffer is let go."""
        model.unbind_gradients()
        result = cls(model.packed, None, model.merged, method, config, history, seconds, model.module, heads=model.heads())
        result.coefficients = model.coefficients.detach()[:, : model.packed.layout.num_layers].clone()
        result.component_coefficients = model.component_coefficients()
        if model.merged is None and result.component_coefficients:
            result.components = model.weights.components.to(model.packed.base.device)
        result.planned_bytes = model.planned_bytes
        return result

    @classmethod
    def of_weights(cls, packed: PackedWeights, merged: Tensor, method: str, module: nn.Module | None, seconds: float) -> Result:
        """Merged weights [N] that no coefficients make; ``module``, where given, takes them on."""
        if module is not None:
            model = MergedModel(module, packed, 0.0)
            merged = model.take_on(merged)
            model.unbind_gradients()
            module = model.module
        return cls(packed, None, merged, method, seconds=seconds, module=module)

    def state_dict(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The merged model's tensors in the base's names, order and dtypes (or ``dtype``); heads are in ``heads``."""
        merged = self.merged
        if merged is None:
            merged = self.packed.merge(self._merged_at())
            for name, view in self.packed.layout.views(merged).items():
                self._add_components(name, view)
        return {**self.packed.state_dict(merged, dtype), **self.buffers}

    def save_pretrained(
        self,
        path: str | Path,
        *,
        card: str | None = None,
        companions: str | Path | Companions | None = None,
        dtype: torch.dtype | None = None,
        overwrite: bool = False,
        report: bool = True,
        recipe: Mapping[str, Any] | None = None,
    ) -> Path:
        """Writes a model folder that transformers loads; it appears whole or not at all.

        model.safetensors (or shards) in the base's dtypes or in ``dtype``, the configuration, tokenizer and whatever else is no
        weight of ``companions`` (the base's folder by default; otherwise the module's own configuration),
        heads/TASK.safetensors where tasks have heads, learner/ where the coefficients were predicted (the learner, and the
        statistics), coefficients.json, README.md, the model card (``card``, or the report's), and with ``report`` report.html and
        report.json: what was merged and how, for people and for `samerge report`. recipe: what the merge followed, for both.

        Where weights are spread over ranks all of them call it: the first one writes, and all return when the folder is whole.
        """
        if not self.packed.ranks.is_first:
            self._take_part(dtype)
            return Path(path)
        require_apart(path, [*map(Path, self.packed.inputs), *([] if self.packed.folder is None else [self.packed.folder])])
        files = self.files_beside_weights()
        companions = self._companions(companions)
        configuration = self._configuration(companions)
        if configuration and dtype:
            configuration = with_dtype({"dtype": None, **configuration}, dtype)
        if configuration:
            files["config.json"] = json.dumps(configuration, indent=2)
        about = self.report(dtype, recipe)
        files |= report_files(about, Path(path).resolve().name, configuration, card=card, with_page=report)
        write = partial(save_checkpoint, path, companions_from=companions, extra_files=files, overwrite=overwrite)
        if self.merged is None:
            streamed = self.packed.as_stored(self.packed.tensors(self._merged_at(), dtype, self._add_components))
            written = write(streamed, shard_size=STREAMED_SHARD)
        else:
            tensors = {n: t.detach().cpu() for n, t in self.state_dict(dtype).items() if n not in self.packed.aliases}
            written = write(tensors if self.packed.conversion is None else self.packed.as_stored(tensors.items()))
        self.packed.ranks.wait()
        return written

    def files_beside_weights(self) -> dict[str, bytes | str]:
        """The merge's own files in its folder, path -> content: coefficients.json, heads/ of tasks that have some, learner/."""
        files: dict[str, bytes | str] = {"coefficients.json": json.dumps(self.summary(), indent=1)}
        for task, head in self.heads.items():
            if head:
                files[f"heads/{task}.safetensors"] = save({n: t.contiguous().cpu() for n, t in head.items()})
        if self.learner is not None:
            files[f"learner/{LEARNER_FILE}"] = self.learner.to_bytes()
        if self.features is not None:
            files[f"learner/{FEATURES_FILE}"] = self.features.to_bytes()
        return files

    def _take_part(self, dtype: torch.dtype | None) -> None:
        """What the other ranks do while the first one writes: merge with it what it merges layer by layer."""
        if self.merged is None:
            for _ in self.packed.tensors(self._merged_at(), dtype):
                pass
        self.packed.ranks.wait()

    def summary(self) -> dict:
        """Method, configuration, versions and λ as {task: {layer: coefficient}}, ready for JSON: equal for equal runs.

        Of the configuration what has no part in the result (``WITHOUT_EFFECT``) is left out: where its state lay, and so on.
        """
        from samerge_ext import __version__

        settings = asdict(self.config) if is_dataclass(self.config) and not isinstance(self.config, type) else {}
        for key in getattr(self.config, "WITHOUT_EFFECT", ()):
            del settings[key]
        names = self.packed.layout.names
        summary = {
            "method": self.method,
            "config": {key: str(value) if isinstance(value, Path) else _plain(value) for key, value in settings.items()},
            "steps": len(self.history),
            "versions": {"samerge_ext": __version__, "torch": torch.__version__},
            "coefficients": {task: dict(zip(names, row.tolist(), strict=True)) for task, row in self._rows()},
        }
        if self.component_coefficients:
            summary["component_coefficients"] = {
                task: {name: of_layer[row].tolist() for name, of_layer in self.component_coefficients.items()}
                for row, task in enumerate(self.packed.tasks)
            }
        return summary

    def to_pandas(self, what: str = "coefficients") -> Any:
        """A DataFrame of the coefficients: a row for every layer and a column for every task, by their names. Or of the
        "history": a row for every step, with the tasks' losses in columns "losses.TASK".

        Raises ImportError without pandas, ValueError for a method that has no coefficients, or none of what is asked for.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("a DataFrame needs pandas, which is missing; install it: pip install pandas") from error
        held = {"coefficients": self.coefficients is not None, "history": bool(self.history)}
        if not held.get(what):
            there = " and ".join(name for name, is_there in held.items() if is_there) or "neither coefficients nor a history"
            raise ValueError(f"{self.method} has no {what!r} to show; it has {there}")
        if what == "history":
            return pandas.json_normalize(self.history).set_index("step")
        layers = pandas.Index(self.packed.layout.names, name="layer")
        return pandas.DataFrame({task: row.tolist() for task, row in self._rows()}, index=layers)

    def report(self, dtype: torch.dtype | None = None, recipe: Mapping[str, Any] | None = None) -> Report:
        """What is known of the merge, were it written now. dtype, recipe: as of `save_pretrained`."""
        summary, layout = self.summary(), self.packed.layout
        return Report(
            method=self.method,
            models=self._models(),
            config=summary["config"],
            recipe=dict(recipe or {}),
            versions=versions(),
            coefficients=summary["coefficients"],
            history=self.history,
            merged={
                "tensors": layout.num_layers,
                "numbers": sum(shape.numel() for shape in layout.shapes),
                "dtypes": sorted({str(dtype or of_layer).removeprefix("torch.") for of_layer in layout.dtypes}),
            },
            heads=[task for task, head in self.heads.items() if head],
            run=facts_of_run(layout.block_layer.device, self.seconds, self.planned_bytes),
        )

    def _models(self) -> list[dict]:
        """The base and the experts, as a report describes them."""
        places = {task: self.packed.places.get(task, IN_MEMORY) for task in self.packed.tasks}
        base = described("base", "base", self.packed.folder or IN_MEMORY)
        return [base, *(described(task, "expert", place) for task, place in places.items())]

    def _companions(self, given: str | Path | Companions | None) -> Companions | None:
        """What goes along, with the tokenizer whose tokens the rows are."""
        if given is None and self.packed.folder is None:
            return None
        found = given if isinstance(given, Companions) else Companions(folder_of(given or self.packed.folder or ""))
        return found if self.packed.tokenizer is None else replace(found, tokenizer=self.packed.tokenizer)

    def _configuration(self, companions: Companions | None) -> dict | None:
        """The content of config.json, from the folder or the module that has one; the architecture is the module's."""
        if companions is not None:
            found = read_config(companions.folder) if (companions.folder / "config.json").exists() else None
            found = companions.configuration(without_quantisation(found)) if found else None
            if found and type(self.module).__module__.startswith("transformers."):
                found["architectures"] = [type(self.module).__name__]
            return found
        to_json = getattr(getattr(self.module, "config", None), "to_json_string", None)
        return json.loads(to_json()) if to_json else None

    def _merged_at(self) -> Tensor:
        """The coefficients of weights that are not held."""
        if self.coefficients is None:
            raise ValueError(f"this result of {self.method} has neither merged weights nor coefficients to merge at")
        return self.coefficients

    def _add_components(self, name: str, merged: Tensor) -> None:
        """Makes of a layer that is merged at λ the one in which its components have coefficients of their own."""
        if self.components is not None and name in self.component_coefficients:
            of_layer = self.component_coefficients[name] - self._merged_at()[:, [self.packed.layout.names.index(name)]]
            self.components.add(name, of_layer.to(merged.device), merged)

    def _rows(self) -> list[tuple[str, Tensor]]:
        """Every task's coefficients [L]; none where the method has none."""
        return [] if self.coefficients is None else list(zip(self.packed.tasks, self.coefficients, strict=True))


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value
