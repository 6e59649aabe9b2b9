"""Which rank runs which rows of which batches, and how much each counts."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from samerge_ext.learning.calibration import Calibration
from samerge_ext.learning.passes import shares_of_batches
from samerge_ext.learning.turns import tasks_of, turns, turns_of_batches
from samerge_ext.packing.ranks import Ranks


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 13])
def test_every_row_counts_on_one_rank_and_all_run_as_many_batches(size):
    numbers = {"a": 3, "b": 1, "c": 2, "d": 2, "e": 4}
    rows = iter(range(1000))
    batches = {
        task: [torch.tensor([next(rows) for _ in range(1 + i + number)]) for i in range(number)]
        for task, number in numbers.items()
    }
    batches["c"][0] = {"rows": batches["c"][0], "texts": ["a", "b", "c"]}  # neither can be divided
    batches["c"][1] = {"rows": batches["c"][1], "of one row": torch.zeros(1)}
    batches["d"][1] = {"rows": batches["d"][1], "nothing": None}
    everyone = [Ranks(None, rank, size) for rank in range(size)]
    assert len({len(turns(tuple(numbers), each)) for each in everyone}) == 1
    runs, found = set(), Counter()
    for each in everyone:
        calibration, of_rank = Calibration(batches, tuple(numbers), ranks=each), turns_of_batches(numbers, each)
        runs.add(tuple(len(indices) for _, indices in of_rank))
        for task, indices in of_rank:
            for index, is_own in indices:
                batch = calibration.batches[task][index]
                batch = batch["rows"] if isinstance(batch, dict) else batch
                assert len(batch)
                found.update(batch.tolist() if is_own and calibration.counts[task][index] else [])
        for task in tasks_of(tuple(numbers), each):  # its teacher's answers are here
            assert {index for name, indices in of_rank if name == task for index, _ in indices} >= set(range(numbers[task]))
    assert len(runs) == 1
    assert found == Counter(range(next(rows)))
    if size == 13:  # of task a's batch of six rows three ranks have two
        parts = [Calibration(batches, tuple(numbers), ranks=everyone[rank]).batches["a"][2] for rank in (0, 5, 10)]
        assert [len(part) for part in parts] == [2, 2, 2]


def test_a_rank_counts_by_its_rows_of_a_batch():
    """Of task a it has two of eight rows; task c, which nobody has a row of, shares nothing out."""
    tasks, device = ("a", "b", "c"), torch.device("cpu")
    ranks = SimpleNamespace(size=5, sum=lambda here: torch.tensor([8, 3, 0], dtype=here.dtype))
    found = shares_of_batches({"a": 2, "c": 0}, tasks, ranks, device)
    assert {task: float(share) for task, share in found.items()} == {"a": 0.25, "c": 0.0}
    few = SimpleNamespace(size=3)  # batches are whole, and nothing is asked of the others
    assert shares_of_batches({"a": 2, "b": 0}, tasks, few, device) == {"a": 1.0, "b": 1.0}
