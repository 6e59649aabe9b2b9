"""Results as DataFrames, where pandas is installed, and what is said where it is not."""

import sys

import pytest
import torch
from tiny import TASKS, make_problem, plain

import samerge_ext as sm


def test_coefficients_and_history_by_name():
    pytest.importorskip("pandas")
    base, _, packed, heads, batches = make_problem()
    config = sm.SAMergingConfig(steps=3, learning_rate=0.1, progress=False)
    result = sm.samerging(base, packed, batches, plain(heads), config=config)
    frame = result.to_pandas()
    assert list(frame.columns) == list(TASKS) and tuple(frame.index) == packed.layout.names and frame.index.name == "layer"
    layer = packed.layout.names[1]
    assert frame.loc[layer, TASKS[1]] == result.coefficients[1, 1].item()
    assert torch.equal(torch.tensor(frame.to_numpy().T), result.coefficients)
    history = result.to_pandas("history")
    assert list(history.index) == [0, 1, 2] and history.index.name == "step"
    assert history.loc[2, "loss"] == result.history[2]["loss"]
    assert history.loc[2, f"losses.{TASKS[0]}"] == result.history[2]["losses"][TASKS[0]]
    with pytest.raises(ValueError, match="has no 'weights' to show; it has coefficients and history"):
        result.to_pandas("weights")
    with pytest.raises(ValueError, match="has no 'coefficients' to show; it has neither coefficients nor a history"):
        sm.ties(packed).to_pandas()


def test_without_pandas_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    packed = make_problem()[2]
    with pytest.raises(ImportError, match="needs pandas, which is missing; install it: pip install pandas"):
        sm.average(packed).to_pandas()
