"""Merging model folders tensor by tensor into a new one, without a model in memory: what data-free recipes run on."""

from __future__ import annotations

import itertools
import json
import os
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from samerge_ext.checkpoints.companions import without_quantisation
from samerge_ext.checkpoints.lora import model_and_adapter
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
from samerge_ext.checkpoints.sources import STATISTICS, matches
from samerge_ext.elementwise.file_pieces import InTurn
from samerge_ext.elementwise.file_plan import FileMerge, FilePlan
from samerge_ext.elementwise.opening import opened
from samerge_ext.elementwise.piecewise import Piece, WholeRule, merge_pieces
from samerge_ext.elementwise.ranks import ALONE, Rank, not_whole_yet
from samerge_ext.elementwise.record import RECORD, Record, held_record
from samerge_ext.elementwise.staging import on_own_stream
from samerge_ext.packing.validation import check_finite, check_range
from samerge_ext.reports.report import facts_of_run, versions
from samerge_ext.reports.writing import CARD, report_files

FACTORS, TRIMS = "factors", "trims"  # notes of a record: of the task vectors; what is to be trimmed, before the first shard


def merge_files(
    merge: FileMerge, out: str | Path, *, overwrite: bool = False, rank: Rank = ALONE, progress: bool = False
) -> Path:
    """Writes the model folder ``out``: safetensors, configuration, tokenizer, heads/TASK.safetensors and the model card.

    Memory is bounded, whatever the models' size: that of `FilePieces` for each of one thread more than torch has, of at most
    `GPU_WORKERS` beside a GPU, and once more where whole vectors or norms are looked at; of a rule that is `alone`, one thread's,
    and what it holds of one tensor. Until the folder is whole everything lies in OUT.state; the same merge called again after an
    interruption goes on after the last finished shard, to the same bytes. What another merge left there is discarded, or the same
    one on another kind of device, which may round otherwise.

    rank: where several processes share the merge, which one this is. Each writes its share of the shards, the bytes that one
    alone would, and waits for none: the last one to end makes OUT of them, and the others warn (`NotWholeYet`) of what is
    missing. What an interrupted one had not finished is written when the merge is called again, by any number of ranks.
    progress: show how many bytes are written, on a terminal.

    Raises ValueError (CheckpointError for files) for a device that cannot be used, for models that do not fit together and for a
    rank that merges otherwise than the others, before anything is written, for NaN and Inf, and for a full disk or an input that
    vanished or changed.
    """
    started = time.perf_counter()
    target = Path(os.path.realpath(out))
    state = target.with_name(f"{target.name}.state")
    paths = [merge.names_from, *(path for _, path in merge.experts)]
    require_apart(target, [part for path in paths for part in model_and_adapter(path) if part is not None])
    if not (state / RECORD).exists():
        require_target(target, overwrite=overwrite)
    with ExitStack() as stack:
        models = stack.enter_context(opened(merge))
        stored = {file: _identity(file) for file in models.files}
        require_apart(target, stored)
        plan, device = models.plan, models.device
        files = {str(file): list(found) for file, found in stored.items()}
        identity = {**merge.identity, "device": device.type, "files": files, "shard_bytes": merge.shard_bytes}
        if models.tokenizer is not None:
            identity["tokenizer"] = models.tokenizer.to_json()
        together = rank.count > 1
        record = stack.enter_context(held_record(state, json.loads(json.dumps(identity)), together=together))
        if record.is_over(target):
            return Path(out)
        require_target(target, overwrite=overwrite)
        own = rank.share(plan.shards)
        left = record.left(own)
        needed = sum(shard.total_bytes for shard in left)
        require_space(target, needed)
        run = _Run(merge, plan, target, stored, device)
        in_one_go = not together and len(left) == len(plan.shards)
        try:
            with tqdm(desc=target.name, unit="B", unit_scale=True, disable=None if progress else True) as bar:
                run.merge(record, left, bar)
            last = record.is_last()
            missing = record.left([shard for shard in plan.shards if shard not in own]) if last else []
            if last and not missing:
                run.finish(record, overwrite, started if in_one_go else None)
                return Path(out)
        except OSError as error:
            if out_of_space(error):
                raise no_space(target, needed) from error
            with naming(target):
                raise
        warnings.warn(not_whole_yet(target, rank, plan.shards, missing), stacklevel=2)
    return Path(out)


class _Run:
    def __init__(self, merge: FileMerge, plan: FilePlan, target: Path, stored: dict[Path, tuple[int, int]], device: torch.device):
        self._merge, self._plan, self._target, self._stored = merge, plan, target, stored
        self._device, self._pieces = device, plan.pieces(device)
        rule = plan.rules.get("")
        self._whole = rule if isinstance(rule, WholeRule) else None
        self._threads = torch.get_num_threads()

    def merge(self, record: Record, left: list[Shard], bar: tqdm) -> None:
        """Writes the shards that are left, and notes each when it is whole. bar: moves by the bytes of every tensor."""
        if not left:
            return
        if self._merge.factors_of:
            tasks = [task for task, _ in self._plan.experts]
            note = record.note_of(FACTORS) or record.note(FACTORS, each=self._merge.factors_of(self._squares(), tasks))
            self._pieces.factors = note["each"]
        whole = self._whole
        if whole is not None and record.note_of(TRIMS) is None:
            with self._blaming(self._plan.layers):
                for _ in range(whole.rounds):
                    for piece in self._in_turn(self._plan.layers):
                        whole.look(piece)
                    whole.next_round()
            record.note(TRIMS, trims=whole.state())
        bar.reset(sum(self._bytes(name) for shard in left for name in self._plan.in_order(shard)))
        with self._workers() as workers:
            for shard in left:
                if whole is not None:
                    self._come_to(shard, record, whole)
                with ShardWriter(record.folder, shard) as writer:
                    self._merge_all(self._plan.in_order(shard), writer, workers, bar)
                self._check_unchanged()
                record.note(shard.file, checksum=writer.checksum(), trims=whole.state() if whole else None)

    def _come_to(self, shard: Shard, record: Record, whole: WholeRule) -> None:
        """Has the rule know what is left to trim at a shard: what is noted of the one before it, or else, where that is another
        process's, by going through its tensors from where it is known."""
        shards = self._plan.shards
        place = known = shards.index(shard)
        while known and record.note_of(shards[known - 1].file) is None:
            known -= 1
        note = record.note_of(shards[known - 1].file if known else TRIMS)
        assert note is not None
        whole.restore(note["trims"])
        for passed in shards[known:place]:
            for piece in self._in_turn([name for name in self._plan.in_order(passed) if name not in self._plan.buffers]):
                whole.skip(piece)

    def finish(self, record: Record, overwrite: bool, started: float | None) -> None:
        """Adds what makes weights a model, and gives the folder its name. started: when the merge did, if it was in one go."""
        folder, plan = record.folder, self._plan
        configuration = None
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
        for name, content in self._about(configuration, started).items():
            (folder / name).write_text(content, encoding="utf-8")
        self._check_unchanged()
        for path in (*folder.rglob("*"), folder):
            sync(path)
        record.note_whole()
        replace_folder(folder, self._target, overwrite=overwrite)
        sync(self._target.parent)
        record.over = True

    def _about(self, configuration: dict | None, started: float | None) -> dict[str, str]:
        """The model card, and the report where it is wanted."""
        merge = self._merge
        if merge.about is None:
            return {CARD: merge.card} if merge.card else {}
        run = facts_of_run(self._device, time.perf_counter() - started if started else None)
        report = replace(self._plan.described(merge.about), versions=versions(), run=run)
        return report_files(report, self._target.name, configuration, card=merge.card, with_page=merge.with_page)

    def _in_turn(self, names: list[str]) -> Iterator[Piece]:
        return self._pieces.in_turn([self._plan.extent(name) for name in names])

    @contextmanager
    def _workers(self) -> Iterator[Executor]:
        """Threads that take one tensor after the other, so that some read or write while others compute.

        As one vector tensors wait for each other: which of equal magnitudes are kept is a matter of their order. Where a rule
        wants to be alone there is one, which computes with all of torch's.
        """
        alone = any(rule.alone for rule in self._plan.rules.values())
        threads = self._threads if alone else 1
        workers = self._plan.workers(self._device)
        pool = ThreadPoolExecutor(workers, initializer=self._begin_worker, initargs=(threads,))
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(self._threads)

    def _begin_worker(self, threads: int) -> None:
        torch.set_num_threads(threads)
        on_own_stream(self._device)

    def _merge_all(self, names: list[str], writer: ShardWriter, workers: Executor, bar: tqdm) -> None:
        in_turn = None
        if self._merge.whole:
            in_turn = InTurn(self._pieces, [self._plan.extent(name) for name in names if name not in self._plan.buffers])
        try:
            merged = [(name, workers.submit(self._merge_tensor, name, writer, in_turn)) for name in names]
            for name, done in merged:
                done.result()
                bar.update(self._bytes(name))
        except BaseException:
            workers.shutdown(cancel_futures=True)  # before the file is closed that they write
            raise
        finally:
            if in_turn is not None:
                in_turn.close()

    def _bytes(self, name: str) -> int:
        return self._plan.whose(name).shape(name).numel() * self._plan.written_dtype(name).itemsize

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
                rule = plan.rules[name]
                parts = (merge_pieces(rule, self._pieces.of(part)) for part in extent.in_parts(rule.parts))
                results = itertools.chain.from_iterable(parts)
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
