"""The passes of a step as one CUDA graph: launched by one call instead of thousands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from samerge_ext.learning.calibration import Calibration
from samerge_ext.learning.nested import map_tensors
from samerge_ext.learning.prefetch import Inputs

# (what is learned [P], inputs) -> (gradient to step with [P], what was measured)
Passes = Callable[[Tensor, Inputs], tuple[Tensor, Tensor]]
WARM_UP = 3  # calls before the capture: kernels are compiled, tuned and their workspaces allocated in them


class GraphedPasses:
    """``passes``, captured at its fourth call and replayed from then on, on inputs of the same shapes.

    A graph launches the kernels of the calls, so results should be theirs bit for bit, which tests/whole/test_gpu.py checks where
    there is a GPU. The optimiser's step stays outside,
    so that any optimiser and schedule will do (torch's capturable Adam corrects its bias in fp32 and gives other numbers).
    """

    def __init__(self, passes: Passes, device: torch.device):
        self.passes = passes
        self.calls = 0
        self.stream = torch.cuda.Stream(device)

    def __call__(self, coefficients: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        self.calls += 1
        if self.calls <= WARM_UP:
            return self._aside(coefficients, inputs)
        if self.calls == WARM_UP + 1:
            self.coefficients, self.inputs = coefficients.clone(), map_tensors(torch.clone, inputs)
            self.replay, self.outputs = capture(lambda: self.passes(self.coefficients, self.inputs), self.stream)
        else:
            self.coefficients.copy_(coefficients)
            for task, held in self.inputs.items():
                _copy(held, inputs[task])
        self.replay()
        gradient, measured = self.outputs
        return gradient.clone(), measured.clone()

    def _aside(self, coefficients: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """A call on the stream that will be captured, as torch asks of what runs before a capture."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            outputs = self.passes(coefficients, inputs)
        current.wait_stream(self.stream)
        map_tensors(lambda tensor: tensor.record_stream(current), outputs)
        return outputs


def capture(function: Callable[[], tuple], stream: torch.cuda.Stream) -> tuple[Callable[[], None], tuple]:
    """A replay of what ``function`` launches, and the tensors that every replay writes anew."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            outputs = function()
    except RuntimeError as error:
        error.add_note(
            "raised while the step was captured as a CUDA graph; the model's forward may not wait for the device there "
            "(.item(), printing, shapes that depend on values): use cuda_graph=False"
        )
        raise
    return graph.replay, outputs


def check_fixed_shapes(calibration: Calibration, device: torch.device) -> None:
    """Raises ValueError where a step cannot be a CUDA graph: no CUDA device, or a task whose batches differ in shape."""
    if device.type != "cuda":
        raise ValueError(f"cuda_graph=True needs packed weights on a CUDA device; they are on {device}")
    for task, batches in calibration.batches.items():
        first = _shapes(batches[0])
        for index, batch in enumerate(batches):
            if _shapes(batch) != first:
                raise ValueError(
                    f"cuda_graph=True needs batches of one shape, but of task '{task}' batch 0 is {first} and batch {index} "
                    f"is {_shapes(batch)}; pad them, leave out the last one, or use cuda_graph=False"
                )


def _shapes(batch: Any) -> str:
    return str(map_tensors(lambda tensor: f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}", batch))


def _copy(held: Any, new: Any) -> None:
    """Writes the tensors of ``new`` into those of ``held``, which has the same structure."""
    tensors: list[Tensor] = []
    map_tensors(tensors.append, new)
    places = iter(tensors)
    map_tensors(lambda tensor: tensor.copy_(next(places)), held)
