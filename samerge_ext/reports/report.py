"""What is known of a merge: one structure, written as report.json, that the page, the model card and comparisons are made of."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_origin, get_type_hints

from samerge_ext.checkpoints.reading import CheckpointError, read_json

if TYPE_CHECKING:  # two reports are compared without it
    import torch

REPORT_FILE = "report.json"
PAGE_FILE = "report.html"
VERSIONS_OF = ("torch", "transformers", "peft", "safetensors")  # those that had a part, where they were imported


@dataclass
class Report:
    """A merge, in JSON values alone.

    method: its name. models: what was merged, each as `inputs.described`. config: every setting of a learned method.
    recipe: what the file said. versions: package -> version.
    coefficients: task -> layer -> λ; of a merge from file to file what the recipe multiplies task vectors with, where it does.
    history: per step, as `Result.history`.
    merged: "tensors" and "numbers" that were merged, and the "dtypes" that they are written in.
    heads: tasks with tensors of their own.
    run: what differs between equal runs: "seconds", "device", "peak_bytes" (the highest resident memory of the process, whatever
        else it did), "gpu_peak_bytes" beside it, and "planned_bytes" where a plan was made.
    similarity: of the task vectors, as `elementwise.similarity.similarity` gives it. loss_slice: as `recipes.loss_slice` does.
    scores: task -> what `models.evaluation.Score` holds of the merged model on the task's file.
    """

    method: str
    models: list[dict] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    coefficients: dict[str, dict[str, float]] = field(default_factory=dict)
    history: list[dict] = field(default_factory=list)
    merged: dict[str, Any] = field(default_factory=dict)
    heads: list[str] = field(default_factory=list)
    run: dict[str, Any] = field(default_factory=dict)
    similarity: dict[str, Any] = field(default_factory=dict)
    loss_slice: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def layers(self) -> list[str]:
        """The names of the layers that have coefficients, in their order."""
        return list(next(iter(self.coefficients.values()), ()))

    @property
    def experts(self) -> list[dict]:
        """The models without the base."""
        return [model for model in self.models if model["role"] != "base"]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)


def read_report(folder: str | Path) -> Report:
    """The report of a merged model's folder. Raises CheckpointError where there is none, or none of this version."""
    path = Path(folder) / REPORT_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no {REPORT_FILE}: it was merged with --no-report, or not here; merge it again")
    content = read_json(path)
    kinds = {key: get_origin(hint) or hint for key, hint in get_type_hints(Report).items()}
    if "method" not in content or any(key not in kinds or not isinstance(content[key], kinds[key]) for key in content):
        raise _no_report(path)
    return Report(**content)


@contextmanager
def understood(folder: str | Path) -> Iterator[None]:
    """Inside, what a report.json does not hold, or holds in another form, is an error that names it."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise _no_report(Path(folder) / REPORT_FILE) from error


def _no_report(path: Path) -> CheckpointError:
    keys = ", ".join(each.name for each in fields(Report))
    return CheckpointError(f"{path} is no report of this version, which has {keys}; merge the models again")


def as_yaml(recipe: Mapping[str, Any]) -> str:
    """A recipe as its file says it; nothing where there was none."""
    if not recipe:
        return ""
    import yaml  # of the command line, as recipes are

    return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)


def facts_of_run(device: torch.device, seconds: float | None, planned_bytes: int | None = None) -> dict[str, Any]:
    """`Report.run` of a merge that has just ended in this process. seconds: None where another one began it."""
    import torch

    from samerge_ext.memory import peak_resident_bytes

    facts = {"seconds": seconds, "device": str(device), "planned_bytes": planned_bytes, "peak_bytes": peak_resident_bytes()}
    if device.type == "cuda":
        facts["gpu_peak_bytes"] = torch.cuda.max_memory_allocated(device)
    return facts


def versions() -> dict[str, str]:
    """Of the package, Python and what a merge runs on."""
    from samerge_ext import __version__

    found = {"samerge_ext": __version__, "python": platform.python_version()}
    loaded: Mapping[str, Any] = sys.modules
    return found | {name: str(loaded[name].__version__) for name in VERSIONS_OF if hasattr(loaded.get(name), "__version__")}
