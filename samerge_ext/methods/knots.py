"""KnOTS (arXiv 2410.19735): TIES in a basis that all task vectors share.

Task vectors of LoRA experts lie in subspaces that have little to do with each other, so that their numbers do not compare. One
decomposition of all T of them, side by side, gives every matrix a basis U of its outputs, and every task its coefficients in it:

    [τ_1 … τ_T] = U Σ [V_1ᵀ … V_Tᵀ],   C_t = Σ V_tᵀ = Uᵀ τ_t,   M = U · TIES(C_1 … C_T)

TIES trims the coefficients of all matrices as one vector, as the published code does. Of T factored task vectors τ_t = B_t A_t of
rank r, [B_1 … B_T] = Q R leaves [R_1 A_1 … R_T A_T] to be decomposed, of T r rows: no τ_t is multiplied out. A tensor [m, …]
counts as [m, rest], one of one dimension as [1, n]. Directions below 1e-6 of the longest are left out.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from samerge_ext.elementwise.piecewise import Combination, merge_packed, per_task
from samerge_ext.merged.result import Result
from samerge_ext.methods.ties import Ties
from samerge_ext.ops.singular import singular_vectors
from samerge_ext.packing.layout import Layout
from samerge_ext.packing.matrices import MatrixChange, Patterns, Place, matrix_changes, whole
from samerge_ext.packing.packed_weights import PackedWeights


def knots(
    packed: PackedWeights,
    density: float | Sequence[float] = 0.2,
    scale: float = 1.0,
    *,
    weights: float | Sequence[float] = 1.0,
    transposed: Patterns = (),
    module: nn.Module | None = None,
) -> Result:
    """θ₀ + λ M, M as above.

    density: the share of a task's coefficients that is kept, its largest; one for all or one per task.
    scale: λ. weights: of the tasks, in the election of signs and in the mean; one for all or one per task.
    transposed: shell-style patterns of matrices that are stored [inputs, outputs].

    Task vectors may be factors (task_vector_dtype="lora"): of a matrix [m, n], coefficients and bases then take (T n + m) T r
    numbers; otherwise as many as task vectors, and up to m² for a basis, beside 16 T m n + 40 m² bytes for a decomposition.
    Raises ValueError for a density outside of 0 … 1, a pattern that fits nothing, NaN and Inf, and where task vectors are
    quantised; TypeError where they lie in a file.
    """
    started = time.perf_counter()
    densities = per_task(density, packed.tasks, "density", 0.0, 1.0)
    shares = per_task(weights, packed.tasks, "weights", -torch.inf, torch.inf)
    combination = Combination(shares, scale, normalize=True, elect=True)
    wide = torch.promote_types(packed.base.dtype, torch.float32)
    bases: dict[str, Tensor] = {}
    coefficients: dict[str, Tensor] = {}
    places: dict[str, Place] = {}
    for place, changes in matrix_changes(packed, "knots", transposed=transposed):
        places[str(place)] = place
        bases[str(place)], coefficients[str(place)] = (part.to(wide) for part in _in_one_basis(changes))
    rotated = _packed(packed.tasks, coefficients)
    elected = merge_packed(rotated, lambda name, shape: Ties(shape.numel(), wide, densities, combination), whole=True)
    merged = packed.base.clone()
    targets = packed.layout.views(merged)
    for name, values in rotated.layout.views(elected).items():
        places[name].of(targets).add_(bases[name] @ values)
    return Result.of_weights(packed, merged, "knots", module, time.perf_counter() - started)


def _in_one_basis(changes: Sequence[MatrixChange]) -> tuple[Tensor, Tensor]:
    """U [m, r] and the tasks' C_t [T, r, n], fp64."""
    outer, factors = None, [change for change in changes if isinstance(change, tuple)]
    if len(factors) == len(changes):
        outer, inner = torch.linalg.qr(torch.cat([left.double() for left, _ in factors], 1))
        ranks = [left.shape[1] for left, _ in factors]
        blocks = [part @ right.double() for part, (_, right) in zip(inner.split(ranks, 1), factors, strict=True)]
    else:
        blocks = [whole(change) for change in changes]
    left, sigma, right = singular_vectors(torch.cat(blocks, 1))
    rank = int(sigma.count_nonzero())
    coefficients = (right * sigma)[:, :rank].mT.unflatten(1, (len(changes), -1)).transpose(0, 1)
    return left[:, :rank] if outer is None else outer @ left[:, :rank], coefficients


def _packed(tasks: tuple[str, ...], coefficients: dict[str, Tensor]) -> PackedWeights:
    """Coefficients [T, r, n] in the place of task vectors; they are let go one by one."""
    first = next(iter(coefficients.values()))
    shapes = [of_tasks.shape[1:] for of_tasks in coefficients.values()]
    names, count, device = list(coefficients), len(shapes), first.device
    layout = Layout.build(names, shapes, [first.dtype] * count, [True] * count, device)
    task_vectors = torch.zeros(len(tasks), layout.numel, dtype=first.dtype, device=device)
    views = [layout.views(row) for row in task_vectors]
    for name in names:
        for of_task, values in zip(views, coefficients.pop(name), strict=True):
            of_task[name].copy_(values)
    return PackedWeights(layout, tasks, torch.zeros_like(task_vectors[0]), task_vectors)
