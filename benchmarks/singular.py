"""Merges by singular values of eight experts, matrix by matrix of ViT-B/32: samerge_ext beside the published calls.

    python benchmarks/singular.py [--model ViT-B/32] [--save-to benchmarks/results]

The published column is a literal rewrite of what the methods' code calls: torch.linalg.svd of every task vector in fp32 and of
the stacked vectors (TSV-Merge), of the sum (Iso-C), or in fp64 of all task vectors side by side (KnOTS, before TIES). They are
random with singular values that fall as 1/√i, and noise. Below them stand experts that are LoRA adapters of rank 16, factors
for samerge_ext, whole matrices for the published code; LAPACK's vectors beyond the rank are arbitrary, so that there results are
compared for KnOTS alone. Results that differ by more than 1e-4 have no time.

CPU seconds of one thread, of one matrix of every shape times how many the model has of it; ours are the best of two turns.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from time import process_time

import torch
from model_shapes import MODELS
from report import environment
from torch import Tensor

from samerge_ext.methods.isotropic import _common
from samerge_ext.methods.knots import _in_one_basis
from samerge_ext.methods.tsv import _merged

TASKS, RANK, TOLERANCE = 8, 16, 1e-4
Matrices = list[Tensor]  # T of [m, n]


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(matrix, full_matrices=False)


def published_tsv_m(vectors: Matrices) -> Tensor:
    parts = [svd(tau) for tau in vectors]
    kept = len(parts[0][1]) // len(vectors)
    (u, _, vh), (left, _, right) = (
        svd(torch.cat([u[:, :kept] for u, _, _ in parts], 1)),
        svd(torch.cat([vh[:kept] for _, _, vh in parts], 0)),
    )
    return torch.linalg.multi_dot((u, vh, torch.diag(torch.cat([s[:kept] for _, s, _ in parts])), left, right))


def published_iso_c(vectors: Matrices) -> Tensor:
    u, s, vh = svd(sum(vectors))
    return torch.linalg.multi_dot((u, torch.diag(s.mean().expand(len(s))), vh))


def published_knots(vectors: Matrices) -> Tensor:
    """U times the first task's coefficients, which is its task vector."""
    u, s, vh = svd(torch.cat(vectors, 1).double())
    some = s > 1e-5 * s[0]
    u, s, vh = u[:, some].float(), s[some].float(), vh[some].float()
    return u @ (s[:, None] * vh)[:, : vectors[0].shape[1]]


def knots(changes: list) -> Tensor:
    basis, coefficients = (part.float() for part in _in_one_basis(changes))
    return basis @ coefficients[0]


METHODS: dict[str, tuple[Callable, Callable]] = {
    "tsv_m": (_merged, published_tsv_m),
    "iso_c": (_common, published_iso_c),
    "knots": (knots, published_knots),
}


def whole_vectors(m: int, n: int) -> Matrices:
    generator = torch.Generator().manual_seed(0)
    draw = lambda rows, columns: torch.randn(rows, columns, generator=generator)
    side = min(m, n)
    falling = torch.arange(1, side + 1) ** -0.5
    return [1e-4 * ((draw(m, side) * falling) @ draw(side, n) + draw(m, n)) for _ in range(TASKS)]


def factors(m: int, n: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(1e-2 * torch.randn(m, RANK, generator=generator), torch.randn(RANK, n, generator=generator)) for _ in range(TASKS)]


def seconds(call: Callable[[], Tensor], turns: int) -> tuple[float, Tensor]:
    times = []
    for _ in range(turns):
        started = process_time()
        result = call()
        times.append(process_time() - started)
    return min(times), result


def measured(model: str, method: str, lora: bool) -> dict:
    ours, published = METHODS[method]
    shapes = Counter(shape for shape in MODELS[model] if len(shape) == 2 and min(shape) >= TASKS)
    row = {"model": model, "method": method, "experts": f"LoRA, rank {RANK}" if lora else "whole"}
    row |= {"samerge_s": 0.0, "published_s": 0.0}
    for (m, n), count in shapes.items():
        changes = factors(m, n) if lora else whole_vectors(m, n)
        vectors = [left @ right for left, right in changes] if lora else changes
        own, result = seconds(lambda c=changes: ours(c), 2)
        theirs, expected = seconds(lambda v=vectors: published(v), 1)
        error = (result - expected).norm() / expected.norm()
        if (not lora or method == "knots") and error > TOLERANCE:
            raise SystemExit(f"{method} of {m} × {n} differs by {error:.1e}")
        row["samerge_s"] += count * own
        row["published_s"] += count * theirs
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="ViT-B/32")
    parser.add_argument("--save-to", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for method, lora in (("tsv_m", False), ("iso_c", False), ("tsv_m", True), ("iso_c", True), ("knots", True)):
        row = measured(arguments.model, method, lora)
        rows.append(row)
        own, theirs = row["samerge_s"], row["published_s"]
        line = f"{method:6} {row['experts']:14} samerge {own:7.2f} s   published {theirs:7.1f} s   {theirs / own:.1f} x"
        print(line, flush=True)
    if arguments.save_to:
        target = arguments.save_to / "singular-cpu.json"
        target.write_text(json.dumps({"environment": environment("cpu"), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
