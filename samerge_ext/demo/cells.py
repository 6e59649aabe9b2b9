"""One cell of a table: one way of merging, with one seed, on one variant; computed once and kept in a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import samerge_ext as sm
from samerge_ext.checkpoints.saving import atomic_write
from samerge_ext.demo.experts import SCALE, Evaluator, Prototypes, linear_head
from samerge_ext.demo.report import Cell
from samerge_ext.demo.workbench import Bench
from samerge_ext.learning.config import LearningConfig
from samerge_ext.memory import PeakMemory

# Of learned rows, unless a row says otherwise.
CALIBRATION_TEXTS = 64  # per task
BATCH = {"small": 4, "full": 2}  # texts per task and step: 16 either way
DISTILLED_BATCH = 8  # texts per task and step where the merged model is distilled
STEPS = 300
SCALES = tuple(round(0.1 * k, 1) for k in range(1, 11))  # what Task Arithmetic's λ is chosen from, on tuning texts


@dataclass(frozen=True)
class Row:
    """One way of merging.

    label: as the table shows it. kind: a key of `KINDS`.
    settings: of the method's configuration, `texts` (or pictures, per task) and `batch` of its calibration set, the
        `task_vector_dtype` that a learned row packs with, or the `ridge` that its task vectors are preconditioned with.
        `reestimated`: pictures per task that BatchNorm's statistics are estimated on, after the merge that the row is without it.
    """

    label: str
    kind: str
    settings: dict[str, Any] = field(default_factory=dict)


def average(bench: Bench, settings: dict) -> sm.Result:
    return sm.average(bench.packed, module=bench.module())


def task_arithmetic(bench: Bench, settings: dict) -> sm.Result:
    """At `scale`, or at the scale that is best on the tuning texts."""
    return data_free(sm.task_arithmetic, bench, settings if "scale" in settings else {"scales": SCALES})


def data_free(method: Callable[..., sm.Result], bench: Bench, settings: dict) -> sm.Result:
    """With these settings, at that one of `scales` that is best on the tuning texts."""
    if "scales" not in settings:
        return method(bench.packed, **settings, module=bench.module())
    others = {key: value for key, value in settings.items() if key != "scales"}
    results = (method(bench.packed, scale=scale, **others, module=bench.module()) for scale in settings["scales"])
    return max(results, key=lambda result: mean(accuracies_of(result, bench.tuning)))


def regmean(bench: Bench, settings: dict) -> sm.Result:
    calibration = bench.calibration(CALIBRATION_TEXTS, BATCH[bench.protocol.name])
    return sm.regmean(bench.module(), bench.packed, calibration, bench.logits, **settings)


def wudi_refitted(bench: Bench, settings: dict) -> sm.Result:
    """WUDI's encoder, `distilled` or as it is, with heads that answer `texts` texts of each task as its expert does."""
    texts = settings.get("texts", CALIBRATION_TEXTS)
    heads = {task: linear_head(prototypes) for task, prototypes in bench.heads.prototypes.items()}
    logits, result = bench.with_heads(heads), sm.wudi(bench.packed, module=bench.module())
    if settings.get("distilled"):
        config = sm.MergedDistillationConfig(seed=bench.seed, progress=bench.progress)
        result = sm.distill_merged(result, bench.calibration(texts, DISTILLED_BATCH), logits, config=config)
    result = sm.refit_heads(result, bench.calibration(texts, texts), logits, heads)
    return replace(result, heads={task: {"prototypes": head.weight.detach() / SCALE} for task, head in heads.items()})


# kind → its method and its configuration
LEARNED: dict[str, tuple[Callable[..., sm.Result], type[LearningConfig]]] = {
    "samerging": (sm.samerging, sm.SAMergingConfig),
    "adamerging": (sm.adamerging, sm.AdaMergingConfig),
    "statsmerging": (sm.statsmerging, sm.StatsMergingConfig),
}


def learned(kind: str, bench: Bench, settings: dict) -> sm.Result:
    config, texts, batch = learned_settings(kind, bench, settings)
    calibration, packed = bench.calibration(texts, batch), bench.packed_for(settings)
    if not config.train_heads:
        return LEARNED[kind][0](bench.module(), packed, calibration, bench.logits, config=config)
    heads = {task: Prototypes(prototypes) for task, prototypes in bench.heads.prototypes.items()}
    return LEARNED[kind][0](bench.module(), packed, calibration, bench.with_heads(heads), config=config, heads=heads)


def learned_settings(kind: str, bench: Bench, settings: dict) -> tuple[LearningConfig, int, int]:
    """A learned row's configuration, calibration texts per task and texts per task and step."""
    settings = {"steps": STEPS, "shuffle": True, "seed": bench.seed, "progress": bench.progress, **settings}
    texts, batch = settings.pop("texts", CALIBRATION_TEXTS), settings.pop("batch", BATCH[bench.protocol.name])
    for key in ("task_vector_dtype", "ridge"):
        settings.pop(key, None)
    return LEARNED[kind][1](**settings), texts, batch


# How each kind of row makes its merged model; a new method is one more entry.
KINDS: dict[str, Callable[[Bench, dict], sm.Result]] = {
    "average": average,
    "task_arithmetic": task_arithmetic,
    "regmean": regmean,
    "wudi_refitted": wudi_refitted,
    **{method.__name__: partial(data_free, method) for method in (sm.ties, sm.dare, sm.wudi, sm.tsv_m, sm.iso_c)},
    **{kind: partial(learned, kind) for kind in LEARNED},
}


def merged(bench: Bench, row: Row) -> sm.Result:
    """The row's model, merged now; for `reestimated` from what the cell of the merge alone has kept."""
    settings = dict(row.settings)
    samples = settings.pop("reestimated", None)
    if samples is None:
        return KINDS[row.kind](bench, settings)
    result = merged_again(bench, replace(row, settings=settings))
    return sm.reestimate_batchnorm(result, bench.calibration(samples, samples), bench.logits)


def run_cell(bench: Bench, row: Row, split: str = "test", save_to: Path | None = None, again: bool = False) -> dict:
    """The cell's accuracies per task, seconds and peak memory: from its file, or computed now and written to it.

    split: "test", or "tuning" where hyper-parameters are chosen.
    save_to: also keep the merged model's folder there. again: compute it even if its file is there.
    """
    path = cell_path(bench, row, split)
    if path.exists() and not again and (save_to is None or save_to.exists()):
        return json.loads(path.read_text())
    evaluator = getattr(bench, split)
    cell = {"label": row.label, "kind": row.kind, "settings": row.settings, "variant": bench.protocol.name, "seed": bench.seed}
    if row.kind == "pretrained":
        accuracies = evaluator.accuracies(bench.module())
    elif row.kind == "experts":
        accuracies = {task: evaluator.accuracy(bench.load(folder), task) for task, folder in bench.experts.items()}
    else:
        bench.packed_for(row.settings)  # made here, outside of what is measured
        with PeakMemory() as peak:
            started = perf_counter()
            result = merged(bench, row)
            seconds = perf_counter() - started
        accuracies = accuracies_of(result, evaluator)
        cell |= {"seconds": seconds, "peak_bytes": peak.rise}
        if result.coefficients is not None:  # [T, L]: whoever has the experts can merge them again
            cell["coefficients"] = result.coefficients.tolist()
        if result.history:
            losses = [record["loss"] for record in result.history]
            cell |= {"steps": len(losses), "first_loss": losses[0], "last_loss": losses[-1]}
        if save_to is not None:
            result.save_pretrained(save_to, companions=bench.base, overwrite=True)
    cell |= {"accuracies": accuracies, "mean": mean(accuracies)}
    cell["versions"] = {"samerge_ext": sm.__version__, "torch": torch.__version__}
    with atomic_write(path, "w") as file:
        file.write(json.dumps(cell, indent=1))
    return cell


def elsewhere(bench: Bench, row: Row, evaluators: Mapping[str, Evaluator]) -> dict[str, dict[str, float]]:
    """Accuracies of the cell's model on other texts than its own: merged again, from its coefficients where these are all.

    evaluators: by a name of their texts; what one finds is kept in a file of that name beside the cell's.
    """
    paths = {where: cell_path(bench, row, "test").with_suffix(f".{where}.json") for where in evaluators}
    missing = {where: evaluator for where, evaluator in evaluators.items() if not paths[where].exists()}
    if missing:
        accuracies = _accuracies_of_row(bench, row)
        for where, evaluator in missing.items():
            with atomic_write(paths[where], "w") as file:
                file.write(json.dumps(accuracies(evaluator), indent=1))
    return {where: json.loads(path.read_text()) for where, path in paths.items()}


def _accuracies_of_row(bench: Bench, row: Row) -> Callable[[Evaluator], dict[str, float]]:
    if row.kind == "pretrained":
        return lambda evaluator: evaluator.accuracies(bench.module())
    if row.kind == "experts":
        return lambda evaluator: {task: evaluator.accuracy(bench.load(bench.experts[task]), task) for task in evaluator.batches}
    return partial(accuracies_of, merged_again(bench, row))


def merged_again(bench: Bench, row: Row) -> sm.Result:
    """The model of the row's cell: from its coefficients where these are all, else merged anew."""
    if "reestimated" in row.settings:
        return merged(bench, row)
    cell = run_cell(bench, row)
    if row.kind in LEARNED and "coefficients" not in cell:
        cell = run_cell(bench, row, again=True)  # it was computed before cells kept them
    if "coefficients" in cell and not row.settings.get("train_heads"):
        return sm.task_arithmetic(bench.packed_for(row.settings), torch.tensor(cell["coefficients"]), module=bench.module())
    return merged(bench, row)


def as_cell(bench: Bench, row: Row, found: dict) -> Cell:
    """What `run_cell` found, as a row of a table."""
    return Cell(row.label, bench.seed, found["accuracies"], found.get("seconds"), found.get("peak_bytes"))


def accuracies_of(result: sm.Result, evaluator: Evaluator) -> dict[str, float]:
    if result.module is None:
        raise ValueError(f"{result.method} was given no module to merge into")
    trained = {task: head["prototypes"] for task, head in result.heads.items() if "prototypes" in head}
    return evaluator.accuracies(result.module, trained)


def mean(accuracies: dict[str, float]) -> float:
    return sum(accuracies.values()) / len(accuracies)


def cell_path(bench: Bench, row: Row, split: str) -> Path:
    """Named after the row, with a digest of all that its numbers depend on."""
    recipe = [asdict(bench.protocol), row.kind, row.settings, split, CALIBRATION_TEXTS, BATCH[bench.protocol.name], STEPS, SCALES]
    digest = sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:10]
    return bench.cache / "cells" / bench.protocol.name / f"seed{bench.seed}" / f"{row.kind}-{split}-{digest}.json"
