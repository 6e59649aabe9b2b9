"""The processes that a merge is spread over, and what they send to each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# As torch 2.13 calls them; earlier ones know only the second name.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class LostRankError(ConnectionError):
    """What was to come from the other ranks did not. The cause is torch.distributed's own error."""


@dataclass(frozen=True)
class Ranks:
    """W processes of a torch.distributed group, this one among them. A process alone needs no group.

    Every method is called by all ranks, in one order and with tensors of one shape and dtype; a rank that is gone, or does not
    come within the group's timeout, is a LostRankError on the others.
    """

    group: dist.ProcessGroup | None = None
    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, group: dist.ProcessGroup | None, device: torch.device) -> Ranks:
        """Those of ``group``, by default of all processes that torch.distributed knows.

        device: where what they send lies. Raises ValueError where there is no group, this process is not in it, or its backend
        sends nothing from there.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "torch.distributed has no process group here; call torch.distributed.init_process_group() first, in processes "
                "that torchrun starts"
            )
        group = group or dist.group.WORLD
        if group is None or dist.get_rank(group) < 0:
            raise ValueError("this process is no member of the group; only its members can take part")
        if f"{device.type}:" not in (backends := str(dist.get_backend_config(group))):
            raise ValueError(
                f"the weights are on {device.type}, from where the process group ({backends}) sends nothing; pack them, or open "
                "the packed file, with another device=, or make a group for this one"
            )
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that writes and speaks."""
        return self.rank == 0

    def gather(self, part: Tensor) -> Callable[[], Tensor]:  # [n] -> [W, n]
        """Sends this rank's part to all; what this returns waits for those of all ranks, and gives them in their order."""
        if self.group is None:
            return lambda: part[None]
        found = part.new_empty(self.size, *part.shape)
        return self._begun(_all_gather, found.view(-1), part.contiguous().view(-1), found)

    def gave_the_same(self, found: Tensor) -> bool:  # [W, …]
        """Whether what was gathered is of all ranks the same."""
        return bool((found == found[0]).all())

    def exchange(self, parts: Tensor) -> Callable[[], Tensor]:  # [W, n] -> [W, n]
        """Sends part r to rank r; what this returns waits for what all ranks have sent to this one."""
        if self.group is None:
            return lambda: parts
        found = torch.empty_like(parts)
        return self._begun(dist.all_to_all_single, found.view(-1), parts.contiguous().view(-1), found)

    def scatter_sum(self, parts: Tensor) -> Tensor:  # [W, n] -> [n]
        """The sum over ranks of their part r, on rank r."""
        if self.group is None:
            return parts[0]
        found = torch.empty_like(parts[0])
        return self._begun(_reduce_scatter, found.view(-1), parts.contiguous().view(-1), found)()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, on all of them and the same to the bit; in place."""
        if self.group is not None and tensor.numel():
            with self._together():
                dist.all_reduce(tensor, group=self.group)
        return tensor

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.group is not None:
            with self._together():
                dist.barrier(self.group)

    def require_equal(self, value: int, what: str, device: torch.device) -> None:
        """Raises ValueError on all ranks where ``value`` is not the same on all. device: one that the group sends from."""
        found = self.gather(torch.tensor([value], device=device))().flatten().tolist()
        differs = [rank for rank, other in enumerate(found) if other != found[0]]
        if differs:
            raise ValueError(f"{what} on ranks {differs} than on rank 0; give all ranks the same")

    def _begun(self, collective: Callable, out: Tensor, sent: Tensor, found: Tensor) -> Callable[[], Tensor]:
        with self._together():
            work = collective(out, sent, group=self.group, async_op=True)

        def waited() -> Tensor:
            with self._together():
                work.wait()
            return found

        return waited

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise LostRankError(
                f"rank {self.rank} of {self.size} waits for the others, and one of them has ended or does not answer; its own "
                f"error says why. Here: {error}"
            ) from error


ALONE = Ranks()
