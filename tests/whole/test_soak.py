"""A short soak; the long one is `make soak`."""

import soak
from processes import in_a_process


def test_random_plans_run_within_their_budget_or_are_refused():
    """Small models: int4 with a shared offset and bf16 in a packed file, fp64 and int4 in memory."""
    outcomes = [soak.one_plan(seed) for seed in (7, 8, 15, 18)]
    assert "ran" in outcomes


def test_killed_merges_continue_to_the_same_bits():
    in_a_process(soak.many_kills, 6, 7)
