"""The three largest singular values of many matrices: svd_topk beside torch.linalg.svdvals and torch.svd_lowrank per matrix.

    pytest -s benchmarks/bench_layer_stats.py

Random matrices have the shapes of a ViT-B/32 and a flat spectrum, the hardest case; SAMERGE_BENCH_EXPERTS names a folder with
`base*` and expert model folders, whose task vectors are then measured too. A candidate's largest relative error against fp64
stands beside its time; ours must be within rtol. Candidates take turns in one process.
"""

import os
from pathlib import Path

import pytest
import torch
from measure import interleaved, print_table

import samerge_ext as sm
from samerge_ext.memory import PeakMemory

K = 3


def padded(sigma):  # -> [K], zeros beyond what there is
    return torch.nn.functional.pad(sigma, (0, K))[:K]


def ours(matrices):
    return sm.svd_topk(matrices, K)


def svdvals(matrices):
    return torch.stack([padded(torch.linalg.svdvals(w)) for w in matrices])


def svd_lowrank(matrices):
    return torch.stack([padded(torch.svd_lowrank(w, q=min(8, *w.shape), niter=2)[1]) for w in matrices])


CANDIDATES = {"svd_topk": ours, "torch.linalg.svdvals": svdvals, "torch.svd_lowrank(q=8)": svd_lowrank}


def random_task_vectors():
    shapes = [(768, 768), (3072, 768), (768, 3072), (2304, 768), (768, 768), (512, 768), (3072, 768), (768, 3072)]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def expert_task_vectors():
    folder = os.environ.get("SAMERGE_BENCH_EXPERTS")
    if not folder:
        pytest.skip("SAMERGE_BENCH_EXPERTS names no folder of experts")
    base, *more = sorted(Path(folder).glob("base*"))
    experts = {path.name: path for path in sorted(Path(folder).glob("*seed0*"))}
    assert not more and experts, f"{folder} must hold one folder base* and some *seed0*"
    packed = sm.PackedWeights.from_folders(base, experts)
    return [view for row in packed.task_vectors for view in packed.layout.views(row).values() if view.dim() == 2]


@pytest.mark.parametrize("make", (random_task_vectors, expert_task_vectors), ids=lambda make: make.__name__)
def test_svd_topk(make):
    matrices = make()
    largest = max(matrices, key=torch.Tensor.numel).shape
    expected = torch.stack([padded(torch.linalg.svdvals(w.double())) for w in matrices])
    error = lambda sigma: ((sigma.double() - expected).abs() / expected.clamp(min=1e-300)).where(expected > 0, 0).max().item()
    memory = {}
    for name, candidate in CANDIDATES.items():
        with PeakMemory() as peak:
            candidate(matrices)
        memory[name] = peak.rise
    times = interleaved({name: lambda c=candidate: c(matrices) for name, candidate in CANDIDATES.items()}, rounds=3)
    baseline = times["torch.linalg.svdvals"]["median_s"]
    rows = []
    for name, candidate in CANDIDATES.items():
        seconds = times[name]["median_s"]
        row = {"candidate": name, "ms": seconds * 1e3, "speed-up": baseline / seconds, "MiB": memory[name] / 2**20}
        rows.append({**row, "largest error": error(candidate(matrices))})
    print_table(f"{make.__name__}: {len(matrices)} matrices up to {list(largest)}", rows)
    assert rows[0]["largest error"] <= 1e-3
