"""Which rows the demo's tables have."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from samerge_ext.demo.cells import STEPS, Row
from samerge_ext.demo.report import CEILING, FLOOR
from samerge_ext.methods.wudi import RIDGE
from samerge_ext.packing.quantised import FORMATS

# Chosen by `samerge demo --study tuning` on labelled training texts of the small variant, seed 0.
TUNED = {
    "samerging": 1e-2,
    "adamerging": 2e-3,
    "statsmerging": 5e-4,
    "samerging, task-wise": 2e-3,
    "adamerging, task-wise": 2e-3,
    "statsmerging, task-wise": 1e-3,
}
LEARNING_RATES = (2e-3, 5e-3, 1e-2, 2e-2)  # of λ
LEARNER_RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3)  # of what predicts λ: many of its parameters act on one coefficient
HEAD_RATE = 3e-4  # of heads
SPECTRAL_SCALES = (0.5, 1.0, 1.5, 2.0, 3.0)  # λ of methods of singular values
RADII = (0.0, 0.02, 0.07, 0.2, 0.5, 1.0)

# Of the small variant's main rows, at rates as much higher as there are fewer steps than the rates were chosen for.
TUNED_STEPS, QUICK_STEPS = STEPS, 60

OURS = "SAMerging"


def learned(label: str, kind: str, **settings: Any) -> Row:
    """A learned row, at its method's tuned learning rate unless one is given."""
    method = f"{kind}, task-wise" if settings.get("granularity") == "task" else kind
    return Row(label, kind, {"learning_rate": TUNED[method], **settings})


def quick(row: Row) -> Row:
    """The same with λ going as far in QUICK_STEPS steps, where the row learns."""
    if "learning_rate" not in row.settings:
        return row
    rate = row.settings["learning_rate"] * TUNED_STEPS / QUICK_STEPS
    return replace(row, settings={**row.settings, "learning_rate": rate, "steps": QUICK_STEPS})


def main_rows(full: bool) -> list[Row]:
    """Every method. On the small variant, which should take minutes, learned rows are quick: their accuracies there are those
    of long ones within 0.3 points."""
    rows = [
        Row("pretrained", "pretrained"),
        Row("average", "average"),
        Row(FLOOR, "task_arithmetic", {"scale": 0.3}),
        Row("Task Arithmetic, best λ", "task_arithmetic"),
        learned("StatsMerging, task-wise", "statsmerging", granularity="task"),
        learned("AdaMerging", "adamerging"),
        learned("StatsMerging", "statsmerging"),
        learned(OURS, "samerging"),
        Row(CEILING, "experts"),
    ]
    return rows if full else [quick(row) for row in rows]


def methods_rows(full: bool) -> list[Row]:
    """What needs no learning, and what learns after a merge, beside Task Arithmetic; on the small variant beside quick rows of
    learned coefficients, too, which take hours on the full one."""
    heads = {"train_heads": "prototypes", "head_learning_rate": HEAD_RATE}
    of_coefficients = [
        quick(learned(OURS, "samerging")),
        quick(learned("SAMerging, heads too", "samerging", **heads)),
        quick(learned("WUDI, then SAMerging, heads too", "samerging", ridge=RIDGE, initial_coefficient=1.0, **heads)),
    ]
    return [
        Row(FLOOR, "task_arithmetic", {"scale": 0.3}),
        Row("TIES", "ties"),
        Row("RegMean", "regmean"),
        Row("Iso-C, best λ", "iso_c", {"scales": SPECTRAL_SCALES}),
        Row("TSV-M, best λ", "tsv_m", {"scales": SPECTRAL_SCALES}),
        *([] if full else of_coefficients),
        Row("WUDI", "wudi"),
        Row("WUDI, heads refitted", "wudi_refitted"),
        Row("WUDI, heads refitted, 16 texts", "wudi_refitted", {"texts": 16}),
        Row("WUDI, distilled, heads refitted", "wudi_refitted", {"distilled": True}),
        Row(CEILING, "experts"),
    ]


def transfer_rows(full: bool) -> list[Row]:
    """The main rows, and what the table of methods has best: for texts that none of them was chosen or learned on."""
    *main, experts = main_rows(full)
    return [
        *main,
        Row("TSV-M, best λ", "tsv_m", {"scales": SPECTRAL_SCALES}),
        Row("WUDI", "wudi"),
        Row("WUDI, heads refitted", "wudi_refitted"),
        Row("WUDI, distilled, heads refitted", "wudi_refitted", {"distilled": True}),
        experts,
    ]


def many_rows(full: bool) -> list[Row]:
    """What shows how methods bear more tasks, and what SAM adds to them; learned rows of the small variant are quick."""
    rows = [
        Row(FLOOR, "task_arithmetic", {"scale": 0.3}),
        Row("TIES", "ties"),
        Row("TSV-M, best λ", "tsv_m", {"scales": SPECTRAL_SCALES}),
        Row("WUDI", "wudi"),
        Row("WUDI, heads refitted", "wudi_refitted"),
        learned("SAMerging, no SAM", "samerging", sam="off"),
        learned(OURS, "samerging"),
        Row(CEILING, "experts"),
    ]
    return rows if full else [quick(row) for row in rows]


def claims_rows(full: bool) -> list[Row]:
    """Claims of the paper: few samples, a start from the pretrained model and, on the small variant, what SAM adds.

    On the full variant AdaMerging gets a second learning rate, since both were tuned on the small one.
    """
    rows = [
        learned(OURS, "samerging"),
        learned("SAMerging, 16 texts", "samerging", texts=16),
        learned("SAMerging, from λ = 0", "samerging", initial_coefficient=0.0),
    ]
    if full:
        return [*rows, learned("AdaMerging, learning rate 0.005", "adamerging", learning_rate=5e-3)]
    return [*rows, learned("SAMerging, no SAM", "samerging", sam="off")]


def tuning_rows(full: bool) -> list[Row]:
    methods: dict[str, tuple[str, dict[str, Any]]] = {
        "SAMerging": ("samerging", {}),
        "AdaMerging": ("adamerging", {}),
        "StatsMerging": ("statsmerging", {}),
        "SAMerging, task-wise": ("samerging", {"granularity": "task"}),
        "AdaMerging, task-wise": ("adamerging", {"granularity": "task"}),
        "StatsMerging, task-wise": ("statsmerging", {"granularity": "task"}),
    }
    return [
        learned(f"{label}, learning rate {rate:g}", kind, learning_rate=rate, **settings)
        for label, (kind, settings) in methods.items()
        for rate in (LEARNER_RATES if kind == "statsmerging" else LEARNING_RATES)
    ]


def ablation_rows(full: bool) -> list[Row]:
    """What SAM adds: its radius and kind, at two sizes of the calibration set."""
    rows = []
    for texts in (16, 64):
        for sam in ("off", "published"):
            rows.append(learned(f"{texts} texts, sam = {sam}", "samerging", texts=texts, sam=sam))
        for adaptive in (False, True):
            for rho in RADII:
                label = f"{texts} texts, {'adaptive' if adaptive else 'plain'}, ρ = {rho:g}"
                rows.append(learned(label, "samerging", texts=texts, sam="paper", rho=rho, adaptive=adaptive))
    return rows


def features_rows(full: bool) -> list[Row]:
    """What StatsMerging gains from its statistics, its loss and its calibration texts."""
    variations: dict[str, dict[str, Any]] = {
        "StatsMerging": {},
        "moments only": {"singular_values": 0},
        "statistics of task vectors": {"of": "task_vectors"},
        "task vectors, moments only": {"of": "task_vectors", "singular_values": 0},
        "a network per layer": {"per_layer": True},
        "KL in place of pseudo-labels": {"loss": "kl"},
        "16 texts": {"texts": 16},
        "256 texts": {"texts": 256},
        "constant learning rate": {"learning_rate_decay": 1.0},
    }
    return [learned(label, "statsmerging", **settings) for label, settings in variations.items()]


def learner_rows(full: bool) -> list[Row]:
    """What StatsMerging's network can tell apart: layers, layers and tasks, tasks; and λ that no network predicts, learned from
    the same most likely classes. Rows of the small variant are quick."""
    # A teacher so cold that all of its probability is on one class: the divergence from it is the cross-entropy.
    most_likely = {"sam": "off", "temperature": 1.0, "teacher_temperature": 1e-3, "weight_decay": 0.0}
    rows = [
        learned("StatsMerging", "statsmerging"),
        learned("StatsMerging, the whole expert's statistics too", "statsmerging", whole_model=True),
        learned("StatsMerging, task-wise", "statsmerging", granularity="task"),
        learned("λ itself, without a network", "samerging", **most_likely),
    ]
    return rows if full else [quick(row) for row in rows]


def quantised_rows(full: bool) -> list[Row]:
    """How far fewer bits of the task vectors take the result from that of fp32."""
    quantised = [learned(f"{OURS}, {form}", "samerging", task_vector_dtype=form) for form in FORMATS]
    return [learned(f"{OURS}, fp32", "samerging"), *quantised]
