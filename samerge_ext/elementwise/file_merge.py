"""Merging model folders tensor by tensor into a new one, without a model in memory: what data-free recipes run on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from samerge_ext.checkpoints.alignment import align
from samerge_ext.checkpoints.companions import without_quantisation
from samerge_ext.checkpoints.compatibility import check_models
from samerge_ext.checkpoints.folder import open_checkpoint
from samerge_ext.checkpoints.lora import model_and_adapter, open_expert
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
from samerge_ext.checkpoints.shards import Shard, ShardWriter, index_of
from samerge_ext.checkpoints.sources import STATISTICS, CheckpointSource, Experts, Source, matches
from samerge_ext.elementwise.file_pieces import InTurn
from samerge_ext.elementwise.file_plan import FileMerge, FilePlan
from samerge_ext.elementwise.piecewise import Piece, WholeRule, merge_pieces
from samerge_ext.elementwise.record import RECORD, Record, held_record
from samerge_ext.elementwise.staging import on_own_stream
from samerge_ext.packing.stores import check_device, indexed
from samerge_ext.packing.validation import check_finite, check_range, check_tasks

GPU_WORKERS = 8  # that read from the page cache at 5 to 10 GB/s each, by estimate: as much as PCIe takes


def merge_files(merge: FileMerge, out: str | Path, *, overwrite: bool = False) -> Path:
    """Writes the model folder ``out``: safetensors, configuration, tokenizer, heads/TASK.safetensors and the model card.

    Memory is bounded, whatever the models' size: that of `FilePieces` for each of one thread more than torch has, of at most
    `GPU_WORKERS` beside a GPU, and once more where whole vectors or norms are looked at; of a rule that is `alone`, one thread's,
    and what it holds of one tensor. Until the folder is whole everything lies in OUT.state; the same merge called again after an
    interruption goes on after the last finished shard, to the same bytes. What another merge left there is discarded, or the same
    one on another kind of device, which may round otherwise.

    Raises ValueError (CheckpointError for files) for a device that cannot be used and for models that do not fit together, before
    anything is written, for NaN and Inf, and for a full disk or an input that vanished or changed.
    """
    device = _checked_device(merge.device)
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
        identity = {**merge.identity, "device": device.type, "files": {str(file): list(found) for file, found in stored.items()}}
        if merge.stacks is not None:
            names, experts = _stacked(merge, names, experts)
        plan = FilePlan(merge, align(names, experts, merge.heads, merge.keep, merge.names_from))
        run = _Run(merge, plan, target, stored, device)
        record = stack.enter_context(held_record(state, json.loads(json.dumps(identity))))
        if record.is_over(target):
            return Path(out)
        require_target(target, overwrite=overwrite)
        left = record.left(plan.shards)
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
    def __init__(self, merge: FileMerge, plan: FilePlan, target: Path, stored: dict[Path, tuple[int, int]], device: torch.device):
        self._merge, self._plan, self._target, self._stored = merge, plan, target, stored
        self._device, self._pieces = device, plan.pieces(device)
        rule = plan.rules.get("")
        self._whole = rule if isinstance(rule, WholeRule) else None
        self._threads = torch.get_num_threads()

    def merge(self, record: Record, left: list[Shard]) -> None:
        """Writes the shards that are left, and notes each when it is whole."""
        if self._merge.factors_of:
            if "factors" not in record.content:
                record.note(factors=self._merge.factors_of(self._squares(), [task for task, _ in self._plan.experts]))
            self._pieces.factors = record.content["factors"]
        whole = self._whole
        if whole is not None:
            if "trims" not in record.content:
                with self._blaming(self._plan.layers):
                    for _ in range(whole.rounds):
                        for piece in self._in_turn(self._plan.layers):
                            whole.look(piece)
                        whole.next_round()
                record.note(trims=whole.state())
            trims = [record.content["trims"], *(shard["trims"] for shard in record.content["shards"])]
            whole.restore(trims[-1])
        with self._workers() as workers:
            for shard in left:
                with ShardWriter(record.folder, shard) as writer:
                    self._merge_all(self._plan.in_order(shard), writer, workers)
                self._check_unchanged()
                finished = {"checksum": writer.checksum(), "trims": whole.state() if whole else None}
                record.note(shards=[*record.content["shards"], finished])

    def finish(self, record: Record, overwrite: bool) -> None:
        """Adds what makes weights a model, and gives the folder its name."""
        folder, plan = record.folder, self._plan
        plan.companions.copy(folder)
        if (folder / "config.json").exists():
            configuration = plan.configuration(without_quantisation(read_json(folder / "config.json")))
            (folder / "config.json").write_text(json.dumps(configuration, indent=2))
        if len(plan.shards) > 1:
            (folder / "model.safetensors.index.json").write_text(index_of(plan.shards))
        for task, expert in plan.experts:
            head = {name: expert.read(name) for name in expert.names if name in plan.heads}
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

    def _in_turn(self, names: list[str]) -> Iterator[Piece]:
        return self._pieces.in_turn([self._plan.extent(name) for name in names])

    @contextmanager
    def _workers(self) -> Iterator[Executor]:
        """Threads that take one tensor after the other, so that some read or write while others compute.

        As one vector tensors wait for each other: which of equal magnitudes are kept is a matter of their order. Where a rule
        wants to be alone there is one, which computes with all of torch's.
        """
        workers = self._threads + 1  # one of them waits for the disk
        if self._device.type != "cpu":
            workers = min(workers, GPU_WORKERS)
        alone = any(rule.alone for rule in self._plan.rules.values())
        threads = self._threads if alone else 1
        pool = ThreadPoolExecutor(
            1 if alone or self._merge.whole else workers, initializer=self._begin_worker, initargs=(threads,)
        )
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(self._threads)

    def _begin_worker(self, threads: int) -> None:
        torch.set_num_threads(threads)
        on_own_stream(self._device)

    def _merge_all(self, names: list[str], writer: ShardWriter, workers: Executor) -> None:
        in_turn = None
        if self._merge.whole:
            in_turn = InTurn(self._pieces, [self._plan.extent(name) for name in names if name not in self._plan.buffers])
        try:
            for done in [workers.submit(self._merge_tensor, name, writer, in_turn) for name in names]:
                done.result()
        except BaseException:
            workers.shutdown(cancel_futures=True)  # before the file is closed that they write
            raise
        finally:
            if in_turn is not None:
                in_turn.close()

    def _merge_tensor(self, name: str, writer: ShardWriter, in_turn: InTurn | None) -> None:
        plan = self._plan
        if name in plan.buffers:
            writer.write(plan.called[name], 0, self._merged_buffer(name).reshape(-1))
            return
        try:
            self._write_merged(name, writer, in_turn)
        except ValueError:
            mask = plan.names.read(name)
            if not all(torch.equal(expert.read(name), mask) for _, expert in plan.experts):
                raise
            writer.write(plan.called[name], 0, mask.reshape(-1).to(plan.written_dtype(name)))  # infinite in all models: a mask

    def _write_merged(self, name: str, writer: ShardWriter, in_turn: InTurn | None) -> None:
        plan, extent = self._plan, self._plan.extent(name)
        with self._blaming([name]):
            if in_turn is not None:
                results: Iterator[tuple[Piece, Tensor]] = ((piece, plan.rules[""].merge(piece)) for piece in in_turn.of(extent))
            else:
                results = merge_pieces(plan.rules[name], self._pieces.of(extent))
            for piece, merged in results:
                narrowed = _narrowed(name, merged[: piece.size], plan.written_dtype(name))
                writer.write(plan.called[name], piece.start, self._pieces.to_host(narrowed))

    def _merged_buffer(self, name: str) -> Tensor:
        """Running statistics move towards the experts' as the weights do, and stay within the range of all models'; what is
        kept, and other buffers, are as they are."""
        plan, whose = self._plan, self._plan.whose(name)
        buffer = whose.read(name)
        check_finite(whose, name, buffer)
        if name in plan.kept:
            return buffer if plan.is_kept_buffer(name) else _narrowed(name, buffer, plan.written_dtype(name))
        if not matches(name, STATISTICS):
            return buffer
        shares = [max(0.0, share) for share in self._merge.rule_of(name, buffer.shape, buffer.dtype).shares]
        total = sum(shares)
        if total > 1 or (self._merge.base is None and total):
            shares = [share / total for share in shares]
        merged = (1 - sum(shares)) * buffer.double()
        for share, (_, expert) in zip(shares, plan.experts, strict=True):
            finetuned = expert.read(name)
            check_finite(expert, name, finetuned)
            merged += share * finetuned.double()
        return merged.to(buffer.dtype)

    def _squares(self) -> list[float]:
        """Of the task vectors' norms."""
        squares = [0.0] * len(self._plan.experts)
        for piece in self._in_turn(self._plan.layers):
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
                for source in {id(s): s for s in (self._plan.names, *(expert for _, expert in self._plan.experts))}.values():
                    check_finite(source, name, source.read(name))
            raise

    def _check_unchanged(self) -> None:
        for file, found in self._stored.items():
            if _identity(file) != found:
                raise CheckpointError(f"{file} changed while it was being merged; merge again")


def _checked_device(device: str) -> torch.device:
    check_device(device)
    if torch.device(device).type not in ("cpu", "cuda"):
        raise ValueError(f"device={device!r}: files are merged on the CPU or on a CUDA GPU; leave device out to merge on the CPU")
    return indexed(device)


def _opened(merge: FileMerge, stack: ExitStack) -> tuple[Source, Experts]:
    """What says which tensors there are, and the experts, until the stack ends."""
    checkpoint = stack.enter_context(open_checkpoint(merge.names_from, beside_adapter=merge.base is None))
    names = CheckpointSource(checkpoint, "base")
    opened = [(task, open_expert(path, names, f"expert '{task}'")) for task, path in merge.experts]
    return names, [(task, stack.enter_context(expert)) for task, expert in opened]


def _stacked(merge: FileMerge, names: Source, experts: Experts) -> tuple[Source, Experts]:
    """The models that are merged, of layers of those that were opened."""
    assert merge.stacks is not None
    of_base, of_others = merge.stacks
    opened = {path: source for (_, path), (_, source) in zip(merge.experts, experts, strict=True)}
    opened.setdefault(merge.names_from, names)
    stacked = [(f"source-{i + 1}", stack.of(opened, f"source {i + 1} of the slices")) for i, stack in enumerate(of_others)]
    return of_base.of(opened, "the base in the slices") if of_base else stacked[0][1], stacked


def _narrowed(name: str, numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """In the type that is written; raises ValueError where numbers leave its range."""
    numbers = numbers.to(dtype)
    check_range(f"the merged '{name}'", numbers)
    return numbers


def _identity(file: Path) -> tuple[int, int]:
    try:
        status = os.stat(file)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} vanished while it was being merged; restore it and merge again") from error
    return status.st_size, status.st_mtime_ns
