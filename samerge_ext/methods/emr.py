"""EMR-Merging (arXiv 2405.17461): elect one task vector for all tasks; a mask and a rescaler make each task's own of it.

    γ = sign Σ_t τ_t,   m_t = [τ_t has the sign γ],   τ_uni = γ ∘ max_t m_t ∘ |τ_t|
    θ_t = θ₀ + λ_t m_t ∘ τ_uni,   λ_t = Σ|τ_t| / Σ|m_t ∘ τ_uni|

number by number; λ_t is of the whole vectors. So there is a model for each task, not one for all, and of each expert one bit of
a number is kept. As in the published code a sum of 0 elects minus.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from samerge_ext.elementwise.piecewise import CHUNK, PIECE
from samerge_ext.merged.model import MergedModel
from samerge_ext.merged.result import Result
from samerge_ext.packing.packed_weights import PackedWeights
from samerge_ext.packing.stores import narrow


@dataclass
class EmrModels:
    """The models of T tasks: what they share, and what makes each task's own of it.

    unified: τ_uni [N]. masks: m [T, N // 8] uint8, the first of eight numbers in a byte's lowest bit. rescalers: task -> λ.
    packed: the base and all heads and buffers; of the task vectors it has τ_uni alone.
    """

    unified: Tensor
    masks: Tensor
    rescalers: dict[str, float]
    packed: PackedWeights
    seconds: float = 0.0

    def merge(self, task: str, *, module: nn.Module | None = None) -> Result:
        """θ_t with the task's own head and float buffers; ``module``, where given, takes them on.

        Its task vector is m_t ∘ τ_uni and its coefficient λ_t. Raises ValueError for a task that is not there.
        """
        if task not in self.rescalers:
            raise ValueError(f"there is no task {task!r}; there are {', '.join(self.rescalers)}")
        masked = torch.where(_bits(self.masks[list(self.rescalers).index(task)]), self.unified, 0)
        heads, buffers = ({task: own[task]} if task in own else {} for own in (self.packed.heads, self.packed.expert_buffers))
        packed = replace(self.packed, tasks=(task,), task_vectors=masked[None], heads=heads, expert_buffers=buffers)
        if module is None:
            coefficients = packed.coefficients(self.rescalers[task])
            return Result(packed, coefficients, packed.merge(coefficients), "emr", seconds=self.seconds)
        model = MergedModel(module, packed, self.rescalers[task])
        model.select_head(task)
        return Result.of_model(model, "emr", None, [], self.seconds)


def emr(packed: PackedWeights, rescaler: Literal["paper", "published"] = "paper") -> EmrModels:
    """A model for each task, as above, whose `EmrModels.merge` gives it.

    rescaler: λ_t from sums over all numbers, or as the published code has it from sums of the tensors' means, in which a bias
        counts as much as a matrix.

    The models hold N numbers of the task vectors' type and T N bits beside the base, and no task vector; those of 8 and 4 bits
    are read as fp32. Where none of a task's numbers has an elected sign, its model is the base. Raises ValueError for another
    rescaler, TypeError where task vectors lie in a file or are factors.
    """
    started = time.perf_counter()
    if rescaler not in ("paper", "published"):
        raise ValueError(f"rescaler={rescaler!r}; choose 'paper' or 'published'")
    stored, layout, count = packed.whole_task_vectors(), packed.layout, packed.num_tasks
    dtype, device = stored.dtype if isinstance(stored, Tensor) else torch.float32, packed.base.device
    wide = torch.promote_types(dtype, torch.float32)
    unified = torch.empty(layout.numel, dtype=dtype, device=device)
    masks = torch.empty(count, layout.numel // 8, dtype=torch.uint8, device=device)
    sums = torch.zeros(2, count, dtype=torch.float64, device=device)  # of |τ_t|, and of |m_t ∘ τ_uni|
    for layer, shape in enumerate(layout.shapes):
        if layout.offsets[layer] is None:
            continue
        size = shape.numel() if rescaler == "published" else 1
        for start, length in _steps(*layout.extent(layer), device):
            part = narrow(stored, start, length)
            rows = (part if isinstance(part, Tensor) else part.dequantise()).to(wide)  # [T, length]
            plus = rows.sum(0) > 0
            elected = torch.where(plus, rows.amax(0), rows.amin(0))
            agrees = (rows > 0) & plus | (rows < 0) & ~plus
            unified[start : start + length] = elected
            masks[:, start // 8 : (start + length) // 8] = _bytes(agrees)
            sums += torch.stack([rows.abs().sum(1), (elected.abs() * agrees).sum(1)]) / size
    rescalers = torch.where(sums[1] > 0, sums[0] / sums[1], 1).tolist()
    shared = replace(packed, task_vectors=unified[None], experts={})
    return EmrModels(unified, masks, dict(zip(packed.tasks, rescalers, strict=True)), shared, time.perf_counter() - started)


def _steps(start: int, length: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Where numbers that are computed with at once begin, and how many they are."""
    at_once = CHUNK if device.type == "cpu" else PIECE
    for first in range(start, start + length, at_once):
        yield first, min(at_once, start + length - first)


def _bytes(mask: Tensor) -> Tensor:  # [T, n] bool -> [T, n // 8] uint8
    eighths = mask.view(torch.uint8).view(len(mask), -1, 8).unbind(2)
    found = eighths[0].clone()
    for place, bits in enumerate(eighths[1:], 1):
        found |= bits << place
    return found


def _bits(found: Tensor) -> Tensor:  # [n // 8] uint8 -> [n] bool
    places = torch.arange(8, dtype=torch.uint8, device=found.device)
    return (found[:, None] >> places & 1).flatten().bool()
