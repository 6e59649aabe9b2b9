"""Where base and task vectors live while a streamed model runs, and how some of their numbers come to the device."""

from __future__ import annotations

from torch import Tensor


class Store:
    """Hands out base and task vectors, some numbers at a time.

    device: where what is fetched lies. piece: the most numbers that can be fetched at once, None where all can.
    """

    piece: int | None = None

    def __init__(self, base: Tensor, task_vectors: Tensor):  # [N], [T, N]
        self.base, self.task_vectors = base, task_vectors
        self.device = base.device

    def begin_pass(self) -> None:
        """A pass through the model begins: what was fetched in the last one will be fetched again, in its order."""

    def fetch(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        """base [length] and task vectors [T, length] from number ``start`` on, valid until the next fetch."""
        return self.base[start : start + length], narrow(self.task_vectors, start, length)


def narrow(task_vectors: Tensor, start: int, length: int) -> Tensor:
    """Numbers ``start`` … of task vectors [T, N], as a view; multiples of 1,024. Quantised ones have a `narrow` of their own."""
    return task_vectors[:, start : start + length] if isinstance(task_vectors, Tensor) else task_vectors.narrow(start, length)
