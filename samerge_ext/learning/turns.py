"""Whose batches are whose: tasks dealt to the ranks of a merge.

Task t is rank t mod W's, whose teachers' answers stay there. Where weights are gathered, all ranks must run a pass whenever one
does. A rank that has no task for a turn, and one beyond the last task, keeps the others company: it runs one that it has, or that
another rank has too, and its results do not count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from samerge_ext.packing.ranks import Ranks


def turns(tasks: Sequence[str], ranks: Ranks) -> list[tuple[str, bool]]:
    """What this rank runs, one turn after the other, as many as any rank: a task, and whether it counts here."""
    own = [(task, True) for task in tasks[ranks.rank :: ranks.size]]
    company = (tasks[ranks.rank % len(tasks)], False)
    return own + [company] * (-(-len(tasks) // ranks.size) - len(own))


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
