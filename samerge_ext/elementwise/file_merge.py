"""Merging model folders tensor by tensor into a new one, without a model in memory: what data-free recipes run on."""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from samerge_ext.checkpoints.alignment import Aligned, NamingNote, align
from samerge_ext.checkpoints.companions import Companions, with_dtype, without_quantisation
from samerge_ext.checkpoints.compatibility import check_models
from samerge_ext.checkpoints.folder import open_checkpoint
from samerge_ext.checkpoints.lora import model_and_adapter, model_of, open_expert
from samerge_ext.checkpoints.places import folder_of
from samerge_ext.checkpoints.reading import CheckpointError, naming, read_json
from samerge_ext.checkpoints.saving import (
    no_space,
    out_of_space,
    replace_folder,
    require_apart,
    require_space,
    require_target,
    sync,
)
from samerge_ext.checkpoints.shards import Shard, ShardWriter, index_of, plan_shards
from samerge_ext.checkpoints.sources import STATISTICS, CheckpointSource, Source, matches
from samerge_ext.elementwise.file_pieces import FilePieces
from samerge_ext.elementwise.piecewise import Piece, Rule, WholeRule, merge_pieces
from samerge_ext.elementwise.record import RECORD, Record, held_record
from samerge_ext.packing.validation import (
    check_finite,
    check_headers,
    check_heads,
    check_range,
    check_tasks,
    check_ties,
    shared_names,
)


@dataclass
class FileMerge:
    """What is merged from files.

    base: its folder; None where the experts themselves are combined, not their differences from it.
    experts: tasks and folders of models, of adapters of ``names_from``, or "MODEL+ADAPTER".
    heads: patterns of tensors that are kept per task. keep: of those that not all models have, and that stay as they are; where
        they are an expert's, names, configuration and companions are that expert's.
    rule_of: name, numbers and dtype of a tensor -> its rule; with ``whole``, called once for all tensors as one vector, for a
        `WholeRule`.
    names_from: the folder that says which tensors there are. companions: what goes along, and of keep an expert's tokenizer too
        unless companions name one; all of that folder's by default.
    factors_of: the squares of the task vectors' norms and the tasks -> a factor for every task vector, before any rule
        (`methods.distac.shortening`).
    dtype: what tensors are read as; by default what the models' own types promote to, and at least fp32 where there are
        adapters. out_dtype: what is written; by default ``dtype``, or what the full models' types promote to.
    identity: says, as JSON, what the rules are made from. card: the model card.
    """

    experts: list[tuple[str, Path]]
    rule_of: Callable[[str, int, torch.dtype], Rule]
    names_from: Path
    base: Path | None = None
    heads: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    whole: bool = False
    factors_of: Callable[[Sequence[float], Sequence[str]], list[float]] | None = None
    dtype: torch.dtype | None = None
    out_dtype: torch.dtype | None = None
    companions: Companions | None = None
    identity: dict = field(default_factory=dict)
    card: str = ""
    shard_bytes: int = 5_000_000_000


def merge_files(merge: FileMerge, out: str | Path, *, overwrite: bool = False) -> Path:
    """Writes the model folder ``out``: safetensors, configuration, tokenizer, heads/TASK.safetensors and the model card.

    Memory is bounded, whatever the models' size. Until the folder is whole everything lies in OUT.state; the same merge called
    again after an interruption goes on after the last finished shard, to the same bytes. What another merge left there is
    discarded.

    Raises ValueError (CheckpointError for files) for models that do not fit together, before anything is written, for NaN and
    Inf, and for a full disk or an input that vanished or changed.
    """
    check_tasks([task for task, _ in merge.experts])
    target = Path(os.path.realpath(out))
    state = target.with_name(f"{target.name}.state")
    paths = [merge.names_from, *(path for _, path in merge.experts)]
    require_apart(target, [part for path in paths for part in model_and_adapter(path) if part is not None])
    if not (state / RECORD).exists():
        require_target(target, overwrite=overwrite)
    check_models(merge.names_from, merge.experts, (*merge.heads, *merge.keep))
    with ExitStack() as stack:
        names, experts = _opened(merge, stack)
        stored = {file: _identity(file) for source in (names, *(expert for _, expert in experts)) for file in source.files}
        require_apart(target, stored)
        identity = {**merge.identity, "files": {str(file): list(found) for file, found in stored.items()}}
        run = _Run(merge, align(names, experts, merge.heads, merge.keep, merge.names_from), target, stored)
        record = stack.enter_context(held_record(state, json.loads(json.dumps(identity))))
        if record.is_over(target):
            return Path(out)
        require_target(target, overwrite=overwrite)
        left = record.left(run.shards)
        require_space(target, sum(shard.total_bytes for shard in left))
        try:
            run.merge(record, left)
            run.finish(record, overwrite)
        except OSError as error:
            if out_of_space(error):
                raise no_space(target, sum(shard.total_bytes for shard in left)) from error
            with naming(target):
                raise
    return Path(out)


class _Run:
    def __init__(
        self,
        merge: FileMerge,
        models: Aligned,
        target: Path,
        stored: dict[Path, tuple[int, int]],
    ):
        names, experts = models.base, models.experts
        check_headers(names, experts, models.heads, torch.float32, torch.float32)
        for _, expert in experts:
            check_ties(names, expert)
        check_heads(experts, models.heads)
        self._merge, self._names, self._experts, self._heads, self._kept = merge, names, experts, models.heads, models.kept
        if models.host is not None:
            label = dict(experts)[models.host].label
            text = "the names of its tensors, config.json, tokenizer and all else are those of this model, not the base's"
            warnings.warn(f"{label}: tensors of it are kept; in the merged model {text}", NamingNote, stacklevel=4)
        self._companions = merge.companions or Companions(folder_of(merge.names_from))
        if models.host is not None:
            self._companions = replace(self._companions, folder=folder_of(model_of(dict(merge.experts)[models.host])))
        self._companions.check()
        self._target, self._stored = target, stored
        self._threads = torch.get_num_threads()
        shared = shared_names(names, models.heads)
        self._buffers = {name for name in shared if names.is_buffer(name)} | self._kept.keys()
        base = names if merge.base is not None else None
        sources = [source for _, source in experts] + ([base] if base else [])
        layers = [name for name in shared if name not in self._buffers]
        computed = any(source.dtype(name) != source.weight_dtype(name) for source in sources for name in layers)
        wide = [torch.float32] if computed else []  # where there are adapters
        self._dtypes = {name: merge.dtype or _promoted([*wide, *(source.dtype(name) for source in sources)]) for name in layers}
        self._written = {
            name: merge.out_dtype or merge.dtype or _promoted(source.weight_dtype(name) for source in sources) for name in layers
        }
        stored_dtypes = {source.dtype(name) for source in sources for name in layers}
        self._pieces = FilePieces(base, [source for _, source in experts], stored_dtypes, self._dtypes.values())
        self._numbers = sum(names.shape(name).numel() for name in layers)
        if merge.whole:
            if len(set(self._dtypes.values())) > 1:
                raise ValueError("trimming the whole vector needs one dtype for all tensors; set dtype")
            self._rules = {"": merge.rule_of("", self._numbers, next(iter(self._dtypes.values())))}
        else:
            self._rules = {
                name: merge.rule_of(name, names.shape(name).numel(), dtype) for name, dtype in self._dtypes.items()
            }
        shared += [name for name in self._kept if name not in names]
        self._called = {name: self._written_name(name, models) for name in shared}
        written = [(self._called[name], self._written_dtype(name), self._whose(name).shape(name)) for name in shared]
        self.shards = plan_shards(written, merge.shard_bytes)

    def merge(self, record: Record, left: list[Shard]) -> None:
        """Writes the shards that are left, and notes each when it is whole."""
        if self._merge.factors_of:
            if "factors" not in record.content:
                record.note(factors=self._merge.factors_of(self._squares(), [task for task, _ in self._experts]))
            self._pieces.factors = record.content["factors"]
        rule = self._rules.get("")
        whole = rule if isinstance(rule, WholeRule) else None
        if whole is not None:
            if "trims" not in record.content:
                with self._blaming(list(self._dtypes)):
                    for _ in range(whole.rounds):
                        for piece in self._all_pieces():
                            whole.look(piece)
                        whole.next_round()
                record.note(trims=whole.state())
            trims = [record.content["trims"], *(shard["trims"] for shard in record.content["shards"])]
            whole.restore(trims[-1])
        for shard in left:
            with ShardWriter(record.folder, shard) as writer:
                self._merge_all(self._in_order(shard), writer)
            self._check_unchanged()
            finished = {"checksum": writer.checksum(), "trims": whole.state() if whole else None}
            record.note(shards=[*record.content["shards"], finished])

    def finish(self, record: Record, overwrite: bool) -> None:
        """Adds what makes weights a model, and gives the folder its name."""
        folder = record.folder
        self._companions.copy(folder)
        if (folder / "config.json").exists():
            configuration = self._configuration(without_quantisation(read_json(folder / "config.json")))
            (folder / "config.json").write_text(json.dumps(configuration, indent=2))
        if len(self.shards) > 1:
            (folder / "model.safetensors.index.json").write_text(index_of(self.shards))
        for task, expert in self._experts:
            head = {name: expert.read(name) for name in expert.names if name in self._heads}
            if head:
                (folder / "heads").mkdir(exist_ok=True)
                (folder / f"heads/{task}.safetensors").write_bytes(save(head))
        (folder / "README.md").write_text(self._merge.card)
        self._check_unchanged()
        for path in (*folder.rglob("*"), folder):
            sync(path)
        record.note(whole=folder.stat().st_ino)
        replace_folder(folder, self._target, overwrite=overwrite)
        sync(self._target.parent)

    def _configuration(self, configuration: dict) -> dict:
        """config.json with the type that is written, in nested configurations too; as it was where several are written."""
        asked = self._merge.out_dtype or self._merge.dtype
        written = {self._written_dtype(name) for name in (*self._dtypes, *self._kept) if not self._is_kept_buffer(name)}
        if asked is not None:
            configuration = {"dtype": None, **configuration}
        return with_dtype(configuration, written.pop()) if len(written) == 1 else configuration

    def _in_order(self, shard: Shard) -> list[str]:
        """The shard's tensors in the order of the model, which decides between equal magnitudes of a whole vector."""
        return [name for name in dict.fromkeys((*self._names.names, *self._kept)) if self._called.get(name) in shard.begins]

    def _new_pieces(self, name: str) -> Callable[[], Iterator[Piece]]:
        rule = self._rules["" if self._merge.whole else name]
        return self._pieces.of(name, self._dtypes[name], self._names.shape(name).numel(), rule.unseen)

    def _all_pieces(self) -> Iterator[Piece]:
        return (piece for name in self._dtypes for piece in self._new_pieces(name)())

    def _merge_all(self, names: list[str], writer: ShardWriter) -> None:
        """Threads take one tensor after the other, so that some read or write while others compute.

        As one vector tensors wait for each other: which of equal magnitudes are kept is a matter of their order.
        """
        workers = 1 if self._merge.whole else self._threads + 1  # one of them waits for the disk
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                for done in [pool.submit(self._merge_tensor, name, writer) for name in names]:
                    done.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            finally:
                torch.set_num_threads(self._threads)

    def _merge_tensor(self, name: str, writer: ShardWriter) -> None:
        if name in self._buffers:
            writer.write(self._called[name], 0, self._merged_buffer(name).reshape(-1))
            return
        dtype, pieces = self._written_dtype(name), self._new_pieces(name)
        try:
            self._write_merged(name, dtype, pieces, writer)
        except ValueError:
            mask = self._names.read(name)
            if not all(torch.equal(expert.read(name), mask) for _, expert in self._experts):
                raise
            writer.write(self._called[name], 0, mask.reshape(-1).to(dtype))  # infinite in all models: a mask

    def _write_merged(self, name: str, dtype: torch.dtype, pieces: Callable[[], Iterator[Piece]], writer: ShardWriter) -> None:
        with self._blaming([name]):
            if self._merge.whole:
                results: Iterator[tuple[Piece, Tensor]] = ((piece, self._rules[""].merge(piece)) for piece in pieces())
            else:
                results = merge_pieces(self._rules[name], pieces)
            for piece, merged in results:
                writer.write(self._called[name], piece.start, _narrowed(name, merged[: piece.size], dtype))

    def _merged_buffer(self, name: str) -> Tensor:
        """Running statistics move towards the experts' as the weights do, and stay within the range of all models'; what is
        kept, and other buffers, are as they are."""
        buffer = self._whose(name).read(name)
        check_finite(self._whose(name), name, buffer)
        if name in self._kept:
            return buffer if self._is_kept_buffer(name) else _narrowed(name, buffer, self._written_dtype(name))
        if not matches(name, STATISTICS):
            return buffer
        shares = [max(0.0, share) for share in self._merge.rule_of(name, buffer.numel(), buffer.dtype).shares]
        total = sum(shares)
        if total > 1 or (self._merge.base is None and total):
            shares = [share / total for share in shares]
        merged = (1 - sum(shares)) * buffer.double()
        for share, (_, expert) in zip(shares, self._experts, strict=True):
            finetuned = expert.read(name)
            check_finite(expert, name, finetuned)
            merged += share * finetuned.double()
        return merged.to(buffer.dtype)

    def _whose(self, name: str) -> Source:
        """The model that a tensor's shape, and what is not merged of it, is from."""
        return self._kept.get(name, self._names)

    def _is_kept_buffer(self, name: str) -> bool:
        return name in self._kept and self._kept[name].is_buffer(name)

    def _written_dtype(self, name: str) -> torch.dtype:
        if name not in self._buffers:
            return self._written[name]
        asked = self._merge.out_dtype or self._merge.dtype if name in self._kept and not self._is_kept_buffer(name) else None
        return asked or self._whose(name).dtype(name)

    def _written_name(self, name: str, models: Aligned) -> str:
        """The base's, or that of the expert whose configuration the merged model has."""
        host = self._names if models.host is None else dict(models.experts)[models.host]
        return host.stored_name(name) if name in host else name

    def _squares(self) -> list[float]:
        """Of the task vectors' norms."""
        squares = [0.0] * len(self._experts)
        for piece in self._all_pieces():
            for task, row in enumerate(piece.rows()):
                squares[task] += float(row.double().square().sum())
        return squares

    @contextmanager
    def _blaming(self, names: list[str]) -> Iterator[None]:
        """Turns a complaint about numbers into one that names the file they are in."""
        try:
            yield
        except CheckpointError:
            raise
        except ValueError:
            for name in names:
                for source in {id(s): s for s in (self._names, *(expert for _, expert in self._experts))}.values():
                    check_finite(source, name, source.read(name))
            raise

    def _check_unchanged(self) -> None:
        for file, found in self._stored.items():
            if _identity(file) != found:
                raise CheckpointError(f"{file} changed while it was being merged; merge again")


def _opened(merge: FileMerge, stack: ExitStack) -> tuple[Source, list[tuple[str, Source]]]:
    """What says which tensors there are, and the experts, until the stack ends."""
    checkpoint = stack.enter_context(open_checkpoint(merge.names_from, beside_adapter=merge.base is None))
    names = CheckpointSource(checkpoint, "base")
    opened = [(task, open_expert(path, names, f"expert '{task}'")) for task, path in merge.experts]
    return names, [(task, stack.enter_context(expert)) for task, expert in opened]


def _narrowed(name: str, numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """In the type that is written; raises ValueError where numbers leave its range."""
    numbers = numbers.to(dtype)
    check_range(f"the merged '{name}'", numbers)
    return numbers


def _promoted(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    return functools.reduce(torch.promote_types, dtypes)


def _identity(file: Path) -> tuple[int, int]:
    try:
        status = os.stat(file)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} vanished while it was being merged; restore it and merge again") from error
    return status.st_size, status.st_mtime_ns
