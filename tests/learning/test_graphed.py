"""A step as a CUDA graph: what can be shown without a GPU, with a capture that runs the function again at every replay."""

import pytest
import torch

from samerge_ext.learning import graphed
from samerge_ext.learning.calibration import Calibration
from samerge_ext.learning.graphed import GraphedPasses, check_fixed_shapes
from samerge_ext.learning.nested import map_tensors

CUDA = torch.device("cuda")


def rerun(function, stream):
    outputs = function()

    def replay():
        for held, new in zip(outputs, function(), strict=True):
            held.copy_(new)

    return replay, outputs


@pytest.fixture
def graphed_passes(monkeypatch):
    """A function that graphs passes on the CPU."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(graphed, "capture", rerun)
    monkeypatch.setattr(GraphedPasses, "_aside", lambda self, *args: self.passes(*args))
    return lambda passes: GraphedPasses(passes, CUDA)


def test_replays_see_new_inputs_and_never_overwrite_what_was_returned(graphed_passes):
    def passes(coefficients, inputs):
        batch, target = inputs["a"]
        return coefficients * batch["x"][0].sum(), target + batch["x"][0].mean()

    step = graphed_passes(passes)
    calls = [(torch.rand(2, 3), {"a": ({"x": (torch.rand(4), "kept")}, torch.rand(2))}) for _ in range(8)]
    returned = [step(*call) for call in calls]
    for call, outputs in zip(calls, returned, strict=True):
        for output, expected in zip(outputs, passes(*call), strict=True):
            assert torch.equal(output, expected)


def test_inputs_of_the_capture_are_its_own(graphed_passes):
    step = graphed_passes(lambda coefficients, inputs: (coefficients + inputs["a"][0], coefficients))
    mine = torch.zeros(2)
    for _ in range(6):
        step(torch.zeros(2), {"a": (mine, None)})
    step(torch.zeros(2), {"a": (torch.ones(2), None)})
    assert torch.equal(mine, torch.zeros(2))


def test_batches_of_several_shapes_are_refused():
    calibration = Calibration({"a": [{"x": torch.zeros(4, 2)}, {"x": torch.zeros(3, 2)}]}, ("a",))
    with pytest.raises(ValueError, match=r"task 'a' batch 0 is .*float32\[4, 2\].* and batch 1 is .*float32\[3, 2\].*; pad them"):
        check_fixed_shapes(calibration, CUDA)


def test_what_is_not_a_tensor_must_not_change_either():
    calibration = Calibration({"a": [(torch.zeros(4), 1), (torch.zeros(4), 2)]}, ("a",))
    with pytest.raises(ValueError, match="batch 1"):
        check_fixed_shapes(calibration, CUDA)


def test_a_graph_needs_a_gpu():
    calibration = Calibration({"a": [torch.zeros(4)]}, ("a",))
    with pytest.raises(ValueError, match="needs packed weights on a CUDA device; they are on cpu"):
        check_fixed_shapes(calibration, torch.device("cpu"))


def test_tensors_are_found_in_nested_batches():
    from collections import namedtuple

    from transformers import BatchEncoding

    Pair = namedtuple("Pair", "x y")
    one = torch.ones(())
    batch = {"a": [one, "text"], "b": Pair(one, 3), "c": BatchEncoding({"ids": one}), "d": None}
    doubled = map_tensors(lambda tensor: 2 * tensor, batch)
    assert doubled["a"] == [2 * one, "text"] and doubled["b"] == Pair(2 * one, 3) and doubled["d"] is None
    assert isinstance(doubled["c"], BatchEncoding) and doubled["c"]["ids"] == 2 * one
    assert batch["a"][0] is one
