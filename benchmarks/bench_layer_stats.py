"""svd_topk, the three largest singular values of many matrices, beside a decomposition of each: must be within its rtol.

Random matrices have the shapes of a ViT-B/32 and a flat spectrum, the hardest case. The task vectors are those of the demo's
experts, which `make demo` leaves in .cache-demo; SAMERGE_BENCH_EXPERTS names another folder of `base*` and `*seed0*` models.
The yardstick is one pass of sums over all matrices, of which a candidate takes 1 / share.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
from ceiling import Yardstick
from experts import expert_folders, experts_folder
from torch import Tensor

import samerge_ext as sm

K, RTOL = 3, 1e-3
SKETCH_TOLERANCE = 0.3  # of svd_lowrank, which promises nothing; its error stands in the results
SHAPES = {
    "tiny": [(30, 20), (200, 180)],
    "ViT-B/32": [(768, 768), (3072, 768), (768, 3072), (2304, 768), (768, 768), (512, 768), (3072, 768), (768, 3072)],
    # Of each of eight experts. Their whole models would take the baseline minutes a call.
    "8 x a block of ViT-L/14": 8 * [*4 * [(1024, 1024)], (4096, 1024), (1024, 4096)],
}


@dataclass(frozen=True)
class Matrices:
    name: str  # of SHAPES, or the experts'

    def __str__(self) -> str:
        return self.name

    def tolerance(self, is_ours: bool) -> float:
        return RTOL if is_ours else SKETCH_TOLERANCE

    def needed_bytes(self, device: str) -> int:
        return 0 if self.name == "tiny" else 2**31

    def build(self, device: str) -> Problem:
        if self.name not in SHAPES:
            return Problem([matrix.to(device) for matrix in expert_task_vectors()])
        generator = torch.Generator().manual_seed(0)
        return Problem([torch.randn(shape, generator=generator).to(device) for shape in SHAPES[self.name]])


class Problem:
    def __init__(self, matrices: list[Tensor]):
        self.matrices = matrices

    @cached_property
    def _truth(self) -> Tensor:
        return each(self.matrices, lambda w: torch.linalg.svdvals(w.double()))

    def error_of(self, sigma: Tensor) -> float:
        """The largest relative error; where a value is zero, it must be too."""
        return ((sigma.double() - self._truth).abs() / self._truth.clamp(min=1e-30)).max().item()


def expert_task_vectors() -> list[Tensor]:
    found = expert_folders(experts_folder())
    if not found:
        folder = experts_folder()
        pytest.skip(f"{folder} does not hold one folder base* and some *seed0*: run make demo, or set SAMERGE_BENCH_EXPERTS")
    packed = sm.PackedWeights.from_folders(*found)
    return [view for row in packed.task_vectors for view in packed.layout.views(row).values() if view.dim() == 2]


def each(matrices: list[Tensor], values) -> Tensor:  # -> [B, K], zeros beyond what there is
    return torch.stack([torch.nn.functional.pad(values(w), (0, K))[:K] for w in matrices])


def ours(x: Problem):
    return lambda: sm.svd_topk(x.matrices, K, rtol=RTOL)


def svdvals(x: Problem):
    return lambda: each(x.matrices, torch.linalg.svdvals)


def svd_lowrank(x: Problem):
    return lambda: each(x.matrices, lambda w: torch.svd_lowrank(w, q=min(8, *w.shape), niter=2)[1])


def matrices_cases(device: str, size: str) -> list[Matrices]:
    full = ["ViT-B/32", "MiniLM experts", *(["8 x a block of ViT-L/14"] if device == "cuda" else [])]
    return [Matrices(name) for name in {"tiny": ["tiny"], "quick": ["ViT-B/32"]}.get(size, full)]


CASES = matrices_cases
CANDIDATES = {"torch.linalg.svdvals": svdvals, "torch.svd_lowrank(q=8)": svd_lowrank}


@pytest.fixture(scope="module")
def yardstick(x):
    return Yardstick("one pass", 1, lambda: [w.sum() for w in x.matrices])


def bench_layer_stats(x, candidate, measure, yardstick):
    measure(candidate, work=1, error_of=x.error_of, yardstick=yardstick)
