"""Sums Σ_t c_t x_t whose coefficients follow from the inner products of the x_t: what is shared by interpolation on spheres."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from samerge_ext.elementwise.piecewise import Combination, Piece, Rule, by_chunks, chunks

Over = Literal["tensor", "rows", "columns"]


class InnerProducts(Rule):
    """base + Σ_t c_t x_t, the x_t the rows of a piece, for a tensor of ``shape``: a `piecewise.Rule`.

    coefficients: of Gram matrices G_st = ⟨x_s, x_t⟩ [..., T, T] in fp64 the c_t [..., T].
    shares: what the coefficients would be, were all x_t at right angles to each other or the like.
    over: one G for the whole tensor; for each of its rows, along the last dimension; or for each column, along the first.

    Products of fp32 numbers are exact in fp64. Over rows no round is needed: a piece holds whole rows.
    """

    def __init__(
        self, shape: torch.Size, shares: Sequence[float], coefficients: Callable[[Tensor], Tensor], over: Over = "tensor"
    ):
        self._shares, self._coefficients, self._over = list(shares), coefficients, over
        self.rounds = 0 if over == "rows" else 1
        if over != "tensor" and shape.numel():
            self.unit = shape[-1] if over == "rows" and shape else shape.numel() // shape[0] if shape else 1
        self._grams: Tensor | None = None  # [T, T], or of columns [C, T, T]
        self._sum: Combination | None = None

    def look(self, piece: Piece) -> None:
        rows, over = piece.rows(), self._over
        columns = self.unit if over == "columns" else 1
        if self._grams is None:
            self._grams = torch.zeros(columns, len(rows), len(rows), dtype=torch.float64, device=rows.device)
        for place in chunks(piece, columns):
            wide = rows[:, place].double().unflatten(1, (-1, columns)).permute(2, 0, 1)  # [C, T, m]
            self._grams += wide @ wide.mT

    def next_round(self) -> None:
        if self._grams is not None and self._over == "tensor":
            self._sum = Combination(self._coefficients(self._grams[0].cpu()).tolist())  # few numbers, and many small steps

    def merge(self, piece: Piece) -> Tensor:  # [n]
        if self._sum is not None:
            return self._sum.merge(piece)
        if self._grams is not None:
            of_columns = self._coefficients(self._grams).mT  # [T, C]
            return by_chunks(piece, lambda base, rows: base + _weighted(rows, of_columns[:, None], self.unit), self.unit)
        return by_chunks(piece, self._of_rows, self.unit)

    def _of_rows(self, base: Tensor, rows: Tensor) -> Tensor:  # [m], [T, m] -> [m]
        wide = rows.double().unflatten(1, (-1, self.unit)).transpose(0, 1)  # [R, T, C]
        return base + _weighted(rows, self._coefficients(wide @ wide.mT).mT[:, :, None], self.unit)

    @property
    def shares(self) -> list[float]:
        return self._shares


def _weighted(rows: Tensor, coefficients: Tensor, columns: int) -> Tensor:  # [T, m], [T, R, C], R or C being 1 -> [m]
    return (rows.unflatten(1, (-1, columns)) * coefficients.to(rows.dtype)).sum(0).flatten()


def norms(grams: Tensor) -> Tensor:  # [..., T, T] -> [..., T]
    return grams.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
