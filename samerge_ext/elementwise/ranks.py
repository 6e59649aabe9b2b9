"""Several processes that merge the same models into one folder, each some of its files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from samerge_ext.checkpoints.reading import cut
from samerge_ext.checkpoints.shards import Shard


class NotWholeYet(UserWarning):
    """OUT lacks what other ranks are to write. Every rank says it for itself."""

    of_one_rank = True


@dataclass(frozen=True)
class Rank:
    """Which one of them this process is. They need nothing of each other but the same files and the same OUT.

    number: from 0 on. count: how many there are; with 1 a process merges by itself. Of a torch.distributed process group its rank
    and world size. Raises ValueError for a number that is not below the count.
    """

    number: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.number < self.count:
            raise ValueError(f"rank {self.number} of {self.count}: ranks are numbered from 0 on; give one below their number")

    def __str__(self) -> str:
        return f"rank {self.number} of {self.count}"

    def share(self, shards: Sequence[Shard]) -> list[Shard]:
        """What this process writes."""
        owners = owners_of(shards, self.count)
        return [shard for shard in shards if owners[shard.file] == self.number]


ALONE = Rank()


def owners_of(shards: Sequence[Shard], count: int) -> dict[str, int]:
    """File -> number of the rank that writes it: from the largest on, each is of the rank that has the fewest bytes by then."""
    owners, held = {}, [0] * count
    for shard in sorted(shards, key=lambda shard: -shard.total_bytes):
        number = held.index(min(held))
        owners[shard.file] = number
        held[number] += shard.total_bytes
    return owners


def held_by(shards: Sequence[Shard], count: int) -> list[int]:
    """Bytes that every rank writes."""
    return [sum(shard.total_bytes for shard in Rank(number, count).share(shards)) for number in range(count)]


def not_whole_yet(target: Path, rank: Rank, shards: Sequence[Shard], missing: Sequence[Shard]) -> NotWholeYet:
    """What a rank that is through says. missing: of the shards; none where other ranks are still at it."""
    if not missing:
        return NotWholeYet(
            f"{rank} has written its part; {target} appears when the others, which are still at it, have written theirs"
        )
    owners = owners_of(shards, rank.count)
    of_ranks = {number: [shard.file for shard in missing if owners[shard.file] == number] for number in range(rank.count)}
    named = "; ".join(f"of rank {number}: {cut(', '.join(files), 200)}" for number, files in of_ranks.items() if files)
    return NotWholeYet(
        f"{rank} has written its part and no other is at work; {target} appears when what is missing is written, {named}. "
        "Start those ranks, again where they ended"
    )
