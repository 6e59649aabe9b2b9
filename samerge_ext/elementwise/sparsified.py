"""Task vectors of which some numbers are dropped before they are combined, and what is left of which may be scaled up."""

from __future__ import annotations

import torch
from torch import Tensor

from samerge_ext.elementwise.piecewise import Combination, Piece, Rule, chunks

LEAST = 1e-7  # a sum of magnitudes that is divided by


class Sparsified(Rule):
    """A rule that ends in a combination.

    rescale: what is left of a task vector is multiplied by Σ|τ| / Σ|what is left|, over the tensor, which takes a round more.
    choosing: rounds before that.
    """

    def __init__(self, combination: Combination, rescale: bool, choosing: int = 0):
        self.combination, self.rescale = combination, rescale
        self.rounds = choosing + rescale
        self._choosing = choosing
        self._sums: Tensor | None = None  # of magnitudes before and after, [2, T]
        self._factors: list[float] = []
        self._dropped: tuple[Piece, Piece] | None = None  # the last piece that was looked at, and what is left of it

    def choose(self, piece: Piece) -> None:
        """Sees a piece of one of the rounds before others."""

    def next_choice(self) -> None:
        """One of these rounds is over."""

    def drop(self, out: Tensor, numbers: Tensor, start: int) -> None:
        """Copies ``numbers`` [T, n], the tensor's from ``start`` on, with zeros for what is dropped; out may be the numbers."""
        raise NotImplementedError

    def look(self, piece: Piece) -> None:
        if self._choosing:
            self.choose(piece)
            return
        before = _magnitudes(piece)
        self._dropped = (piece, self._left_of(piece))
        sums = torch.stack([before, _magnitudes(self._dropped[1])])
        self._sums = sums if self._sums is None else self._sums + sums

    def next_round(self) -> None:
        if self._choosing:
            self._choosing -= 1
            self.next_choice()
        elif self._sums is not None:
            before, after = self._sums
            self._factors = torch.where((before < LEAST) | (after < LEAST), 1, before / after).tolist()

    def merge(self, piece: Piece) -> Tensor:  # [n]
        held, self._dropped = self._dropped, None
        left = held[1] if held is not None and held[0] is piece else self._left_of(piece)  # a tensor of one piece is seen again
        for row, factor in zip(left.task_vectors, self._factors, strict=bool(self._factors)):
            row.mul_(factor)
        return self.combination.merge(left)

    def _left_of(self, piece: Piece) -> Piece:
        return piece.changed(lambda out, numbers: self.drop(out, numbers, piece.start))

    @property
    def shares(self) -> list[float]:
        return self.combination.shares


def _magnitudes(piece: Piece) -> Tensor:  # [T]
    rows = piece.rows()
    return torch.stack([rows[:, place].abs().sum(1, dtype=torch.float64) for place in chunks(piece)]).sum(0)
