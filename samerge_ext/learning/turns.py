"""Whose batches are whose: tasks, and where there are more ranks than tasks the rows of their batches, dealt to the ranks.

Task t is rank t mod W's, whose teachers' answers stay there. Beyond the last task ranks begin with the first one again: those of
one task have a part of each of its batches. Where weights are gathered, all ranks must run a pass whenever one does. A rank that
has no task for a turn, or no part of a batch, keeps the others company: it runs what it has, or what another rank has too, and
its results do not count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from samerge_ext.learning.nested import split_rows
from samerge_ext.packing.ranks import Ranks


def turns(tasks: Sequence[str], ranks: Ranks) -> list[tuple[str, bool]]:
    """What this rank runs, one turn after the other, as many as any rank: a task, and whether it counts here."""
    first = ranks.rank % len(tasks)
    own = [(task, True) for task in tasks[first :: ranks.size]]
    company = (tasks[first], False)
    return own + [company] * (-(-len(tasks) // ranks.size) - len(own))


def part_of_batch(batch: Any, task: int, tasks: int, ranks: Ranks) -> tuple[Any, bool]:
    """What this rank runs of a batch of the task of that number, and whether it counts: of others' tasks and with fewer ranks
    than tasks the whole batch, which does."""
    if ranks.rank % tasks != task or ranks.size <= tasks:
        return batch, True
    parts = split_rows(batch, len(range(task, ranks.size, tasks)))
    place = ranks.rank // tasks
    return parts[min(place, len(parts) - 1)], place < len(parts)


def tasks_of(tasks: Sequence[str], ranks: Ranks) -> list[str]:
    """The tasks that this rank runs, whether they count or not."""
    return list(dict.fromkeys(task for task, _ in turns(tasks, ranks)))


def turns_of_batches(counts: Mapping[str, int], ranks: Ranks) -> list[tuple[str, list[tuple[int, bool]]]]:
    """As `turns`, of all batches: for every turn a task, and which of its batches this rank runs, as many as any rank in that
    turn, each with whether it counts here. counts: task -> how many batches it has."""
    tasks, found = list(counts), []
    for turn, (task, is_own) in enumerate(turns(tasks, ranks)):
        most = max(counts[each] for each in tasks[turn * ranks.size :][: ranks.size])
        last = counts[task] - 1
        found.append((task, [(min(index, last), is_own and index <= last) for index in range(most)]))
    return found
