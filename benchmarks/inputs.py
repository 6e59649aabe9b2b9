"""The cases: inputs of the operators at sizes of real models, each with the truth in fp64 on a part of them.

A case is a frozen description, known before anything is allocated; `build` makes its tensors on a device.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from model_shapes import MODELS
from torch import Tensor

from samerge_ext import reference
from samerge_ext.memory import trim_heap
from samerge_ext.packing.layout import BLOCK, Layout
from samerge_ext.packing.quantised import FORMATS, QuantisedTaskVectors

# Relative L2 error of a result in fp32, from inputs of the given storage, beyond which a candidate is wrong. In bf16 the
# baselines round after every operation, ours only at the end.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
OUR_TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 4e-3}
SETTINGS = ("kl", 2.0, 2.0, 0.0)  # the loss, both temperatures and beta
CHECKED_NUMBERS = 2**22  # of the packed weights, at their end, where offsets are largest
CHECKED_ROWS = 16
PERIOD = 2**22 - 3  # random numbers repeat after so many: no multiple of a block or a row


def short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def free_bytes(device: str) -> int:
    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def give_back_memory() -> None:
    """Returns what has been freed to the system, so that using it again shows as a rise of the peak."""
    gc.collect()
    trim_heap()


def random_normal(*shape: int, dtype: torch.dtype, device: str, seed: int) -> Tensor:
    """Normal numbers that repeat: drawing all of them would take longer than the benchmark."""
    flat = torch.empty(shape, dtype=dtype, device=device).view(-1)
    generator = torch.Generator(device).manual_seed(seed)
    drawn = torch.randn(min(PERIOD, flat.numel()), generator=generator, device=device).to(dtype)
    for part in flat.split(drawn.numel()):
        part.copy_(drawn[: part.numel()])
    return flat.view(shape)


def error_of(actual: Tensor, truth: Tensor) -> float:
    """Relative L2 error; NaN or infinite where the result is."""
    return ((actual.double() - truth).norm() / truth.norm()).item()


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory from torch.empty holds NaN, in Python as in C++, so that what an operator does not write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Packed:
    """Base and task vectors of a model, with its layer map."""

    model: str
    tasks: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.model} T{self.tasks} {short(self.dtype)}"

    @functools.cached_property
    def layout(self) -> Layout:
        shapes = [torch.Size(shape) for shape in MODELS[self.model]]
        names = [f"layer {i}" for i in range(len(shapes))]
        return Layout.build(names, shapes, [self.dtype] * len(shapes), [True] * len(shapes))

    def tolerance(self, is_ours: bool) -> float:
        return (OUR_TOLERANCE if is_ours else TOLERANCE)[self.dtype]

    def needed_bytes(self, device: str) -> int:
        """Of the inputs and the output, three models in fp32 for what candidates allocate, and the most that stays: as much as
        the task vectors, which malloc does not give back once the published graph is built (measured), or quantised ones."""
        stored = self.dtype.itemsize
        return self.layout.numel * ((self.tasks + 2) * stored + 3 * 4 + max(self.tasks * stored, 2 * self.tasks + 3))

    def build(self, device: str) -> PackedInputs:
        return PackedInputs(self, device)


class PackedInputs:
    def __init__(self, case: Packed, device: str):
        options = {"dtype": case.dtype, "device": device}
        self.layout, n = case.layout, case.layout.numel
        self.num_tasks, self.num_layers = case.tasks, self.layout.num_layers
        self.base = random_normal(n, **options, seed=0)  # [N]
        self.gradient = self.base  # [N]; as good as any
        self.task_vectors = random_normal(case.tasks, n, **options, seed=1)  # [T, N]
        for span, end in zip(self.spans, [*self.layout.offsets[1:], n], strict=True):
            self.base[span.stop : end] = self.task_vectors[:, span.stop : end] = 0  # padding, as in PackedWeights
        shape = self.num_tasks, self.num_layers
        self.coefficients = random_normal(*shape, dtype=torch.float32, device=device, seed=2)  # [T, L]
        self.block_layer = self.layout.block_layer.to(device)  # [N // 1024]
        self.out = torch.full_like(self.base, torch.nan)  # [N]
        self._quantised: dict[str, QuantisedTaskVectors] = {}
        self._truths: dict[int, tuple[Tensor, Tensor]] = {}
        blocks = self.layout.numel // BLOCK
        first = int(self.layout.block_layer[max(0, blocks - CHECKED_NUMBERS // BLOCK)])
        self.checked_layers = slice(first, None)  # whole layers
        self.checked = slice(self.layout.offsets[first], None)  # their numbers

    @property
    def streams(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.task_vectors, self.base, self.out

    @functools.cached_property
    def spans(self) -> list[slice]:
        """The numbers of each layer, without the padding behind it."""
        return [slice(o, o + s.numel()) for o, s in zip(self.layout.offsets, self.layout.shapes, strict=True)]

    def layers(self, flat: Tensor) -> list[Tensor]:
        """The layers of a vector [N] in their own shapes."""
        return list(self.layout.views(flat).values())

    def quantised(self, form: str) -> QuantisedTaskVectors:
        """Other task vectors, random ones in fewer bits: quantising all of these would take longer than the benchmark."""
        if form not in self._quantised:
            store = QuantisedTaskVectors.zeros(*self.task_vectors.shape, form, self.base.device)
            drawn = torch.randint(256, (PERIOD,), dtype=torch.uint8, device=self.base.device)
            for part in store.codes.view(torch.uint8).view(-1).split(PERIOD):
                part.copy_(drawn[: len(part)])
            store.scales.uniform_(0.01, 0.02)
            self._quantised[form] = store
        return self._quantised[form]

    def stored(self, candidate: str) -> Tensor | QuantisedTaskVectors:
        """The task vectors that a candidate reads: its name ends with their form where they are quantised."""
        form = candidate.split()[-1]
        return self.quantised(form) if form in FORMATS else self.task_vectors

    def _checked_truth(self, stored: Tensor | QuantisedTaskVectors) -> tuple[Tensor, Tensor]:
        """The merged weights and ∂loss/∂λ of the layers that are checked."""
        if id(stored) not in self._truths:
            self._truths[id(stored)] = self._truth_of(stored)
        return self._truths[id(stored)]

    def _truth_of(self, stored: Tensor | QuantisedTaskVectors) -> tuple[Tensor, Tensor]:
        some = slice(self.checked.start, None)
        part = stored[:, some] if isinstance(stored, Tensor) else stored.narrow(some.start, len(self.base) - some.start)
        blocks = self.block_layer[self.checked.start // BLOCK :]
        base = self.base[self.checked].double()
        merged = torch.empty_like(base)
        gradient = torch.zeros(self.coefficients.shape, dtype=torch.float64, device=base.device)
        for t, task_vector in enumerate(part):
            row = task_vector[None].double()
            one = self.coefficients[t : t + 1].double()
            reference.weighted_sum(merged, base if t == 0 else merged.clone(), row, one, blocks)
            gradient[t] = reference.coefficient_grad(base, row, blocks, gradient.shape[1])[0]
        return merged, gradient[:, self.checked_layers]

    def error_of_merged(self, merged: Tensor | list[Tensor], stored: Tensor | QuantisedTaskVectors) -> float:
        """Of a vector [N], or of its layers one by one."""
        expected = self._layers_checked(self._checked_truth(stored)[0])
        if isinstance(merged, Tensor):
            if merged.isnan().any():
                return float("nan")
            actual = self._layers_checked(merged[self.checked])
        else:
            actual = merged[self.checked_layers]
        return error_of(_flat(actual), _flat(expected))

    def error_of_coefficient_grad(self, gradient: Tensor, stored: Tensor | QuantisedTaskVectors) -> float:  # [T, L]
        if gradient.isnan().any():
            return float("nan")
        return error_of(gradient[:, self.checked_layers], self._checked_truth(stored)[1])

    def _layers_checked(self, part: Tensor) -> list[Tensor]:
        """The layers that are checked, in the part of the numbers that holds them."""
        start = self.checked.start
        return [part[span.start - start : span.stop - start] for span in self.spans[self.checked_layers]]


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


@dataclass(frozen=True)
class Logits:
    """Rows of student and teacher logits; with or without the gradient by the student's."""

    rows: int
    classes: int
    dtype: torch.dtype
    gradient: bool

    def __str__(self) -> str:
        return f"{self.rows}x{self.classes} {short(self.dtype)}{' with grad' if self.gradient else ''}"

    def tolerance(self, is_ours: bool) -> float:
        return (OUR_TOLERANCE if is_ours else TOLERANCE)[self.dtype]

    def needed_bytes(self, device: str) -> int:
        """Of inputs and gradient, and eight matrices in fp32 for what candidates allocate."""
        return self.rows * self.classes * (3 * self.dtype.itemsize + 8 * 4)

    def build(self, device: str) -> LogitsInputs:
        return LogitsInputs(self, device)


class LogitsInputs:
    def __init__(self, case: Logits, device: str):
        self.with_gradient = case.gradient
        shape, options = (case.rows, case.classes), {"dtype": case.dtype, "device": device}
        self.student = random_normal(*shape, **options, seed=0).mul_(3)  # [R, V]
        self.teacher = random_normal(*shape, **options, seed=1).mul_(3)  # [R, V]
        self._buffer = torch.empty_like(self.student)

    @property
    def streams(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.teacher.view(1, -1), self.student.view(-1), self._buffer.view(-1)

    @functools.cached_property
    def _truth(self) -> tuple[Tensor, Tensor]:
        """The loss, and its gradient by the last rows."""
        rows, losses = self.student.shape[0], []
        scale = torch.full((rows,), 1 / rows, dtype=torch.float64, device=self.student.device)
        for some in torch.arange(rows).split(CHECKED_ROWS):
            part = slice(int(some[0]), int(some[-1]) + 1)
            logits = self.student[part].double(), self.teacher[None, part].double()
            loss, gradient = reference.softmax_kl(*logits, None, None, scale[part], None, *SETTINGS)
            losses.append(loss)
        return torch.cat(losses).mean(), gradient

    def error_of(self, result: Tensor | tuple[Tensor, Tensor]) -> float:
        """Of a loss, or of a loss and its gradient [R, V]: the larger error."""
        loss, gradient = self._truth
        if isinstance(result, Tensor):
            return error_of(result, loss)
        if result[1].isnan().any():
            return float("nan")
        return max(error_of(result[0], loss), error_of(result[1][-len(gradient) :], gradient))
