"""Merges by singular values of eight experts, matrix by matrix of a model: samerge_ext beside the published calls.

    python benchmarks/singular.py [--model ViT-B/32 | Llama-3.2-1B] [--experts whole | LoRA] [--save-to benchmarks/results]

First what a CPU's floor is made of: seconds of a product of two square matrices in fp32, and how many of these the symmetric
eigenproblem and LAPACK's singular value decomposition cost.

The published column is a literal rewrite of what the methods' code calls: torch.linalg.svd of every task vector in fp32 and of
the stacked vectors (TSV-Merge), of the sum (Iso-C), or in fp64 of all task vectors side by side (KnOTS, before TIES). They are
random with singular values that fall as 1/√i, and noise. Below them stand experts that are LoRA adapters of rank 16, factors
for samerge_ext, whole matrices for the published code; LAPACK's vectors beyond the rank are arbitrary, so that there results are
compared for KnOTS alone. Results that differ by more than 1e-4 have no time.

CPU seconds of one thread, of one matrix of every shape times how many the model has of it; ours are the best of two turns where
one takes less than five seconds. Left out, and named, is a shape of which the published code decomposes more than 2²⁶ numbers: an
embedding of tokens, which in use is averaged (`averaged="*embed*"`), and for all but Iso-C the matrices of Llama's MLP.
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
LARGEST = 2**26  # numbers that are decomposed
PATIENCE = 5.0  # seconds
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


def seconds(call: Callable[[], object], turns: int = 2) -> tuple[float, object]:
    times: list[float] = []
    while len(times) < turns and sum(times) < PATIENCE:
        started = process_time()
        result = call()
        times.append(process_time() - started)
    return min(times), result


def primitives(side: int) -> dict:
    """Seconds of an fp32 product of square matrices, and of what merges are made of in such products."""
    draw = lambda m, n: torch.randn(m, n, generator=torch.Generator().manual_seed(0))
    square = draw(side, side)
    product, _ = seconds(lambda: square @ square, 5)
    row = {"side": side, "product_s": product}
    for name, dtype in (("fp32", torch.float32), ("fp64", torch.float64)):
        matrix = square.to(dtype)
        gram = matrix.mT @ matrix
        if dtype == torch.float64:
            row["product fp64"] = seconds(lambda m=matrix: m @ m, 5)[0] / product
        row[f"eigh {name}"] = seconds(lambda g=gram: torch.linalg.eigh(g))[0] / product
        row[f"svd {name}"] = seconds(lambda m=matrix: svd(m))[0] / product
    tall, wide = draw(4 * side, side), draw(side, 4 * side)
    row["svd fp32, 4 times as tall"] = seconds(lambda: svd(tall))[0] / product
    row["svd fp32, 4 times as wide"] = seconds(lambda: svd(wide))[0] / product
    return row


def measured(model: str, method: str, lora: bool) -> dict:
    ours, published = METHODS[method]
    shapes = Counter(shape for shape in MODELS[model] if len(shape) == 2 and min(shape) >= TASKS)
    row = {"method": method, "experts": f"LoRA, rank {RANK}" if lora else "whole"}
    row |= {"samerge_s": 0.0, "published_s": 0.0, "difference": 0.0, "left_out": []}
    for (m, n), count in shapes.items():
        if m * n * (1 if method == "iso_c" else TASKS) > LARGEST:
            row["left_out"].append([m, n])
            continue
        changes = factors(m, n) if lora else whole_vectors(m, n)
        vectors = [left @ right for left, right in changes] if lora else changes
        own, result = seconds(lambda c=changes: ours(c))
        theirs, expected = seconds(lambda v=vectors: published(v), 1)
        if not lora or method == "knots":
            error = ((result - expected).norm() / expected.norm()).item()
            if error > TOLERANCE:
                raise SystemExit(f"{method} of {m} × {n} differs by {error:.1e}")
            row["difference"] = max(row["difference"], error)
        row["samerge_s"] += count * own
        row["published_s"] += count * theirs
        print(f"  {m} × {n}: {own:.3g} s, published {theirs:.3g} s, {count} of them", flush=True)
    return row


def save(folder: Path, model: str, found: dict) -> None:
    """In the place of what an earlier run has found of the same model and method."""
    target = folder / "singular-cpu.json"
    held = json.loads(target.read_text()) if target.exists() else {}
    of_model = held.setdefault(model, {})
    of_model[" ".join(found[key] for key in ("method", "experts") if key in found) or "products"] = found
    target.write_text(json.dumps(held, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="ViT-B/32")
    parser.add_argument("--experts", choices=("whole", "LoRA"), help="both by default")
    parser.add_argument("--save-to", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep = lambda found: arguments.save_to and save(arguments.save_to, arguments.model, environment("cpu") | found)
    if arguments.experts != "LoRA":
        row = primitives(max(shape[0] for shape in MODELS[arguments.model] if len(shape) == 2 and shape[0] == shape[1]))
        keep(row)
        side, product, *rest = row.items()
        print(f"a product of two matrices [{side[1]}, {side[1]}] in fp32: {1e3 * product[1]:.3g} ms; in such products:")
        print("  " + ", ".join(f"{name} {value:.1f}" for name, value in rest), flush=True)
    for method, lora in (("tsv_m", False), ("iso_c", False), ("tsv_m", True), ("iso_c", True), ("knots", True)):
        if arguments.experts not in (None, "LoRA" if lora else "whole"):
            continue
        row = measured(arguments.model, method, lora)
        keep(row)
        own, theirs = row["samerge_s"], row["published_s"]
        line = f"{method:6} {row['experts']:14} samerge {own:7.2f} s   published {theirs:7.1f} s   {theirs / own:.1f} x"
        out = "".join(f", without {m} × {n}" for m, n in row["left_out"])
        print(line + f"   differ by {row['difference']:.0e}" * (row["difference"] > 0) + out, flush=True)


if __name__ == "__main__":
    main()
