"""Merging piece by piece: what methods that treat task vectors number by number share, packed or in files."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from samerge_ext.ops.elected_sum import elected_sum
from samerge_ext.ops.weighted_sum import weighted_sum
from samerge_ext.packing.layout import BLOCK
from samerge_ext.packing.packed_weights import PackedWeights
from samerge_ext.packing.stores import InMemory, narrow

PIECE = 1 << 20  # numbers, on a CPU
# Of the task vectors of a piece on a GPU: to read them takes a tenth of a millisecond at 3 TB/s, so that launches, of some
# microseconds, do not count, and what is made of one piece is little beside the task vectors of a large model.
GPU_PIECE_BYTES = 256 << 20
ALIGNMENT = 1 << 16  # numbers; a piece starts at a multiple of it
CHUNK = 1 << 15  # numbers of each row that are computed with at once on a CPU: in fp32 or fp64 they stay in a core's cache


@dataclass
class Piece:
    """Consecutive numbers of one tensor, filled up with zeros to n, a multiple of 1,024.

    start: of the first number in its tensor, a multiple of `ALIGNMENT`, or of the rule's unit. size: numbers without the filling.
    base: [n]. task_vectors: [T, n].
    room: [T, n], for task vectors in the place of these; may be their own.
    """

    start: int
    size: int
    base: Tensor
    task_vectors: Tensor
    room: Tensor

    def rows(self) -> Tensor:
        """[T, size]"""
        return self.task_vectors[:, : self.size]

    def changed(self, change: Callable[[Tensor, Tensor], None]) -> Piece:
        """The piece with task vectors, in its room, that ``change(out, rows)`` [T, size] writes."""
        change(self.room[:, : self.size], self.rows())
        if self.size < self.room.shape[1]:
            self.room[:, self.size :] = 0
        return replace(self, task_vectors=self.room)


class Rule:
    """How one tensor, or the whole vector, is merged. It sees all pieces `rounds` times in order, then merges them in order."""

    rounds = 0
    alone = False  # whether tensors are merged one after the other, since what a rule holds grows with its tensor
    unit = 1  # numbers of a tensor, from its first one on, that lie in one piece together
    parts = 1  # equal parts of a tensor, of whole units, that are merged one after the other, each by itself
    unseen: Collection[int] = ()  # rows of a piece of which the rule drops numbers, whatever they are

    def look(self, piece: Piece) -> None:
        """Sees one piece of a round."""

    def next_round(self) -> None:
        """All pieces were seen."""

    def merge(self, piece: Piece) -> Tensor:  # [n]
        raise NotImplementedError

    @property
    def shares(self) -> list[float]:
        """How much of every task vector is in the merge, were all of it kept."""
        raise NotImplementedError


class WholeRule(Rule):
    """A rule for all tensors as one vector: what it knows between two of them can be kept as JSON and taken up again."""

    def skip(self, piece: Piece) -> None:
        """Goes on as after `merge` of a piece."""
        raise NotImplementedError

    def state(self) -> list:
        raise NotImplementedError

    def restore(self, state: Sequence) -> None:
        raise NotImplementedError


class Combination(Rule):
    """Σ_t w_t τ_t, or with ``elect`` the sum of those that agree with its sign (TIES), times ``scale``; it needs no rounds.

    normalize: divide by the sum of the weights that counted.
    """

    def __init__(self, weights: Sequence[float], scale: float = 1.0, *, normalize: bool = False, elect: bool = False):
        self.weights, self.scale, self.normalize, self.elect = list(weights), scale, normalize, elect
        self._held: dict[tuple[torch.device, torch.dtype], Tensor] = {}  # the weights, or shares, [T]

    def merge(self, piece: Piece) -> Tensor:  # [n]
        wide = torch.float64 if piece.base.dtype == torch.float64 else torch.float32
        weights = self._on(piece.base.device, wide)
        if self.elect:
            return elected_sum(piece.base, piece.task_vectors, weights, self.scale, self.normalize)
        one_layer = torch.zeros(piece.base.numel() // BLOCK, dtype=torch.int32, device=piece.base.device)
        return weighted_sum(piece.base, piece.task_vectors, weights[:, None], one_layer)

    def _on(self, device: torch.device, wide: torch.dtype) -> Tensor:  # [T]
        """What task vectors are multiplied with, copied to a device once."""
        if (device, wide) not in self._held:
            weights = torch.tensor(self.weights, dtype=wide, device="cpu")
            if not self.elect:
                total = weights.sum()
                weights *= self.scale / (total if self.normalize and total.abs() >= 1e-8 else 1)
            self._held[device, wide] = weights.to(device)
        return self._held[device, wide]

    @property
    def shares(self) -> list[float]:
        total = sum(self.weights)
        return [weight * self.scale / (total if self.normalize and abs(total) >= 1e-8 else 1) for weight in self.weights]


def merge_pieces(rule: Rule, pieces: Callable[[], Iterator[Piece]]) -> Iterator[tuple[Piece, Tensor]]:
    """Every piece with its merged numbers [n]; ``pieces`` gives all of them, as often as it is called."""
    for _ in range(rule.rounds):
        for piece in pieces():
            rule.look(piece)
        rule.next_round()
    for piece in pieces():
        yield piece, rule.merge(piece)


def merge_packed(
    packed: PackedWeights,
    rule_of: Callable[[str, torch.Size], Rule],
    *,
    whole: bool = False,
    of: Literal["task_vectors", "experts", "models"] = "task_vectors",
) -> Tensor:
    """[N], every layer by its own ``rule_of(name, shape)``, or with ``whole`` all of them by one, as one vector.

    of: what a piece's rows are: the task vectors; or, beside a base of zeros, the experts' weights, or the base's and theirs.
    """
    layout, task_vectors = packed.layout, packed.whole_task_vectors()
    merged = torch.empty_like(packed.base)
    layers = [layer for layer, offset in enumerate(layout.offsets) if offset is not None]
    numbers = [shape.numel() for shape in layout.shapes]
    room = None
    for group in [layers] if whole else [[layer] for layer in layers]:
        first = group[0]
        rule = rule_of("", torch.Size([sum(numbers)])) if whole else rule_of(layout.names[first], layout.shapes[first])
        assert rule.parts == 1  # blocks are of whole tensors
        at_once = _piece(task_vectors, rule.unit)
        longest = min(at_once, max(layout.extent(layer)[1] for layer in group))
        if of == "task_vectors" and (room is None or room.shape[1] < longest):
            room = _room(task_vectors, longest)
        places = [
            (layout.extent(layer)[0], start, min(at_once, numbers[layer] - start))
            for layer in group
            for start in range(0, numbers[layer], at_once)
        ]
        pieces = functools.partial(_packed_pieces, packed.base, task_vectors, room, places, _ROWS[of])
        results = merge_pieces(rule, pieces)
        for (offset, start, _), (_, result) in zip(places, results, strict=True):
            merged[offset + start : offset + start + result.numel()] = result
    return merged


def _piece(task_vectors: InMemory, unit: int) -> int:
    """Numbers of a piece: whole blocks, since what is beyond the last one is not to be seen."""
    step = ALIGNMENT if unit == 1 else math.lcm(unit, BLOCK)
    if task_vectors.device.type == "cpu":
        return max(1, PIECE // step) * step
    number = task_vectors.dtype.itemsize if isinstance(task_vectors, Tensor) else 4
    return max(1, GPU_PIECE_BYTES // (number * max(1, len(task_vectors)) * step)) * step


def _room(task_vectors: InMemory, length: int) -> Tensor | None:
    """[T, length] for task vectors that are changed; None where they are made anew for each piece."""
    return torch.empty_like(task_vectors[:, :length]) if isinstance(task_vectors, Tensor) else None


def _packed_pieces(
    base: Tensor,
    task_vectors: InMemory,
    room: Tensor | None,
    places: Sequence[tuple[int, int, int]],
    form: Callable[[Piece], Piece],
) -> Iterator[Piece]:
    """places: where the layer begins among all numbers, where the piece does in the layer, and its size. form: see `_ROWS`."""
    for offset, start, size in places:
        first, length = offset + start, -(-size // BLOCK) * BLOCK
        stored = narrow(task_vectors, first, length)
        rows = stored if isinstance(stored, Tensor) else stored.dequantise()
        yield form(Piece(start, size, base[first : first + length], rows, rows if room is None else room[:, :length]))


def _of_models(piece: Piece) -> Piece:
    rows = torch.cat([piece.base[None], piece.task_vectors + piece.base])
    return Piece(piece.start, piece.size, torch.zeros_like(piece.base), rows, rows)


def _of_experts(piece: Piece) -> Piece:
    rows = piece.task_vectors + piece.base
    return Piece(piece.start, piece.size, torch.zeros_like(piece.base), rows, rows)


# What a piece of task vectors becomes.
_ROWS: dict[str, Callable[[Piece], Piece]] = {
    "task_vectors": lambda piece: piece, "experts": _of_experts, "models": _of_models,
}  # fmt: skip


def by_chunks(piece: Piece, merged: Callable[[Tensor, Tensor], Tensor], step: int = 1) -> Tensor:  # [n]
    """The numbers that ``merged(base [m], rows [T, m]) -> [m]`` gives, in fp32 or wider, a chunk of whole ``step``s at a time."""
    out, wide = torch.zeros_like(piece.base), torch.float64 if piece.base.dtype == torch.float64 else torch.float32
    for place in chunks(piece, step):
        out[place] = merged(piece.base[place].to(wide), piece.task_vectors[:, place].to(wide))
    return out


def chunks(piece: Piece, step: int = 1) -> Iterator[slice]:
    """The places of a piece's numbers that are computed with at once: whole ``step``s; on a GPU all."""
    at_once = max(1, (CHUNK if piece.base.device.type == "cpu" else piece.size) // step) * step
    for start in range(0, piece.size, at_once):
        yield slice(start, min(start + at_once, piece.size))


def combination_of(
    packed: PackedWeights, rule: str, weights: float | Sequence[float], scale: float, normalize: bool
) -> Combination:
    """What follows dropping: "linear", or "ties" with an election. Raises ValueError for another rule and for weights."""
    if rule not in ("linear", "ties"):
        raise ValueError(f"rule={rule!r}; choose 'linear' or 'ties'")
    each = per_task(weights, packed.tasks, "weights", -torch.inf, torch.inf)
    return Combination(each, scale, normalize=normalize, elect=rule == "ties")


def per_task(value: float | Sequence[float], tasks: Sequence[str], what: str, low: float, high: float) -> list[float]:
    """One finite number in low … high for every task, from one for all or one each."""
    values = [float(value)] * len(tasks) if isinstance(value, int | float) else [float(v) for v in value]
    if len(values) != len(tasks):
        raise ValueError(f"{what} has {len(values)} values, there are {len(tasks)} tasks; give one number, or one for each task")
    for v in values:
        if not low <= v <= high or v in (torch.inf, -torch.inf):
            raise ValueError(f"{what}={v} is not a number from {low} to {high}")
    return values
