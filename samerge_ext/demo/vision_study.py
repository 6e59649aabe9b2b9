"""A convolutional network merged by every method: accuracy on pictures as they are and corrupted, BatchNorm's statistics averaged
and estimated anew.

    samerge demo --study vision              # after make data-vision
    samerge demo --study vision-tuning       # what learning rates were chosen by, on labelled tuning pictures
    samerge demo --study vision-statistics   # experts with BatchNorm statistics of their own

What a row chooses (λ) comes from tuning pictures, what it learns from calibration pictures; no test picture is seen before the
end. RegMean is left out: it solves linear layers, and the network has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from samerge_ext.demo.cells import Row, as_cell, elsewhere, run_cell
from samerge_ext.demo.pictures import PictureSplit, corrupted
from samerge_ext.demo.report import CEILING, FLOOR, Cell
from samerge_ext.demo.vision import PictureEvaluator, VisionBench
from samerge_ext.methods.wudi import RIDGE

STEPS, BATCH, SAMPLES = 50, 4, 64  # of learned rows: steps, pictures per task and step, calibration pictures per task
AGAIN = ", BatchNorm re-estimated"
REESTIMATED = 32  # calibration pictures per task, for BatchNorm's statistics
# Chosen by `samerge demo --study vision-tuning`, seed 0.
RATES = {"samerging": 2e-1, "adamerging": 2e-2, "statsmerging": 5e-3}
TRIED = {"samerging": (2e-2, 5e-2, 1e-1, 2e-1), "adamerging": (1e-2, 2e-2, 5e-2), "statsmerging": (2e-3, 5e-3, 1e-2, 2e-2)}
SPECTRAL_SCALES = (0.5, 1.0, 1.5, 2.0, 3.0)  # λ of methods of singular values
DEPTHWISE = "*depthwise_conv.weight"

# Level by level what `corrupted` takes; the last is what one still recognises.
CORRUPTIONS = {"noise": (0.05, 0.1, 0.2), "blur": (0.5, 1.0, 2.0), "contrast": (0.5, 0.3, 0.15)}
CORRUPTED = 60  # test pictures of each task, for each kind and level


def learned(label: str, kind: str, **settings: Any) -> Row:
    settings = {"steps": STEPS, "batch": BATCH, "texts": SAMPLES, "learning_rate": RATES[kind], **settings}
    return Row(label, kind, settings)


def reestimated(row: Row) -> Row:
    settings = {**row.settings, "reestimated": REESTIMATED}
    return replace(row, label=row.label + AGAIN, settings=settings)


def vision_rows() -> list[Row]:
    arithmetic, wudi = Row("Task Arithmetic, best λ", "task_arithmetic"), Row("WUDI", "wudi")
    average, ours = Row("average", "average"), learned("SAMerging", "samerging")
    nothing = Row("pretrained", "task_arithmetic", {"scale": 0.0})  # a merge, whose statistics can be estimated anew
    return [
        Row("pretrained", "pretrained"),
        average,
        Row(FLOOR, "task_arithmetic", {"scale": 0.3}),
        arithmetic,
        Row("TIES, best λ", "ties", {"scales": (0.5, 1.0, 2.0)}),
        Row("DARE, λ = 0.3", "dare", {"scale": 0.3}),
        Row("Iso-C, best λ", "iso_c", {"scales": SPECTRAL_SCALES}),
        Row("TSV-M, best λ", "tsv_m", {"scales": SPECTRAL_SCALES}),
        Row("TSV-M, best λ, depthwise kernels averaged", "tsv_m", {"scales": SPECTRAL_SCALES, "averaged": DEPTHWISE}),
        wudi,
        learned("StatsMerging", "statsmerging"),
        learned("AdaMerging", "adamerging"),
        learned("SAMerging, no SAM", "samerging", sam="off"),
        ours,
        learned("WUDI, then SAMerging, no SAM", "samerging", sam="off", ridge=RIDGE, initial_coefficient=1.0),
        *map(reestimated, (nothing, average, arithmetic, wudi, ours)),
        Row("WUDI, heads refitted", "wudi_refitted", {"texts": SAMPLES}),
        Row("WUDI, distilled, heads refitted", "wudi_refitted", {"texts": SAMPLES, "distilled": True}),
        Row(CEILING, "experts"),
    ]


def corrupted_rows() -> list[Row]:
    """Those of `vision_rows` that are judged on corrupted pictures, too."""
    wanted = (
        "average",
        "Task Arithmetic, best λ",
        "TSV-M, best λ",
        "WUDI",
        "AdaMerging",
        "SAMerging, no SAM",
        "SAMerging",
        CEILING,
    )
    return [row for row in vision_rows() if row.label in wanted]


def statistics_rows() -> list[Row]:
    """What shows how statistics of the experts' own bear being averaged."""
    merges = ("average", "Task Arithmetic, best λ", "WUDI", "SAMerging")
    wanted = ("pretrained", *merges, *(label + AGAIN for label in merges), CEILING)
    return [row for row in vision_rows() if row.label in wanted]


def vision_study(bench: VisionBench, out: Path) -> Iterator[tuple[str, Cell]]:
    """Every method on test pictures, then means over tasks by corruption and level."""
    for row in vision_rows():
        yield "accuracy on test pictures, %", as_cell(bench, row, run_cell(bench, row))
    judges = corrupted_judges(bench)
    for row in corrupted_rows():
        found = elsewhere(bench, row, judges)
        means = {where.replace("-", " "): mean(accuracies.values()) for where, accuracies in found.items()}
        yield f"mean accuracy over tasks on {CORRUPTED} corrupted test pictures of each, %", Cell(row.label, bench.seed, means)


def vision_statistics_study(bench: VisionBench, out: Path) -> Iterator[tuple[str, Cell]]:
    """Experts with BatchNorm statistics of their own, merged with the average of these and with others."""
    own = bench.with_own_statistics()
    for row in statistics_rows():
        yield (
            "experts with BatchNorm statistics of their own: accuracy on test pictures, %",
            as_cell(own, row, run_cell(own, row)),
        )


def corrupted_judges(bench: VisionBench) -> dict[str, PictureEvaluator]:
    """By kind and level, "noise-0.05" say; clean pictures first, of which there are as many."""
    clean = {
        name: PictureSplit(task.test.pictures[:CORRUPTED], task.test.labels[:CORRUPTED]) for name, task in bench.tasks.items()
    }
    judges = {"clean": PictureEvaluator(clean, bench.heads, "clean pictures", bench.progress)}
    for kind, levels in CORRUPTIONS.items():
        for level in levels:
            splits = {name: replace(split, pictures=corrupted(split.pictures, kind, level)) for name, split in clean.items()}
            where = f"{kind}-{level:g}"
            judges[where] = PictureEvaluator(splits, bench.heads, f"{where} pictures", bench.progress)
    return judges


def vision_tuning_study(bench: VisionBench, out: Path) -> Iterator[tuple[str, Cell]]:
    """Learned rows at the rates of TRIED."""
    labels = {"samerging": "SAMerging, no SAM", "adamerging": "AdaMerging", "statsmerging": "StatsMerging"}
    for kind, rates in TRIED.items():
        settings = {"sam": "off"} if kind == "samerging" else {}
        for rate in rates:
            row = learned(f"{labels[kind]}, learning rate {rate:g}", kind, learning_rate=rate, **settings)
            yield "accuracy on tuning pictures, %", as_cell(bench, row, run_cell(bench, row, "tuning"))
