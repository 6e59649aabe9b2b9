"""TIES on packed weights, layer by layer: must read task vectors once per round and once to merge, and the base, and write the
sum, ((rounds + 1) T + 2) N numbers.

The baseline sorts every task vector of a layer. On a GPU the same merge on the CPU takes part too: the time against ours is how
many times as fast the GPU is.
"""

from __future__ import annotations

import functools

import torch
from cases import packed_cases
from inputs import Packed, PackedInputs, error_of
from torch import Tensor

import samerge_ext as sm
from samerge_ext import reference
from samerge_ext.elementwise.magnitudes import kept_count

DENSITY, SCALE = 0.2, 0.7


def ties_cases(device: str, size: str) -> list[Packed]:
    """Without those whose task vectors and what sorting makes of them fill a GPU."""
    return [case for case in packed_cases(device, size) if case.model != "1B"]


def packed_weights(x: PackedInputs) -> sm.PackedWeights:
    tasks = tuple(f"task {t}" for t in range(x.num_tasks))
    return sm.PackedWeights(x.layout, tasks, x.base, x.task_vectors)


def ours(x: PackedInputs):
    packed = packed_weights(x)
    return lambda: sm.ties(packed, DENSITY, SCALE).merged


def on_the_cpu(x: PackedInputs):
    packed = packed_weights(x).to("cpu")
    return lambda: sm.ties(packed, DENSITY, SCALE).merged


def by_sorting(x: PackedInputs):
    def merge():
        merged = x.base.clone()
        for span in x.spans:
            trimmed = sorted_and_trimmed(x.task_vectors[:, span])
            sign = torch.where(trimmed.sum(0) >= 0, 1, -1)
            agrees = trimmed * sign > 0
            mean = torch.where(agrees, trimmed, 0).sum(0) / agrees.sum(0).clamp(min=1)
            merged[span] += SCALE * mean
        return merged

    return merge


def sorted_and_trimmed(rows: Tensor) -> Tensor:  # [T, n] -> [T, n]
    order = rows.abs().sort(dim=1, descending=True, stable=True).indices
    return rows.scatter(1, order[:, kept_count(DENSITY, rows.shape[1]) :], 0)


@functools.lru_cache(maxsize=1)
def truth(x: PackedInputs) -> list[Tensor]:
    """Of the layers that are checked, in fp64."""
    weights = torch.ones(x.num_tasks, dtype=torch.float64, device=x.base.device)
    rows = [sorted_and_trimmed(x.task_vectors[:, span]).double() for span in x.spans[x.checked_layers]]
    bases = [x.base[span].double() for span in x.spans[x.checked_layers]]
    return [reference.elected_sum(base, row, weights, SCALE, True) for base, row in zip(bases, rows, strict=True)]


def error(x: PackedInputs, merged: Tensor) -> float:  # [N]
    if merged.isnan().any():
        return float("nan")
    found = torch.cat([merged[span] for span in x.spans[x.checked_layers]]).to(x.base.device)
    return error_of(found, torch.cat(truth(x)))


CASES = ties_cases
CANDIDATES = {"sort by layer": by_sorting}
CUDA_CANDIDATES = {"the same on the CPU": on_the_cpu}


def bench_ties(x, candidate, measure):
    rounds = x.base.dtype.itemsize // 2
    measure(
        candidate,
        work=(rounds + 1) * x.task_vectors.nbytes + 2 * x.base.nbytes,
        error_of=lambda merged: error(x, merged),
    )
