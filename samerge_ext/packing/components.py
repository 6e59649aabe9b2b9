"""The leading singular components of task vectors, each to be merged with a coefficient of its own.

AdaRank (arXiv 2503.22178) decides for every component of a task vector's matrix whether it is merged. Here a component has a
coefficient c_{t,r}, and what the leading ones leave of the matrix has the layer's λ_t:

    Σ_t [ Σ_{r ≤ k} c_{t,r} σ_r u_r v_rᵀ + λ_t (τ_t − Σ_{r ≤ k} σ_r u_r v_rᵀ) ]
        = Σ_t λ_t τ_t + Σ_t Σ_{r ≤ k} (c_{t,r} − λ_t) σ_r u_r v_rᵀ

So a merge adds deviations d = c − λ to the merge that all methods share; at d = 0 it is that one, to the bit, whatever the
factors are. A tensor [m, …] counts as [m, rest]; tensors of one dimension have no components.

A dense matrix comes from where task vectors lie, one at a time; LoRA factors are decomposed as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from samerge_ext.checkpoints.lora import Change
from samerge_ext.ops.component_sum import component_grad, component_sum
from samerge_ext.ops.singular import singular_vectors
from samerge_ext.ops.svd_topk import search_bytes, svd_topk
from samerge_ext.packing.factors import FactoredTaskVectors
from samerge_ext.packing.packed_weights import PackedWeights
from samerge_ext.packing.shards import Spread
from samerge_ext.packing.stores import Store

Factors = tuple[Tensor, Tensor]  # left [m, T · k], right [n, T · k]
AT_ONCE = 1 << 22  # numbers of a matrix that are fetched, or made of its components, at a time
# Of a component's residual to its σ: coefficients can be learned for any components, and these already hold nearly all of what
# those of the whole decomposition do, of random matrices too, whose values lie closest.
RTOL = 0.1


@dataclass(frozen=True)
class Components:
    """The k leading components of every matrix of T task vectors; fewer where a side, or the rank of all LoRA factors, is less.

    factors: layer's name -> (left [m, T · k], right [n, T · k]), the tasks' one after the other; τ_t is near left_t right_tᵀ.
    The C columns of deviations stand behind the L of λ, [T, L + C]: those of the first layer, then those of the next.
    """

    factors: Mapping[str, Factors]
    num_tasks: int
    num_layers: int

    @classmethod
    def none(cls, packed: PackedWeights) -> Components:
        return cls({}, packed.num_tasks, packed.layout.num_layers)

    @classmethod
    def of(cls, packed: PackedWeights, rank: int, store: Store | None = None) -> Components:
        """Found one matrix after the other, in the coefficients' dtype.

        store: of the same weights, by default packed.store(): where dense task vectors are fetched from, and on whose device
        the factors will be. Beside them it takes one matrix of one task, which is fetched again for every task where it has
        more than 4 Mi numbers. Raises TypeError for weights that are spread over ranks.
        """
        if isinstance(packed.task_vectors, Spread):
            raise packed.task_vectors.not_whole()
        store = store or packed.store()
        stored, names, dtype = packed.task_vectors, packed.layout.names, packed.coefficient_dtype
        factors = {}
        for layer, k in _counts(packed, rank).items():
            if isinstance(stored, FactoredTaskVectors):
                m, n = _sides(packed, layer)
                found = [_of_change(change, m, n, k, dtype) for change in stored.changes[layer]]
                factors[names[layer]] = _side_by_side([(left.to(store.device), right.to(store.device)) for left, right in found])
            else:
                factors[names[layer]] = _fetched(packed, layer, k, store)
        return cls(factors, packed.num_tasks, packed.layout.num_layers)

    @classmethod
    def rehearsed(cls, packed: PackedWeights, rank: int, store: Store) -> Components:
        """Factors without numbers on the store's device, for a dry run: the largest matrix's are searched for, beside all others.

        packed: by its shapes, and its LoRA factors where it has some. store: of tensors without numbers.
        """
        layout, counts = packed.layout, _counts(packed, rank)
        largest = max(counts, key=lambda layer: layout.shapes[layer].numel(), default=None)
        if isinstance(packed.task_vectors, FactoredTaskVectors):
            largest = None  # they are decomposed in next to nothing
        factors = {}
        for layer, k in counts.items():
            if layer != largest:
                left, right = (
                    torch.empty(side, packed.num_tasks * k, dtype=packed.coefficient_dtype, device=store.device)
                    for side in _sides(packed, layer)
                )
                factors[layout.names[layer]] = (left, right)
        if largest is not None:
            factors[layout.names[largest]] = _fetched(packed, largest, counts[largest], store, _rehearsed)
        return cls(factors, packed.num_tasks, layout.num_layers)

    @property
    def columns(self) -> int:
        """C, the deviations of a task."""
        return sum(self.ranks.values())

    @property
    def ranks(self) -> dict[str, int]:
        """Layer's name -> k."""
        return {name: left.shape[1] // self.num_tasks for name, (left, _) in self.factors.items()}

    def to(self, device: torch.device | str) -> Components:
        factors = {name: (left.to(device), right.to(device)) for name, (left, right) in self.factors.items()}
        return Components(factors, self.num_tasks, self.num_layers)

    def split(self, coefficients: Tensor) -> dict[str, Tensor]:
        """Of every layer its deviations [T, k], views of those in [T, L + C]; none of λ alone, [T, L]."""
        if coefficients.shape[1] == self.num_layers:
            return {}
        deviations = coefficients[:, self.num_layers :].split(list(self.ranks.values()), 1)
        return dict(zip(self.factors, deviations, strict=True))

    def add(self, name: str, deviations: Tensor, merged: Tensor) -> None:
        """Adds Σ_t Σ_r d_{t,r} σ_r u_r v_rᵀ, d [T, k], to one layer of merged weights."""
        left, right = self.factors[name]
        rows = _rows(right)
        for part, of_rows in zip(merged.flatten(1).split(rows), left.split(rows), strict=True):
            part.add_(component_sum(of_rows, right, deviations.flatten()))

    def gradient(self, name: str, gradient: Tensor) -> Tensor:
        """∂loss/∂d [T, k] of one layer from its gradient."""
        left, right = self.factors[name]
        rows, found = _rows(right), left.new_zeros(left.shape[1])
        for part, of_rows in zip(gradient.flatten(1).split(rows), left.split(rows), strict=True):
            found += component_grad(part, of_rows, right)
        return found.view(self.num_tasks, -1)


def _counts(packed: PackedWeights, rank: int) -> dict[int, int]:
    """Layer -> k of every matrix that has components."""
    layout, stored = packed.layout, packed.task_vectors
    counts = {}
    for layer, shape in enumerate(layout.shapes):
        if layout.offsets[layer] is None or len(shape) < 2 or not shape.numel():
            continue
        most = min(rank, *_sides(packed, layer))
        if isinstance(stored, FactoredTaskVectors):
            most = min(most, max(_rank(change, most) for change in stored.changes[layer]))
        if most:
            counts[layer] = most
    return counts


def _sides(packed: PackedWeights, layer: int) -> tuple[int, int]:
    """m and n of a layer's matrix."""
    shape = packed.layout.shapes[layer]
    return shape[0], shape[1:].numel()


def _rows(right: Tensor) -> int:
    """Rows of a matrix that are worked on at a time."""
    return max(1, AT_ONCE // right.shape[0])


def _rank(change: Change, otherwise: int) -> int:
    """How many components LoRA factors have at most; otherwise: a tensor."""
    return 0 if change is None else otherwise if isinstance(change, Tensor) else change[0].shape[1]


def _fetched(
    packed: PackedWeights, layer: int, k: int, store: Store, leading: Callable[[Tensor, int], Factors] | None = None
) -> Factors:
    """The components of a layer of dense task vectors, from a store. leading: `_leading`, or what stands for it."""
    first, length = packed.layout.extent(layer)
    m, n = _sides(packed, layer)
    at_once = min(store.piece or AT_ONCE, AT_ONCE)
    flat = torch.empty(length, dtype=packed.coefficient_dtype, device=store.device)
    found = []
    for task in range(packed.num_tasks):
        for start in range(0, length, at_once):
            count = min(at_once, length - start)
            _, task_vectors = store.fetch(first + start, count)
            flat[start : start + count] = task_vectors[task]
        found.append((leading or _leading)(flat[: m * n].view(m, n), k))
    return _side_by_side(found)


def _of_change(change: Change, m: int, n: int, k: int, dtype: torch.dtype) -> Factors:
    """left [m, k] and right [n, k] of what one LoRA expert adds to a matrix; zeros beyond its rank."""
    left, right = (torch.zeros(side, k, dtype=dtype) for side in (m, n))
    if isinstance(change, Tensor):
        return _leading(change.reshape(m, n).to(dtype), k)
    if change is not None:
        u, sigma, v = singular_vectors(change, k)
        left[:, : len(sigma)], right[:, : len(sigma)] = u, v * sigma
    return left, right


def _leading(matrix: Tensor, k: int) -> Factors:
    """left [m, k], orthonormal, and right [n, k], which carries the singular values, of a matrix [m, n]."""
    left, sigma, right = svd_topk([matrix], min(k, *matrix.shape), RTOL, vectors=True)
    return left[0], right[0] * sigma[0]


def _rehearsed(matrix: Tensor, k: int) -> Factors:
    """The memory of `_leading` alone: the search depends on numbers."""
    m, n = matrix.shape
    workspace = torch.empty(search_bytes(m, n, k), dtype=torch.uint8, device=matrix.device)
    factors = matrix.new_empty(m, k), matrix.new_empty(n, k)
    del workspace
    return factors


def _side_by_side(found: list[Factors]) -> Factors:
    """One pair of the tasks' factors."""
    left, right = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    return left, right
