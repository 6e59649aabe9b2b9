"""The base and the task vectors of all experts as flat buffers: made once, used by every method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from samerge_ext.checkpoints import open_checkpoint
from samerge_ext.layout import Layout
from samerge_ext.ops.weighted_sum import weighted_sum
from samerge_ext.sources import CheckpointSource, ModuleSource, StateDictSource, matches
from samerge_ext.validation import check_sources

Buffers = dict[str, Tensor]


@dataclass
class PackedWeights:
    """A pretrained model and T experts fine-tuned from it, ready to be merged.

    layout: where each of the L layers lies.
    tasks: T names; row t of everything belongs to ``tasks[t]``.
    base: [N], the pretrained weights.
    task_vectors: [T, N], expert minus base.
    unchanged: layers that no expert changed, in the base's dtype of storage.
    aliases: names of tied tensors -> the layer they share.
    buffers: the base's buffers, float and not.
    expert_buffers: each expert's own float buffers (BatchNorm statistics).
    heads: each task's own head tensors, which are never merged.
    folder: the base's folder, where the weights came from one.
    """

    layout: Layout
    tasks: tuple[str, ...]
    base: Tensor
    task_vectors: Tensor
    unchanged: dict[str, Tensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    buffers: Buffers = field(default_factory=dict)
    expert_buffers: dict[str, Buffers] = field(default_factory=dict)
    heads: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    folder: Path | None = None

    @classmethod
    def from_modules(
        cls,
        base: nn.Module,
        experts: Mapping[str, nn.Module] | Sequence[tuple[str, nn.Module]],
        *,
        dtype: torch.dtype = torch.float32,
        task_vector_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        heads: str | Sequence[str] = (),
    ) -> PackedWeights:
        """Packs modules of one architecture.

        dtype: storage of the base (fp32, bf16, fp16; fp64 for proofs). task_vector_dtype: of the task vectors,
        the base's by default.
        heads: shell-style patterns of the tensors that belong to a task ("classifier.*"): kept per task, not merged.

        Raises ValueError, before anything is allocated, for tensors that are missing, extra, of another shape,
        NaN, Inf or not float, for two tasks of one name, and for an expert that equals the base.
        """
        sources = [(task, ModuleSource(module, f"expert '{task}'")) for task, module in _pairs(experts)]
        return _pack(ModuleSource(base, "base"), sources, dtype, task_vector_dtype, device, heads)

    @classmethod
    def from_state_dicts(
        cls,
        base: Mapping[str, Tensor],
        experts: Mapping[str, Mapping[str, Tensor]] | Sequence[tuple[str, Mapping[str, Tensor]]],
        *,
        dtype: torch.dtype = torch.float32,
        task_vector_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        heads: str | Sequence[str] = (),
    ) -> PackedWeights:
        """As `from_modules`; int64 and bool tensors and BatchNorm's running statistics count as buffers."""
        sources = [(task, StateDictSource(tensors, f"expert '{task}'")) for task, tensors in _pairs(experts)]
        return _pack(StateDictSource(base, "base"), sources, dtype, task_vector_dtype, device, heads)

    @classmethod
    def from_folders(
        cls,
        base: str | Path,
        experts: Mapping[str, str | Path] | Sequence[tuple[str, str | Path]],
        *,
        dtype: torch.dtype = torch.float32,
        task_vector_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        heads: str | Sequence[str] = (),
    ) -> PackedWeights:
        """As `from_state_dicts`, from model folders (safetensors or .bin, sharded or not) read tensor by tensor.

        Peak memory is the packed store plus one tensor of each model.
        """
        with ExitStack() as stack:
            base_source = CheckpointSource(stack.enter_context(open_checkpoint(base)), "base")
            sources = [
                (task, CheckpointSource(stack.enter_context(open_checkpoint(path)), f"expert '{task}'"))
                for task, path in _pairs(experts)
            ]
            packed = _pack(base_source, sources, dtype, task_vector_dtype, device, heads)
        packed.folder = Path(base)
        return packed

    @property
    def num_tasks(self) -> int:
        return len(self.tasks)

    @property
    def coefficient_dtype(self) -> torch.dtype:
        """fp32, or fp64 for an fp64 store."""
        return torch.float64 if self.base.dtype == torch.float64 else torch.float32

    def coefficients(self, value: float | Sequence[float] | Tensor) -> Tensor:
        """A new [T, L] matrix of merging coefficients from one number, one per task [T], or a whole [T, L]."""
        value = torch.as_tensor(value, dtype=self.coefficient_dtype, device=self.base.device)
        shape = (self.num_tasks, self.layout.num_layers)
        if value.shape == shape[:1]:
            value = value[:, None]
        elif value.dim() and value.shape != shape:
            raise ValueError(
                f"coefficients of shape {tuple(value.shape)}; expected a number, [T] = [{shape[0]}] or [T, L] = {list(shape)}"
            )
        if not torch.isfinite(value).all():
            raise ValueError("coefficients hold NaN or Inf")
        return value.detach().expand(shape).clone()

    def one_hot(self, task: str) -> Tensor:
        """The [T, L] coefficients at which the merged model is expert ``task``."""
        coefficients = self.coefficients(0.0)
        coefficients[self.tasks.index(task)] = 1.0
        return coefficients

    def merge(self, coefficients: Tensor, out: Tensor | None = None) -> Tensor:
        """base + Σ_t coefficients[t, layer] · task_vectors[t], coefficients [T, L] -> [N]."""
        return weighted_sum(self.base, self.task_vectors, coefficients, self.layout.block_layer, out=out)

    def merged_buffers(self) -> Buffers:
        """The merged model's buffers: float ones are the average of the experts', the others are the base's."""
        average = {
            name: torch.stack([self.expert_buffers[task][name].double() for task in self.tasks]).mean(0).to(buffer.dtype)
            for name, buffer in self.buffers.items()
            if buffer.is_floating_point()
        }
        return {**self.buffers, **average}

    def state_dict(self, merged: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """All tensors of the model whose packed weights are ``merged`` [N], in the base's names, order and dtypes.

        dtype: of all weights, in place of the base's. Heads are not in it; tied names refer to one tensor.
        """
        views = self.layout.views(merged)
        tensors = {}
        for name, base_dtype in zip(self.layout.names, self.layout.dtypes, strict=True):
            tensors[name] = (views[name] if name in views else self.unchanged[name]).to(dtype or base_dtype)
        tensors.update({alias: tensors[name] for alias, name in self.aliases.items()})
        return {**tensors, **self.merged_buffers()}


def _pairs(experts) -> list[tuple]:
    return list(experts.items() if isinstance(experts, Mapping) else experts)


def _pack(base, experts, dtype, task_vector_dtype, device, heads) -> PackedWeights:
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    task_vector_dtype = task_vector_dtype or dtype
    changed = check_sources(base, experts, heads, dtype, task_vector_dtype)

    layers = [name for name in base.names if not (base.is_buffer(name) or matches(name, heads))]
    layout = Layout.build(
        layers,
        [base.shape(n) for n in layers],
        [base.dtype(n) for n in layers],
        [n in changed for n in layers],
        device,
    )
    packed = PackedWeights(
        layout=layout,
        tasks=tuple(task for task, _ in experts),
        base=torch.zeros(layout.numel, dtype=dtype, device=device),
        task_vectors=torch.zeros(len(experts), layout.numel, dtype=task_vector_dtype, device=device),
        unchanged={n: base.read(n).to(device=device, dtype=dtype, copy=True) for n in layers if n not in changed},
        aliases={alias: name for alias, name in base.aliases.items() if name in set(layers)},
        buffers={n: base.read(n).clone() for n in base.names if base.is_buffer(n) and not matches(n, heads)},
    )
    views = layout.views(packed.base)
    rows = [layout.views(row) for row in packed.task_vectors]
    wide = torch.float64 if torch.float64 in (dtype, task_vector_dtype) else torch.float32
    for name in views:
        pretrained = base.read(name).to(device, wide)
        views[name].copy_(pretrained)
        for row, (_, expert) in zip(rows, experts, strict=True):
            torch.sub(expert.read(name).to(device, wide), pretrained, out=row[name])

    float_buffers = [n for n, b in packed.buffers.items() if b.is_floating_point()]
    for task, expert in experts:
        packed.expert_buffers[task] = {n: expert.read(n).clone() for n in float_buffers}
        packed.heads[task] = {n: expert.read(n).clone() for n in expert.names if matches(n, heads)}
    return packed
