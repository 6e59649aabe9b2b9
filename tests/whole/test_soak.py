"""A short soak; the long one is `make soak`."""

import subprocess
import sys

import soak


def test_random_plans_run_within_their_budget_or_are_refused():
    outcomes = [soak.one_plan(seed) for seed in range(4)]
    assert "ran" in outcomes


def test_killed_merges_continue_to_the_same_bits():
    done = subprocess.run(
        [sys.executable, soak.__file__, "--plans", "0", "--kills", "6"], stdout=subprocess.PIPE, text=True, check=True
    )
    assert "6 kills" in done.stdout
