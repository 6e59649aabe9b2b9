"""A streamed model whose base and task vectors are spread over ranks: a unit's weights are gathered just before it runs.

All ranks run the same units in the same order, each on its own batch. While a unit runs, the weights of the next one are on their
way. A unit's gradient is scattered over the ranks as it appears, summed, and contracted with each rank's own task vectors; what
the ranks have found is added up once, when the gradient is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from samerge_ext.merged.resident import Places
from samerge_ext.merged.streamed import StreamedWeights
from samerge_ext.merged.streamed_rows import StreamedRows
from samerge_ext.merged.units import Unit
from samerge_ext.packing.packed_weights import PackedWeights
from samerge_ext.packing.spread_merge import SpreadMerge
from samerge_ext.packing.stores import Store


class SpreadWeights(StreamedWeights):
    """The layers of ``module``, gathered unit by unit while it runs. store: hands out this rank's own base and task vectors.

    At most two units' weights exist, those of a running unit and what is on its way, and the gradient of one, twice while it is
    sent.
    """

    def __init__(
        self,
        module: nn.Module,
        packed: PackedWeights,
        places: Places,
        dtype: torch.dtype | None,
        store: Store,
        units: Sequence[str] = (),
    ):
        assert packed.shards is not None
        self.spread = SpreadMerge(packed.shards, store)
        self._ahead: tuple[Unit, Callable[[], Tensor]] | None = None
        self._last_pass: list[Unit] = []
        self._this_pass: list[Unit] = []
        super().__init__(module, packed, places, dtype, store, units)

    def merge(self, coefficients: Tensor) -> None:
        super().merge(coefficients)
        self._of_ranks = self.spread.of_ranks(self._at.detach())
        self._take_ahead(None)
        if self._this_pass:
            self._last_pass, self._this_pass = self._this_pass, []

    def rows_of(self, layer: int, coefficients: Tensor | None = None) -> StreamedRows | None:
        """None: how many slabs a batch takes depends on its rows, and ranks must gather alike."""
        return None

    def layer(self, layer: int, coefficients: Tensor) -> Tensor:
        return self.packed.merge_layer(layer, coefficients.to(self.device), self.store, self.dtype)

    def coefficient_gradient(self) -> Tensor:
        """∂(Σ over ranks of their losses)/∂λ [T, L], the same on all."""
        return self.spread.shards.ranks.sum(self._gradient.clone())

    def _merged(self, unit: Unit) -> dict[int, Tensor]:
        if self._source is not None:
            return super()._merged(unit)
        with torch.no_grad():
            flat = self._gathered(unit)
        return dict(zip(unit.layers, _Scattered.apply(self._at, flat, self, unit), strict=True))

    def _gathered(self, unit: Unit) -> Tensor:
        """The unit's weights [numel]; begins to gather those that came after it in the last pass."""
        waited = self._take_ahead(unit) or self._start(unit)
        found = waited()
        del waited  # and with it the parts that these are put together from
        self._this_pass.append(unit)
        place = len(self._this_pass)
        if self._last_pass[place - 1 : place] == [unit] and place < len(self._last_pass):
            following = self._last_pass[place]
            self._ahead = following, self._start(following)
        return found

    def _start(self, unit: Unit) -> Callable[[], Tensor]:
        return self.spread.start(unit.layers, self._of_ranks, self.dtype)

    def _take_ahead(self, unit: Unit | None) -> Callable[[], Tensor] | None:
        """What is on its way, if it is this unit; anything else is received, since the others send it, and let go."""
        if self._ahead is None:
            return None
        (coming, waited), self._ahead = self._ahead, None
        if coming is unit:
            return waited
        waited()
        return None

    @torch.no_grad()
    def scatter(self, gradients: Sequence[Tensor | None], unit: Unit) -> None:
        """Contracts the gradients of a unit's layers, in their shapes; None is zero."""
        self.spread.contract(unit.layers, gradients, self.dtype, self._gradient)


class _Scattered(torch.autograd.Function):
    """A unit's layers, views of its weights [numel]: their gradients go into that of the coefficients, outside of autograd."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, flat: Tensor, weights: SpreadWeights, unit: Unit) -> tuple[Tensor, ...]:
        ctx.weights, ctx.unit = weights, unit
        ctx.set_materialize_grads(False)
        shapes, places = weights.packed.layout.shapes, unit.places
        return tuple(flat[places[layer] :][: shapes[layer].numel()].view(shapes[layer]) for layer in unit.layers)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
        ctx.weights.scatter(gradients, ctx.unit)
        return None, None, None, None
