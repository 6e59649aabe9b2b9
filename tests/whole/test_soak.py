"""A short soak; the long one is `make soak`."""

import attacks
import killed_ranks
import soak
from processes import in_a_process


def test_random_plans_run_within_their_budget_or_are_refused():
    """Small models: int4 with a shared offset and bf16 in a packed file, fp64 and int4 in memory; coefficients of
    components, of fp64 and of fp16 in a packed file."""
    outcomes = [soak.one_plan(seed) for seed in (7, 8, 15, 18, 52)]
    assert "ran" in outcomes


def test_killed_merges_continue_to_the_same_bits():
    in_a_process(soak.many_kills, 6, 7)


def test_killed_ranks_continue_to_the_same_bytes():
    """Of a recipe that the command learns; those that merge from file to file have a test beside their own."""
    in_a_process(killed_ranks.many_kills, "learned", 1, 2)


def test_attacks_end_in_the_same_bytes_or_tell_what_to_do():
    """Two at once, signals, damaged state, inputs that change and, where root is at hand, a full disk."""
    in_a_process(soak.many_rounds, 2, None, 14, attacks.DataFree)


def test_many_merges_leave_nothing_in_the_process():
    added, files, threads = in_a_process(soak.added_by, 50)
    assert added < soak.FLAT and max(files, threads) <= 0
