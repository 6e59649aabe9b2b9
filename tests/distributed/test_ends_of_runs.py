"""Learned merges by several ranks that are killed, go on, are planned within a budget, and are refused: on all of them alike."""

import os
import signal

import pytest
import streaming
import torch
import torch.distributed as dist
import worlds
from helpers import PATH_TOLERANCE

import samerge_ext as sm
from samerge_ext.budget.plan import Plan
from samerge_ext.checkpoints.sealed import read_sealed_object
from samerge_ext.packing import ranks

TASKS = ("red", "green", "blue")
NEVER = 1 << 30


def learn(packed, module, batches, **settings):
    config = sm.SAMergingConfig(**{"steps": 3, "learning_rate": 0.02, "progress": False, **settings})
    return sm.samerging(module, packed, batches, streaming.logits, config=config).coefficients


def stopped_run(folder, dies_in):
    """A run of six steps that keeps its state; rank 1 is killed in the forward pass of that number, if it comes to it."""
    left = dies_in

    def logits(module, batch, task):
        nonlocal left
        left -= torch.is_grad_enabled()
        if left == 0 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return module(batch)

    torch.manual_seed(0)
    packed = streaming.make_packed(streaming.make()).shard()
    config = sm.SAMergingConfig(progress=False, steps=6, streamed=True, checkpoint_dir=folder, checkpoint_every=1)
    try:
        return sm.samerging(streaming.make(1), packed, streaming.make_batches(), logits, config=config).coefficients
    except ranks.LostRankError as error:
        return str(error)


def test_a_run_goes_on_where_a_rank_was_killed(tmp_path):
    whole, _ = worlds.run(stopped_run, 2, tmp_path / "whole", tmp_path / "state of the whole", NEVER)
    started = worlds.begin(stopped_run, 2, tmp_path / "killed", tmp_path / "state", 8)
    worlds.end(started)
    assert [process.exitcode for process in started] == [0, -signal.SIGKILL]
    assert torch.load(tmp_path / "killed" / "rank0.pt").startswith("rank 0 of 2 waits for the others, and one of them has ended")
    (tmp_path / "state" / "state.pt").rename(tmp_path / "kept.pt")
    for size in (2, 3):  # also by other ranks
        folder = tmp_path / f"state for {size}"
        folder.mkdir()
        (folder / "state.pt").write_bytes((tmp_path / "kept.pt").read_bytes())
        found = worlds.run(stopped_run, size, tmp_path / f"world of {size}", folder, NEVER)
        assert all(torch.equal(coefficients, found[0]) for coefficients in found)
        error = (found[0] - whole).norm() / whole.norm()
        assert error == 0 if size == 2 else error <= PATH_TOLERANCE[torch.float64]


def within_budgets(folder):
    """By a rank: how a merge of a packed file is held within a budget, and where only the file fits; and λ of both."""
    choose, found = Plan.choose, []
    for place, budget in enumerate(("100GB", "99GB")):
        share, (module, _, batches) = sm.PackedWeights.open(folder / "packed").shard(), streaming.chain(TASKS)
        Plan.choose = choose if place == 0 else lambda self, *_: self.ways[-1]  # a model this small fits all that can be planned
        state = folder / f"state {place}"
        coefficients = learn(share, module, batches, memory_budget=budget, checkpoint_dir=state)
        found.append((coefficients, read_sealed_object(state / "plan.json")))
    return found


def test_a_memory_budget_is_planned_for_alike(tmp_path):
    module, packed, batches = streaming.chain(TASKS)
    in_file = streaming.write_packed(packed, tmp_path)
    truth = learn(in_file.in_memory(), module, batches)
    of_ranks = worlds.run(within_budgets, 2, tmp_path / "world", tmp_path)
    for coefficients, begun in of_ranks[0] + of_ranks[1]:
        assert (coefficients - truth).norm() <= PATH_TOLERANCE[torch.float32] * truth.norm()
        assert begun["ranks"] == 2
    for (ours, plan_of_first), (others, plan_of_second) in zip(*of_ranks, strict=True):
        assert torch.equal(ours, others) and plan_of_first == plan_of_second
    assert [begun["way"]["streamed"] for _, begun in of_ranks[0]] == [False, True]
    assert of_ranks[0][1][1]["way"]["store"] == "file"


def refused(folder):
    """What is said of settings that need whole weights, of ranks that differ in batches or settings, and of a state that only the
    first one finds."""
    torch.manual_seed(0)
    share, rank = streaming.make_packed(streaming.make()).shard(), dist.get_rank()
    batches = streaming.make_batches()
    fewer = {task: held[: 3 - rank] for task, held in batches.items()}
    own_folder = folder / str(rank)
    own_folder.mkdir()
    if rank == 0:
        whole = streaming.make_packed(streaming.make())
        learn(whole, streaming.make(1), batches, checkpoint_dir=own_folder / "state")
    os.chdir(own_folder)
    found = []
    for given, settings in (
        (batches, {"granularity": "rank", "samples": 2, "confidence_weights": True, "teacher_cache": "teachers"}),
        (fewer, {}),
        (batches, {"rho": 0.1 + rank}),
        (batches, {"checkpoint_dir": "state"}),
    ):
        with pytest.raises(ValueError) as error:
            learn(share, streaming.make(1), given, **settings)
        found.append(str(error.value))
    return found


def test_what_would_go_wrong_is_refused_on_all_ranks(tmp_path):
    for found in worlds.run(refused, 2, tmp_path / "world", tmp_path):
        needs_whole = "not with weights that are spread over ranks; leave that out, or merge without shard()"
        differs = "on ranks [1] than on rank 0; give all ranks the same"
        assert found == [
            f"granularity='rank', samples, confidence_weights, teacher_cache: {needs_whole}",
            f"settings, or how many batches tasks have, are others {differs}",
            f"settings, or how many batches tasks have, are others {differs}",
            f"finished steps in state/state.pt are others {differs}",
        ]
