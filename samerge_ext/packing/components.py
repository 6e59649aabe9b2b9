"""The leading singular components of task vectors, each to be merged with a coefficient of its own.

AdaRank (arXiv 2503.22178) decides for every component of a task vector's matrix whether it is merged. Here a component has a
coefficient c_{t,r}, and what the leading ones leave of the matrix has the layer's λ_t:

    Σ_t [ Σ_{r ≤ k} c_{t,r} σ_r u_r v_rᵀ + λ_t (τ_t − Σ_{r ≤ k} σ_r u_r v_rᵀ) ]
        = Σ_t λ_t τ_t + Σ_t Σ_{r ≤ k} (c_{t,r} − λ_t) σ_r u_r v_rᵀ

So a merge adds deviations d = c − λ to the merge that all methods share; at d = 0 it is that one, to the bit, whatever the
factors are. A tensor [m, …] counts as [m, rest]; tensors of one dimension have no components.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from samerge_ext.ops.component_sum import component_grad, component_sum
from samerge_ext.ops.singular import leading_components
from samerge_ext.ops.weighted_sum import weighted_sum
from samerge_ext.packing.layout import BLOCK
from samerge_ext.packing.packed_weights import PackedWeights
from samerge_ext.packing.stores import narrow


@dataclass(frozen=True)
class Components:
    """The k leading components of every matrix of T task vectors; fewer where a side is shorter.

    factors: layer's name -> (left [m, T · k], right [n, T · k]), the tasks' one after the other; τ_t is near left_t right_tᵀ.
    ranks: layer's name -> k. The columns of deviations [T, C] are those of the first layer, then those of the next.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]
    ranks: Mapping[str, int]
    num_tasks: int

    @classmethod
    def of(cls, packed: PackedWeights, rank: int) -> Components:
        """Found one matrix after the other, in the coefficients' dtype."""
        task_vectors, layout = packed.whole_task_vectors(), packed.layout
        factors, ranks = {}, {}
        for layer, (name, shape) in enumerate(zip(layout.names, layout.shapes, strict=True)):
            if layout.offsets[layer] is None or len(shape) < 2 or not shape.numel():
                continue
            first, length = layout.extent(layer)
            zero = torch.zeros(length, dtype=packed.coefficient_dtype, device=packed.base.device)
            blocks = torch.zeros(length // BLOCK, dtype=torch.int32, device=zero.device)
            found = []
            for only in torch.eye(packed.num_tasks, dtype=zero.dtype, device=zero.device).unbind():
                flat = weighted_sum(zero, narrow(task_vectors, first, length), only[:, None], blocks)
                found.append(leading_components(flat[: shape.numel()].view(shape[0], -1), rank))
            left, right = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
            factors[name], ranks[name] = (left, right), left.shape[1] // packed.num_tasks
        return cls(factors, ranks, packed.num_tasks)

    @property
    def columns(self) -> int:
        """C, the deviations of a task."""
        return sum(self.ranks.values())

    def split(self, deviations: Tensor) -> dict[str, Tensor]:
        """Of every layer its columns [T, k] of [T, C]."""
        return dict(zip(self.ranks, deviations.split(list(self.ranks.values()), 1), strict=True))

    def add(self, deviations: Tensor, merged: Mapping[str, Tensor]) -> None:
        """Adds Σ_t Σ_r d_{t,r} σ_r u_r v_rᵀ, d [T, C], to the layers of merged weights."""
        for name, of_layer in self.split(deviations).items():
            left, right = self.factors[name]
            merged[name].add_(component_sum(left, right, of_layer.flatten()).view_as(merged[name]))

    def gradient(self, gradient: Mapping[str, Tensor]) -> Tensor:
        """∂loss/∂d [T, C] from the gradients of the layers."""
        found = [
            component_grad(gradient[name].flatten(1), left, right).view(self.num_tasks, -1)
            for name, (left, right) in self.factors.items()
        ]
        return torch.cat(found, 1)
