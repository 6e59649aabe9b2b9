"""Merging model folders tensor by tensor into a new one, without a model in memory: what data-free recipes run on."""

from __future__ import annotations

import fcntl
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from samerge_ext.checkpoints.files import CheckpointError
from samerge_ext.checkpoints.folder import open_checkpoint, read_config
from samerge_ext.checkpoints.lora import AdapterSource, open_expert
from samerge_ext.checkpoints.saving import (
    atomic_write,
    copy_companions,
    no_space,
    out_of_space,
    replace_folder,
    require_space,
    require_target,
    sync,
)
from samerge_ext.checkpoints.shards import Shard, ShardWriter, index_of, plan_shards
from samerge_ext.checkpoints.sources import CheckpointSource, Source, matches
from samerge_ext.elementwise.file_pieces import FilePieces
from samerge_ext.elementwise.piecewise import Piece, Rule, WholeRule, merge_pieces
from samerge_ext.packing.validation import check_finite, check_headers, check_ties, shared_names

RECORD = "merge.json"  # in OUT.state: what is merged, and how far it is


@dataclass
class FileMerge:
    """What is merged from files.

    base: its folder; None where the experts themselves are combined, not their differences from it.
    experts: tasks and folders of models, of adapters of ``names_from``, or "MODEL+ADAPTER". heads: patterns of tensors that are
        kept per task.
    rule_of: name, numbers and dtype of a tensor -> its rule; with ``whole``, called once for all tensors as one vector, for a
        `WholeRule`.
    names_from: the folder that says which tensors there are, and whose configuration and tokenizer are copied.
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
    whole: bool = False
    factors_of: Callable[[Sequence[float], Sequence[str]], list[float]] | None = None
    dtype: torch.dtype | None = None
    out_dtype: torch.dtype | None = None
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
    target = Path(os.path.realpath(out))
    state = target.with_name(f"{target.name}.state")
    if not (state / RECORD).exists():
        require_target(target, overwrite=overwrite)
    with ExitStack() as stack:
        names, experts = _opened(merge, stack)
        stored = {file: _identity(file) for source in (names, *(expert for _, expert in experts)) for file in source.files}
        identity = {**merge.identity, "files": {str(file): list(found) for file, found in stored.items()}}
        run = _Run(merge, names, experts, target, stored)
        record = stack.enter_context(_record(state, json.loads(json.dumps(identity))))
        if record.is_whole() and not record.folder.exists():  # interrupted after the folder got its name
            return Path(out)
        require_target(target, overwrite=overwrite)
        left = run.shards[len(record.content["shards"]) :]
        require_space(target, sum(shard.total_bytes for shard in left))
        try:
            run.merge(record, left)
            run.finish(record)
        except OSError as error:
            if out_of_space(error):
                raise no_space(target, sum(shard.total_bytes for shard in left)) from error
            raise
    return Path(out)


class _Run:
    def __init__(
        self,
        merge: FileMerge,
        names: Source,
        experts: list[tuple[str, Source]],
        target: Path,
        stored: dict[Path, tuple[int, int]],
    ):
        check_headers(names, experts, merge.heads, torch.float32, torch.float32)
        for _, expert in experts:
            check_ties(names, expert)
        self._merge, self._names, self._experts = merge, names, experts
        self._target, self._stored = target, stored
        self._threads = torch.get_num_threads()
        shared = shared_names(names, merge.heads)
        self._buffers = {name for name in shared if names.is_buffer(name)}
        base = names if merge.base is not None else None
        sources = [source for _, source in experts] + ([base] if base else [])
        layers = [name for name in shared if name not in self._buffers]
        wide = [torch.float32] if any(isinstance(source, AdapterSource) for source in sources) else []
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
            self._rules = {name: merge.rule_of(name, names.shape(name).numel(), dtype) for name, dtype in self._dtypes.items()}
        written = [(name, self._written_dtype(name), names.shape(name)) for name in shared]
        self.shards = plan_shards(written, merge.shard_bytes)

    def merge(self, record: _Record, left: list[Shard]) -> None:
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
            whole.restore((record.content["shards"] or [record.content["trims"]])[-1])
        for shard in left:
            with ShardWriter(record.folder, shard) as writer:
                self._merge_all(self._in_order(shard), writer)
            self._check_unchanged()
            record.note(shards=[*record.content["shards"], whole.state() if whole else None])

    def finish(self, record: _Record) -> None:
        """Adds what makes weights a model, and gives the folder its name."""
        folder, merge = record.folder, self._merge
        copy_companions(merge.names_from, folder)
        written = merge.out_dtype or merge.dtype
        if written and (folder / "config.json").exists():
            configuration = read_config(merge.names_from)
            configuration.pop("torch_dtype", None)  # the older name of the same key
            configuration["dtype"] = str(written).removeprefix("torch.")
            (folder / "config.json").write_text(json.dumps(configuration, indent=2))
        if len(self.shards) > 1:
            (folder / "model.safetensors.index.json").write_text(index_of(self.shards))
        for task, expert in self._experts:
            head = {name: expert.read(name) for name in expert.names if matches(name, merge.heads)}
            if head:
                (folder / "heads").mkdir(exist_ok=True)
                (folder / f"heads/{task}.safetensors").write_bytes(save(head))
        (folder / "README.md").write_text(merge.card)
        for path in (*folder.rglob("*"), folder):
            sync(path)
        record.note(whole=True)
        replace_folder(folder, self._target)
        sync(self._target.parent)

    def _in_order(self, shard: Shard) -> list[str]:
        """The shard's tensors in the order of the model, which decides between equal magnitudes of a whole vector."""
        return [name for name in self._names.names if name in shard.begins]

    def _new_pieces(self, name: str) -> Callable[[], Iterator[Piece]]:
        return self._pieces.of(name, self._dtypes[name], self._names.shape(name).numel())

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
            writer.write(name, 0, self._merged_buffer(name).reshape(-1))
            return
        dtype, pieces = self._written_dtype(name), self._new_pieces(name)
        with self._blaming([name]):
            if self._merge.whole:
                results: Iterator[tuple[Piece, Tensor]] = ((piece, self._rules[""].merge(piece)) for piece in pieces())
            else:
                results = merge_pieces(self._rules[name], pieces)
            for piece, merged in results:
                numbers = merged[: piece.size].to(dtype)
                if not all(torch.isfinite(edge) for edge in torch.aminmax(numbers)):
                    raise ValueError(f"the merged '{name}' overflows {dtype}; set dtype to float32 or bfloat16")
                writer.write(name, piece.start, numbers)

    def _merged_buffer(self, name: str) -> Tensor:
        """Float buffers (running statistics) are averaged, others are the base's."""
        buffer = self._names.read(name)
        if not buffer.is_floating_point():
            return buffer
        return torch.stack([expert.read(name).double() for _, expert in self._experts]).mean(0).to(buffer.dtype)

    def _written_dtype(self, name: str) -> torch.dtype:
        return self._names.dtype(name) if name in self._buffers else self._written[name]

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


class _Record:
    """The progress of a merge in OUT.state.

    content: "identity"; "factors" and "trims" once they are found; for each finished shard what is left to trim after it;
    "whole". folder: what becomes OUT.
    """

    def __init__(self, state: Path, identity: dict):
        self._path, self.folder = state / RECORD, state / "merged"
        self.content = json.loads(self._path.read_bytes()) if self._path.exists() else {}
        if self.content.get("identity") != identity:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._path.unlink(missing_ok=True)
            self.folder.mkdir()
            self.content = {}
            self.note(identity=identity, shards=[])

    def is_whole(self) -> bool:
        return self.content.get("whole", False)

    def note(self, **entries: Any) -> None:
        self.content.update(entries)
        with atomic_write(self._path) as file:
            file.write(json.dumps(self.content).encode())


@contextmanager
def _record(state: Path, identity: dict) -> Iterator[_Record]:
    """The record in OUT.state, held by one process at a time; removed when the merge is over, or failed before any shard."""
    state.mkdir(parents=True, exist_ok=True)
    with open(state / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"{state} is held by another merge; wait for its end or choose another folder") from error
        record = _Record(state, identity)
        keep = True
        try:
            yield record
            keep = False
        finally:
            if not (keep and record.content["shards"]):
                shutil.rmtree(record.folder, ignore_errors=True)
                for path in (state / RECORD, state / "lock", *state.glob(f".{RECORD}.*.tmp")):
                    path.unlink(missing_ok=True)
                if not any(state.iterdir()):  # a learned merge may have left its own state there
                    state.rmdir()


def _opened(merge: FileMerge, stack: ExitStack) -> tuple[Source, list[tuple[str, Source]]]:
    """What says which tensors there are, and the experts, until the stack ends."""
    checkpoint = stack.enter_context(open_checkpoint(merge.names_from, beside_adapter=merge.base is None))
    names = CheckpointSource(checkpoint, "base")
    opened = [(task, open_expert(path, names, f"expert '{task}'")) for task, path in merge.experts]
    return names, [(task, stack.enter_context(expert)) for task, expert in opened]


def _promoted(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    return functools.reduce(torch.promote_types, dtypes)


def _identity(file: Path) -> tuple[int, int]:
    try:
        status = os.stat(file)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} vanished while it was being merged; restore it and merge again") from error
    return status.st_size, status.st_mtime_ns
