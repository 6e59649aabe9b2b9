"""Heads that are learned beside λ: tensors of single tasks, which the model's forward reads and an optimiser moves."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from samerge_ext.checkpoints.sources import matches

# (task, name, what the forward reads) of a tensor that is learned.
HeadPlace = tuple[str, str, nn.Parameter]


class TrainedHeads:
    """The tasks' tensors that are learned, as one vector [H]: task after task, tensor after tensor.

    They are learned in ``dtype``, that of the coefficients; the forward reads them in its own.

    tasks: T names. start: [H], as the experts have them.
    """

    def __init__(self, tasks: Sequence[str], places: Sequence[HeadPlace], dtype: torch.dtype, device: torch.device):
        self.tasks, self.places = tuple(tasks), tuple(places)
        self._sizes = [parameter.numel() for _, _, parameter in self.places]
        self.start = torch.empty(sum(self._sizes), dtype=dtype, device=device)
        for (_, _, parameter), part in zip(self.places, self.start.split(self._sizes), strict=True):
            parameter.requires_grad_(True)
            part.copy_(parameter.detach().reshape(-1))

    @property
    def numel(self) -> int:
        return self.start.numel()

    @torch.no_grad()
    def put(self, values: Tensor) -> None:
        """From now on the forward reads ``values`` [H]; gradients of earlier backward passes are forgotten."""
        for (_, _, parameter), part in zip(self.places, values.split(self._sizes), strict=True):
            parameter.copy_(part.view_as(parameter))
            parameter.grad = None
        torch.clear_autocast_cache()  # of the values that were there before

    def gradient(self, tasks: Container[str]) -> Tensor:
        """∂loss/∂values [H] from the backward passes of ``tasks`` since `put`, 0 for all others; raises RuntimeError for a tensor
        that none came to."""
        found = []
        for task, name, parameter in self.places:
            if task not in tasks:
                found.append(self.start.new_zeros(parameter.numel()))
                continue
            if parameter.grad is None:
                raise RuntimeError(
                    f"train_heads: the logits of task '{task}' do not depend on its '{name}'; logits(module, batch, task) must "
                    "read it from the module, or from the module that heads= gives for the task"
                )
            found.append(parameter.grad.reshape(-1).to(self.start))
        return torch.cat(found) if found else torch.empty_like(self.start)

    def norms(self, gradient: Tensor) -> Tensor:
        """‖·‖₂ of each task's part [T] of a gradient [H]; 0 for a task of which nothing is learned."""
        squares = gradient.new_zeros(len(self.tasks))
        for (task, _, _), part in zip(self.places, gradient.split(self._sizes), strict=True):
            squares[self.tasks.index(task)] += part.square().sum()
        return squares.sqrt()

    def identity(self) -> list[list]:
        """Which tensors these are, and what they were at the beginning: for JSON."""
        parts = self.start.split(self._sizes)
        return [[task, name, part.numel(), part.double().sum().item()] for (task, name, _), part in zip(self.places, parts)]

    def forget_gradients(self) -> None:
        for _, _, parameter in self.places:
            parameter.grad = None


def find_trained(
    patterns: Sequence[str],
    packed: Mapping[str, Mapping[str, nn.Parameter]],
    given: Mapping[str, nn.Module],
    module: nn.Module,
) -> Iterator[HeadPlace]:
    """The tensors that patterns name among the packed heads of every task and the parameters of the modules given for it.

    Raises ValueError for a pattern that fits none, and for a tensor that cannot be learned: of another type, one that the module
    has no parameter for, or one that does not belong to a single task.
    """
    found = [(task, name, parameter) for task, head in packed.items() for name, parameter in head.items()]
    found += [(task, name, parameter) for task, head in given.items() for name, parameter in head.named_parameters()]
    names = dict.fromkeys(name for _, name, _ in found)
    for pattern in patterns:
        if not any(matches(name, (pattern,)) for name in names):
            known = f"these are {', '.join(names)}" if names else "there are none"
            raise ValueError(
                f"train_heads={pattern!r} fits no tensor of a head; {known}. Pack tensors of a task with heads=, or give heads= "
                "modules by task"
            )
    if given and not patterns:
        raise ValueError("heads= gives modules and train_heads names none of their parameters; train_heads='*' names all")
    in_module = dict(module.named_parameters(remove_duplicate=False))
    owners = {id(parameter): "the module" for parameter in in_module.values()}
    for task, name, parameter in found:
        if not matches(name, tuple(patterns)):
            continue
        if not parameter.is_floating_point():
            raise ValueError(f"train_heads: '{name}' of task '{task}' is {parameter.dtype}, and only float tensors are learned")
        if name in packed.get(task, {}) and name not in in_module:
            raise ValueError(f"train_heads: the module has no parameter '{name}', which is one of task '{task}'")
        if (owner := owners.setdefault(id(parameter), f"task '{task}'")) != f"task '{task}'":
            raise ValueError(f"train_heads: '{name}' of task '{task}' is one of {owner} too; give each task its own")
        yield task, name, parameter
