"""How long a study will take here: the tokens that are left to pass through the encoder, times what one takes.

    announcement(bench, seeds, rows, "test")     # "4 experts, then 9 rows of the table: about 2 minutes on 2 threads"

A backward pass counts as two forward ones. What the cache has is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import torch

from samerge_ext.demo.cells import CALIBRATION_TEXTS, LEARNED, SCALES, Row, cell_path, learned_settings
from samerge_ext.demo.experts import encode
from samerge_ext.demo.workbench import Workbench
from samerge_ext.methods.distill_merged import MergedDistillationConfig

FORWARD_AND_BACKWARD = 3
MEASURED_BATCHES = 4
OVERHEAD = 1.2  # optimizers, merging, loading, plots: what is not the encoder, and its smaller batches


def announcement(bench: Workbench, seeds: int, rows: Sequence[Row], split: str) -> str:
    """What is left to do for ``rows`` at seeds 0 … ``seeds`` − 1, and about how long it takes."""
    benches = [bench.at_seed(seed) for seed in range(seeds)]
    experts = sum(not at.expert_path(task).exists() for at in benches for task in bench.tasks)
    cells = [row for at in benches for row in rows if not cell_path(at, row, split).exists()]
    if not (experts or cells):
        return "the cache has all of it"
    tokens = experts * expert_tokens(bench) + sum(row_tokens(bench, row, split) for row in cells)
    seconds = OVERHEAD * tokens * seconds_per_token(bench)
    work = ", then ".join(counted(count, noun) for noun, count in (("expert", experts), ("row", len(cells))) if count)
    return f"{work} of the table: about {duration(seconds)} on {counted(torch.get_num_threads(), 'thread')}"


def expert_tokens(bench: Workbench) -> int:
    protocol = bench.protocol
    return FORWARD_AND_BACKWARD * protocol.steps * protocol.batch * protocol.max_tokens


def row_tokens(bench: Workbench, row: Row, split: str) -> int:
    """Of merging and judging; nearly all texts of a calibration batch are padded to the longest allowed."""
    judged = getattr(bench, split).tokens
    if row.kind in LEARNED:
        config, texts, batch = learned_settings(row.kind, bench, row.settings)
        assert config.steps is not None, "rows have steps, not epochs"
        passes = config.steps * (2 if config.sam == "paper" else 1)
        calibration = (FORWARD_AND_BACKWARD * passes * batch + texts) * bench.protocol.max_tokens
        return judged + len(bench.protocol.tasks) * calibration
    if row.kind == "task_arithmetic" and "scale" not in row.settings:
        return judged + len(SCALES) * bench.tuning.tokens
    if "scales" in row.settings:
        return judged + len(row.settings["scales"]) * bench.tuning.tokens
    if row.kind in ("regmean", "wudi_refitted"):
        epochs = MergedDistillationConfig.epochs if row.settings.get("distilled") else 0
        passes = 2 + epochs * FORWARD_AND_BACKWARD
        return judged + len(bench.protocol.tasks) * passes * CALIBRATION_TEXTS * bench.protocol.max_tokens
    return judged


@torch.inference_mode()
def seconds_per_token(bench: Workbench) -> float:
    """Of a forward pass, measured on a few batches after as many to warm up."""
    module = bench.module()
    batches = [batch for held in bench.tuning.batches.values() for batch, _ in held][:MEASURED_BATCHES]
    for _ in range(2):
        started = perf_counter()
        for batch in batches:
            encode(module, batch)
    return (perf_counter() - started) / sum(batch["input_ids"].numel() for batch in batches)


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def duration(seconds: float) -> str:
    """To a precision that an estimate has: "a minute", "4 minutes", "3 hours"."""
    minutes = round(seconds / 60)
    if minutes < 90:
        return "a minute" if minutes <= 1 else f"{minutes} minutes"
    return f"{round(minutes / 60)} hours"
