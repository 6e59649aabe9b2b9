"""The history that steps leave."""

import pytest
import torch

from samerge_ext.learning.step_log import StepLog

CPU = torch.device("cpu")


def log(history):
    return StepLog(history, ("a", "b"), {"a": 1.0, "b": 2.0}, CPU, every=3)


def test_a_record_is_of_the_first_pass():
    history = []
    log(history).add(torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[9.0, 9.0], [9.0, 9.0]]]))
    assert history == [{"step": 0, "loss": 5.0, "losses": {"a": 1.0, "b": 2.0}, "gradient_norm": 5.0}]


def test_steps_are_counted_on():
    history = [{"step": 0}]
    steps = log(history)
    steps.add(torch.ones(1, 2, 2))
    steps.flush()
    assert [record["step"] for record in history] == [0, 1]


@pytest.mark.parametrize("index", (0, 1))
def test_a_loss_that_is_not_finite_stops_the_run(index):
    measured = torch.ones(2, 2, 2)
    measured[index, 0, 1] = torch.nan
    with pytest.raises(FloatingPointError, match="loss of task 'b' is nan at step 0"):
        log([]).add(measured)


def test_a_gradient_that_is_not_finite_stops_the_run():
    measured = torch.ones(2, 2, 2)
    measured[1, 1, 0] = torch.inf
    with pytest.raises(FloatingPointError, match="gradient of task 'a''s coefficients is not finite at step 0"):
        log([]).add(measured)
