"""The base and the task vectors of all experts as flat buffers: made once, used by every method."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from samerge_ext.checkpoints.alignment import as_in_base
from samerge_ext.checkpoints.compatibility import check_models
from samerge_ext.checkpoints.converted import Conversion
from samerge_ext.checkpoints.folder import open_checkpoint
from samerge_ext.checkpoints.sources import CheckpointSource, ModuleSource, Source, StateDictSource
from samerge_ext.checkpoints.tokenizers import MergedTokenizer, TokenizerConfig
from samerge_ext.ops.coefficient_grad import coefficient_grad
from samerge_ext.ops.weighted_sum import weighted_sum
from samerge_ext.packing.factors import LORA
from samerge_ext.packing.in_pieces import InPieces
from samerge_ext.packing.into_file import (
    described,
    identity_of,
    open_made_from,
    open_packed,
    pack_into_file,
    require_unchanged,
)
from samerge_ext.packing.into_memory import pack_into_memory
from samerge_ext.packing.layout import BLOCK, Layout
from samerge_ext.packing.opened import all_patterns, as_pairs, check_factors, opened_models
from samerge_ext.packing.quantised import QuantisedTaskVectors
from samerge_ext.packing.ranks import ALONE, Ranks
from samerge_ext.packing.shards import Shards, Spread, own
from samerge_ext.packing.spread_merge import SpreadMerge
from samerge_ext.packing.stores import (
    InMemory,
    Numbers,
    StagedStore,
    Store,
    WholeStore,
    in_memory,
    indexed,
    on_host,
    parts,
    pin,
)

Buffers = dict[str, Tensor]
PIECE_BYTES = 64 << 20  # of base and task vectors, staged at a time unless a plan says otherwise


@dataclass
class PackedWeights:
    """A pretrained model and T experts fine-tuned from it, ready to be merged.

    layout: where each of the L layers lies.
    tasks: T names; row t of everything belongs to ``tasks[t]``.
    base: [N], the pretrained weights.
    task_vectors: [T, N], expert minus base; or QuantisedTaskVectors, or FactoredTaskVectors.
    unchanged: layers that no expert changed, in the base's dtype of storage.
    aliases: names of tied tensors -> the layer they share.
    buffers: the base's buffers, float and not.
    expert_buffers: each expert's own float buffers (BatchNorm statistics).
    heads: each task's own head tensors, which are never merged.
    folder: the base's folder, where the weights came from one.
    places: task -> where its expert was packed from, as it was given; empty where the weights came from memory.
    inputs: every folder or file that the weights came from -> its files' sizes and times of change; nothing is written over them.
    experts: where task vectors are quantised, the experts they were made from: teachers are read from there.
    conversion: what makes a module's tensors of the folders' ones, where these are not the same.
    tokenizer: what goes along with the rows of tokens, where they are not the base folder's.

    Base and task vectors may stay in a packed file (`from_folders(file=)`, `open`), task vectors may be factors: they are then
    `InPieces` (the base too, whatever a type checker is told), read some numbers at a time by what streams them.
    """

    layout: Layout
    tasks: tuple[str, ...]
    base: Tensor
    task_vectors: Numbers
    unchanged: dict[str, Tensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    buffers: Buffers = field(default_factory=dict)
    expert_buffers: dict[str, Buffers] = field(default_factory=dict)
    heads: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    folder: Path | None = None
    places: dict[str, str] = field(default_factory=dict)
    inputs: Mapping[str, dict[str, list[int]]] = field(default_factory=dict)
    experts: dict[str, Source | Path] = field(default_factory=dict)
    conversion: Conversion | None = None
    tokenizer: MergedTokenizer | None = None

    @classmethod
    def from_modules(
        cls,
        base: nn.Module,
        experts: Mapping[str, nn.Module] | Sequence[tuple[str, nn.Module]],
        *,
        dtype: torch.dtype = torch.float32,
        task_vector_dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        heads: str | Sequence[str] = (),
        keep: str | Sequence[str] = (),
    ) -> PackedWeights:
        """Packs modules of one architecture.

        dtype: storage of the base (fp32, bf16, fp16; fp64 for proofs). task_vector_dtype: of the task vectors,
        the base's by default; or "int8", "int4" or "int4-residual", which quantises them (see QuantisedTaskVectors) tensor by
        tensor. Teachers are then the experts themselves, not their quantised task vectors: modules and state dicts are kept
        as they were given, and folders are read again when logits are computed from them.
        heads: shell-style patterns of the tensors that belong to a task ("classifier.*"): kept per task, not merged.
        keep: of those of the base that not all experts have ("text_model.*"): they stay as they are.

        Raises ValueError, before anything is allocated, for tensors that are missing, extra, of another shape,
        NaN, Inf or not float, for two tasks of one name, and for an expert that equals the base.
        """
        sources = [(task, ModuleSource(module, f"expert '{task}'")) for task, module in as_pairs(experts)]
        return cls(**pack_into_memory(ModuleSource(base, "base"), sources, dtype, task_vector_dtype, device, heads, keep))

    @classmethod
    def from_state_dicts(
        cls,
        base: Mapping[str, Tensor],
        experts: Mapping[str, Mapping[str, Tensor]] | Sequence[tuple[str, Mapping[str, Tensor]]],
        *,
        dtype: torch.dtype = torch.float32,
        task_vector_dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        heads: str | Sequence[str] = (),
        keep: str | Sequence[str] = (),
    ) -> PackedWeights:
        """As `from_modules`; int64 and bool tensors and BatchNorm's running statistics count as buffers."""
        sources = [(task, StateDictSource(tensors, f"expert '{task}'")) for task, tensors in as_pairs(experts)]
        return cls(**pack_into_memory(StateDictSource(base, "base"), sources, dtype, task_vector_dtype, device, heads, keep))

    @classmethod
    def from_folders(
        cls,
        base: str | Path,
        experts: Mapping[str, str | Path] | Sequence[tuple[str, str | Path]],
        *,
        dtype: torch.dtype = torch.float32,
        task_vector_dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        heads: str | Sequence[str] = (),
        keep: str | Sequence[str] = (),
        tokenizer: str | Path | TokenizerConfig | None = None,
        file: str | Path | None = None,
        conversion: Conversion | None = None,
    ) -> PackedWeights:
        """As `from_state_dicts`, from model folders (safetensors or .bin, sharded or not) read tensor by tensor. An expert may
        be a LoRA adapter of the base, as PEFT saves it; its factors are multiplied one tensor at a time.
        task_vector_dtype="lora", where all experts are adapters, keeps the factors: a streamed merge multiplies them out piece
        by piece, the resident way once and for all. Base plus product is not rounded in between, as it is otherwise.

        Peak memory is the packed store plus one tensor of each model.
        tokenizer: whose tokens the rows of embeddings and output matrix are, "base", "union" or a folder's; a `TokenizerConfig`
            says more. Left out, models must have the base's tokens; rows that only pad a vocabulary may differ.
        file: keep base and task vectors in this packed file in place of memory, for a streamed merge on ``device``; of
            task_vector_dtype="lora" the base, and factors are read into memory. It is written, unless it is already there and
            was made from the same folders with the same settings: then it is opened and checked.
        conversion: pack the tensors of its module; by default the folders' own.
        """
        wanted = TokenizerConfig.of(tokenizer)
        check_models(base, as_pairs(experts), all_patterns(heads, keep), aligned=wanted is not None)
        paths = [base, *(path for _, path in as_pairs(experts))]
        form = task_vector_dtype or dtype
        settings: dict[str, object] = dict(dtype=dtype, task_vector_dtype=form, heads=heads, keep=keep, tokenizer=wanted)
        identify = partial(identity_of, paths, tasks=[task for task, _ in as_pairs(experts)], **settings)
        places = {task: str(path) for task, path in as_pairs(experts)}
        if file is not None:
            if Path(file).exists():
                fields = open_made_from(identify(), Path(file), torch.device(device))
                if fields is not None:
                    return cls(**fields, conversion=conversion)
        with opened_models(base, experts, conversion, wanted, heads) as (base_source, sources, merged):
            check_factors(task_vector_dtype, merged)
            identity, types = identify(), (dtype, task_vector_dtype)
            if file is not None:
                about: dict = {"folder": str(base), "experts": places, "identity": identity}
                about["tokenizer"] = merged and merged.to_json()
                fields = pack_into_file(Path(file), about, base_source, sources, *types, heads, keep, torch.device(device))
            else:
                fields = pack_into_memory(base_source, sources, *types, device, heads, keep, Path(base))
        require_unchanged(identity, identify())
        packed = cls(**fields)
        packed.folder, packed.inputs, packed.conversion, packed.tokenizer = Path(base), identity["folders"], conversion, merged
        packed.places = places
        if packed.experts:
            packed.experts = {task: Path(path) for task, path in as_pairs(experts)}
        return packed

    @classmethod
    def describe(
        cls,
        base: str | Path,
        experts: Mapping[str, str | Path] | Sequence[tuple[str, str | Path]],
        *,
        dtype: torch.dtype = torch.float32,
        task_vector_dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        heads: str | Sequence[str] = (),
        keep: str | Sequence[str] = (),
        tokenizer: str | Path | TokenizerConfig | None = None,
        conversion: Conversion | None = None,
    ) -> PackedWeights:
        """What `from_folders` would give without its numbers, from the folders' headers: for `plan.plan`."""
        wanted = TokenizerConfig.of(tokenizer)
        check_models(base, as_pairs(experts), all_patterns(heads, keep), aligned=wanted is not None)
        with opened_models(base, experts, conversion, wanted, heads) as (base_source, sources, merged):
            check_factors(task_vector_dtype, merged)
            return cls(**described(base_source, sources, dtype, task_vector_dtype, heads, keep, device, Path(base)))

    @classmethod
    def open(cls, file: str | Path, *, device: torch.device | str = "cpu", verify: bool = True) -> PackedWeights:
        """Packed weights that stay in a packed file, made by `from_folders(file=)`.

        device: where they are computed with. verify: read the file once and compare its checksums.
        Raises CheckpointError for a file that is missing, cut off, damaged, or no packed file.
        """
        return cls(**open_packed(Path(file), torch.device(device), verify))

    def shard(self, group: ProcessGroup | None = None) -> PackedWeights:
        """This rank's share of base and task vectors, a contiguous part of every layer and a W-th of all numbers: what is merged
        from it is merged by all ranks together.

        All ranks of ``group``, by default of all that torch.distributed knows, call it with equal weights. It is a copy, so that
        these can be let go. Of weights in a packed file, or of LoRA factors, ranks go on to read or multiply out their own
        numbers alone; `in_memory` of the share keeps these.
        Raises ValueError where there is no process group, or none that sends from the weights' device, where ranks have other
        weights, and for a share of a share.
        """
        if self.shards is not None:
            raise ValueError(f"these weights are spread over {self.ranks.size} ranks already; shard() those that they came from")
        device = self.layout.block_layer.device
        shards = Shards(self.layout, Ranks.of(group, device))
        known = [self.tasks, self.layout.names, self.layout.shapes, self.layout.offsets, self.base.dtype, self.task_vector_form]
        shards.ranks.require_equal(zlib.crc32(repr(known).encode()), "tasks, layers or dtypes are others", device)
        base: Any = Spread.of(self.base, shards)
        return replace(self, base=base, task_vectors=Spread.of(self.task_vectors, shards))

    @property
    def shards(self) -> Shards | None:
        """Which numbers are this rank's, where base and task vectors are spread over ranks by `shard`."""
        return self.task_vectors.shards if isinstance(self.task_vectors, Spread) else None

    @property
    def ranks(self) -> Ranks:
        """The processes that merge together; this one alone, without `shard`."""
        return ALONE if self.shards is None else self.shards.ranks

    def store(self, *, device: torch.device | str | None = None, piece: int | None = None) -> Store:
        """What hands base and task vectors, or this rank's share, to a streamed model on ``device``, where they are by default.

        piece: numbers that are staged at a time, a multiple of 1,024; 64 MiB of them by default. Not for what is there already.
        """
        device = indexed(device or self.base.device)
        base, task_vectors = own(self.base), own(self.task_vectors)
        if base.device == device and not isinstance(base, InPieces) and not isinstance(task_vectors, InPieces):
            return WholeStore(base, task_vectors)
        for numbers in (base, task_vectors) if device.type == "cuda" else ():
            for part in () if isinstance(numbers, InPieces) else parts(numbers).values():
                if part.device.type == "cpu":
                    pin(part)
        default = PIECE_BYTES // ((self.num_tasks + 1) * self.base.dtype.itemsize)
        return StagedStore(base, task_vectors, device, piece or max(BLOCK, default // BLOCK * BLOCK))

    @property
    def is_whole(self) -> bool:
        """Whether base and task vectors are in memory, and not read or multiplied out in pieces."""
        return on_host(self.base) and on_host(self.task_vectors)

    @property
    def num_tasks(self) -> int:
        return len(self.tasks)

    @property
    def coefficient_dtype(self) -> torch.dtype:
        """fp32, or fp64 for an fp64 store."""
        return torch.float64 if self.base.dtype == torch.float64 else torch.float32

    @property
    def task_vector_form(self) -> str:
        """How task vectors are stored: "torch.float32" …, "int8", "int4", "int4-residual", or "lora"."""
        return str(self.task_vectors.dtype) if isinstance(self.task_vectors, Tensor) else self.task_vectors.form

    def whole_task_vectors(self) -> InMemory:
        """Task vectors [T, N] that are in memory. Raises TypeError where they are read or multiplied out in pieces."""
        if isinstance(self.task_vectors, InPieces):
            raise self.task_vectors.not_whole()
        return self.task_vectors

    def exact_task_vectors(self, what: str) -> Tensor:
        """Task vectors [T, N] that can be changed number by number. Raises ValueError where they are quantised."""
        found = self.whole_task_vectors()
        if isinstance(found, QuantisedTaskVectors):
            raise ValueError(
                f"{what} needs task vectors that are not quantised; pack them without task_vector_dtype={found.form!r}"
            )
        return found

    def coefficients(self, value: float | Sequence[float] | Tensor) -> Tensor:
        """A new [T, L] matrix of merging coefficients from one number, one per task [T], or a whole [T, L]."""
        value = torch.as_tensor(value, dtype=self.coefficient_dtype)
        shape = (self.num_tasks, self.layout.num_layers)
        if value.shape == shape[:1]:
            value = value[:, None]
        elif value.dim() and value.shape != shape:
            raise ValueError(
                f"coefficients of shape {tuple(value.shape)}; expected a number, [T] = [{shape[0]}] or [T, L] = {list(shape)}"
            )
        if not torch.isfinite(value).all():
            raise ValueError("coefficients hold NaN or Inf")
        return value.detach().to(self.base.device).expand(shape).clone()

    def one_hot(self, task: str) -> Tensor:
        """The [T, L] coefficients at which the merged model is expert ``task``."""
        coefficients = self.coefficients(0.0)
        coefficients[self.tasks.index(task)] = 1.0
        return coefficients

    def merge(self, coefficients: Tensor, out: Tensor | None = None) -> Tensor:
        """base + Σ_t coefficients[t, layer] · task_vectors[t], coefficients [T, L] -> [N]. Of a share, all ranks call it."""
        coefficients = coefficients.to(self.base.device)
        if not isinstance(self.task_vectors, InPieces):
            return weighted_sum(self.base, self.task_vectors, coefficients, self.layout.block_layer, out=out)
        out = torch.empty(self.layout.numel, dtype=self.base.dtype, device=self.base.device) if out is None else out
        store = self.store()
        if self.shards is not None:
            return SpreadMerge(self.shards, store).merge(coefficients, out)
        piece = store.piece or self.layout.numel
        for start in range(0, self.layout.numel, piece):
            length = min(piece, self.layout.numel - start)
            weighted_sum(*store.fetch(start, length), coefficients, self._blocks(start, length), out=out[start : start + length])
        return out

    def merge_layer(self, layer: int, coefficients: Tensor, store: Store, dtype: torch.dtype | None = None) -> Tensor:
        """One packed layer merged at ``coefficients`` [T, L], in memory of its own and of the base's dtype or ``dtype``."""
        shape, (start, length) = self.layout.shapes[layer], self.layout.extent(layer)
        if self.shards is not None:
            spread = SpreadMerge(self.shards, store)
            merged = spread.start([layer], spread.of_ranks(coefficients), dtype or self.base.dtype)()
        else:
            merged = torch.empty(length, dtype=dtype or self.base.dtype, device=store.device)
            weighted_sum(*store.fetch(start, length), coefficients, self._blocks(start, length), out=merged)
        return merged[: shape.numel()].view(shape)

    def contract(self, gradient: Tensor) -> Tensor:
        """∂loss/∂λ [T, L] from ∂loss/∂weights [N], of the weights that `merge` gives."""
        if self.shards is not None:
            return SpreadMerge(self.shards, self.store()).gradient(gradient, self.num_tasks)
        return coefficient_grad(gradient, self.whole_task_vectors(), self.layout.block_layer, self.layout.num_layers)

    def in_memory(self, device: torch.device | str | None = None, *, keep_factors: bool = False) -> PackedWeights:
        """The same with base and task vectors as tensors, on ``device``; by default where they are, or a file's are computed.
        Of a share, this rank's own.

        keep_factors: task vectors that are LoRA factors stay so, in place of being multiplied out.
        """
        if self.is_whole and (device is None or self.base.device == indexed(device)):
            return self
        device = indexed(device or self.layout.block_layer.device)

        def loaded(numbers: Any) -> Any:
            return numbers.in_memory(device) if isinstance(numbers, Spread) else in_memory(numbers, device)

        stay = keep_factors and self.task_vector_form == LORA
        task_vectors = self.task_vectors if stay else loaded(self.task_vectors)
        return replace(self, base=loaded(self.base), task_vectors=task_vectors).to(device)

    @contextmanager
    def expert_source(self, task: str) -> Iterator[Source | None]:
        """Where expert ``task``'s own tensors are read from where its task vector is quantised, which does not give them.

        None where base + task vector is the expert, and where it is not known what was packed. A folder must still be there.
        """
        expert = self.experts.get(task)
        if isinstance(expert, Path):
            if self.folder is None:
                raise ValueError(f"expert '{task}' is read from {expert} again, and where its base lies is not known; set folder")
            folders, config = [(task, expert)], None
            if self.tokenizer is not None:  # rows may be other experts'
                folders = [(name, path) for name, path in self.experts.items() if isinstance(path, Path)]
                config = self.tokenizer.config
            with opened_models(self.folder, folders, self.conversion, config) as (base, sources, _):
                yield as_in_base(base, dict(sources)[task], self.folder)
        else:
            yield expert

    def to(self, device: torch.device | str) -> PackedWeights:
        """The same with everything that is computed with on another device."""
        return replace(
            self,
            layout=replace(self.layout, block_layer=self.layout.block_layer.to(device)),
            base=self.base.to(device),
            task_vectors=self.task_vectors.to(device),
            unchanged={name: tensor.to(device) for name, tensor in self.unchanged.items()},
        )

    def merged_buffers(self) -> Buffers:
        """The merged model's buffers: float ones are the average of the experts', the others are the base's."""
        average = {
            name: torch.stack([self.expert_buffers[task][name].double() for task in self.tasks]).mean(0).to(buffer.dtype)
            for name, buffer in self.buffers.items()
            if all(name in self.expert_buffers[task] for task in self.tasks)
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

    def tensors(
        self,
        coefficients: Tensor,
        dtype: torch.dtype | None = None,
        add_to: Callable[[str, Tensor], None] = lambda name, merged: None,
    ) -> Iterator[tuple[str, Tensor]]:
        """As `state_dict` of the weights merged at ``coefficients`` [T, L], one layer at a time and tied ones once.

        add_to: changes a packed layer in place after it is merged.
        """
        coefficients = coefficients.to(self.base.device)
        packed = [layer for layer, offset in enumerate(self.layout.offsets) if offset is not None]
        store = self.store(piece=max((self.layout.extent(layer)[1] for layer in packed), default=BLOCK))
        for layer, (name, base_dtype) in enumerate(zip(self.layout.names, self.layout.dtypes, strict=True)):
            if self.layout.offsets[layer] is None:
                tensor = self.unchanged[name]
            else:
                tensor = self.merge_layer(layer, coefficients, store)
                add_to(name, tensor)
            yield name, tensor.to(dtype or base_dtype).cpu()
        yield from self.merged_buffers().items()

    def as_stored(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Layers and buffers, one by one, under the names and in the parts of the base's folder."""
        if self.conversion is None or self.folder is None:
            yield from tensors
            return
        with open_checkpoint(self.folder) as base:
            yield from self.conversion.reverted(tensors, CheckpointSource(base, "base"))

    def _blocks(self, start: int, length: int) -> Tensor:
        return self.layout.block_layer[start // BLOCK : (start + length) // BLOCK]
