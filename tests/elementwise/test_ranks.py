"""Several processes that merge into one folder: the bytes of one, whatever their number, order and end; and ranks that do not
belong together."""

import shutil
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import attacks
import processes
import pytest
import torch
from merges import OTHERS, SHAPES, merge_of, write

from samerge_ext.checkpoints.reading import CheckpointError
from samerge_ext.checkpoints.shards import ShardWriter, plan_shards
from samerge_ext.elementwise import file_merge
from samerge_ext.elementwise.file_merge import merge_files
from samerge_ext.elementwise.piecewise import Combination
from samerge_ext.elementwise.ranks import NotWholeYet, Rank, owners_of
from samerge_ext.methods.slerp import Slerp
from samerge_ext.methods.ties import Ties


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write(tmp_path_factory.mktemp("models"))


def merge_named(models, method):
    """In several shards. Beside the rules of merges.py: a mean of models, and the base with one expert."""
    merge = merge_of(models, "arithmetic" if method in ("linear", "slerp") else method, shard_bytes=5000)
    if method == "linear":
        merge.base, merge.experts = None, [("base", models / "base"), *merge.experts]
        merge.rule_of = lambda *_: Combination([1.0, 2.0, 0.5], normalize=True)
    if method == "slerp":
        merge.base, merge.experts = None, [("base", models / "base"), merge.experts[0]]
        merge.rule_of = lambda name, shape, dtype: Slerp(shape, 0.3)
    return merge


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def by_ranks(merge, out, count, order=None):
    """One rank after the other, each of which but the last says that OUT is not whole yet."""
    for number in order or range(count):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", NotWholeYet)
            merge_files(merge, out, rank=Rank(number, count))
        assert out.exists() != any(issubclass(each.category, NotWholeYet) for each in said)


METHODS = ("linear", "arithmetic", "ties", "dare", "dare_ties", "slerp", "wudi", *OTHERS)


@pytest.mark.parametrize("method", METHODS)
def test_the_bytes_are_those_of_one_process(models, tmp_path, method):
    merge = merge_named(models, method)
    merge_files(merge, tmp_path / "one")
    assert len(list((tmp_path / "one").glob("model-*-of-*.safetensors"))) >= 3
    for count in (2, 3):
        by_ranks(merge, tmp_path / f"by {count}", count)
        assert content(tmp_path / f"by {count}") == content(tmp_path / "one")


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_whole_vector_and_norms(tmp_path, dtype, order):
    """What is left to trim at a shard is found by whoever comes to it first, and so are the lengths of task vectors. In bf16 many
    numbers are as large as the smallest that is kept."""
    models = write(tmp_path, {f"w{i}": (40, 40 + i) for i in range(8)}, dtype)
    merge = merge_of(models, whole=True, align=True, shard_bytes=4000 * dtype.itemsize)
    merge_files(merge, tmp_path / "one")
    by_ranks(merge, tmp_path / "out", 3, order)
    assert content(tmp_path / "out") == content(tmp_path / "one")


def test_ties_that_others_keep_are_counted(models, tmp_path, monkeypatch):
    """Or the test above could not fail: what stands in for counting them changes the bytes."""
    merge = merge_of(models, whole=True, shard_bytes=5000)
    merge_files(merge, tmp_path / "one")
    monkeypatch.setattr(Ties, "skip", lambda self, piece: None)
    by_ranks(merge, tmp_path / "out", 2, (1, 0))
    assert content(tmp_path / "out") != content(tmp_path / "one")


def test_a_rank_without_files_reads_nothing(models, tmp_path, monkeypatch):
    merge = merge_of(models, whole=True, align=True)

    def read(*_):
        raise AssertionError

    with monkeypatch.context() as patch, pytest.warns(NotWholeYet):
        patch.setattr(file_merge._Run, "_in_turn", read)
        merge_files(merge, tmp_path / "out", rank=Rank(1, 2))
    assert not (tmp_path / "out.state").exists()


def test_buffers_heads_and_more_ranks_than_files(tmp_path):
    models = write(tmp_path, {**SHAPES, "norm.running_mean": (8,), "head.w": (3, 4)}, torch.float32)
    merge = merge_of(models, heads=("head.*",))
    merge_files(merge, tmp_path / "one")
    with pytest.warns(NotWholeYet, match="rank 2 of 3 has .* no other is at work; .*of rank 0: model.safetensors"):
        merge_files(merge, tmp_path / "out", rank=Rank(2, 3))
    for number in (0, 1):
        merge_files(merge, tmp_path / "out", rank=Rank(number, 3))
    assert content(tmp_path / "out") == content(tmp_path / "one")


def rank_of_merge(models, out, rank):
    merge_files(merge_of(models, align=True, shard_bytes=200_000), out, rank=rank)


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_at_the_same_time(tmp_path, count):
    models = write(tmp_path, {f"w{i}": (300, 300) for i in range(12)})
    merge_files(merge_of(models, align=True, shard_bytes=200_000), tmp_path / "one")
    ranks = [processes.start(rank_of_merge, models, tmp_path / "out", Rank(number, count)) for number in range(count)]
    for process in ranks:
        process.join()
        assert process.exitcode == 0
    assert content(tmp_path / "out") == content(tmp_path / "one")


def twenty_rounds_of_kills():
    return [attacks.one_round(seed, attacks.DataFree, (attacks.killed_ranks,))[0] for seed in range(20)]


def test_kills_lose_nothing_whatever_the_number_of_ranks():
    """One or all of some ranks are killed at a random write, and another number of ranks goes on."""
    outcomes = processes.in_a_process(twenty_rounds_of_kills)
    assert sum(" 0 of" not in outcome for outcome in outcomes) > 10, outcomes


def test_a_damaged_file_of_another_rank_is_missing(models, tmp_path):
    merge = merge_of(models, shard_bytes=5000)
    merge_files(merge, tmp_path / "one")
    with pytest.warns(NotWholeYet):
        merge_files(merge, tmp_path / "out", rank=Rank(0, 2))
    damaged = next((tmp_path / "out.state/merged").glob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    with pytest.warns(NotWholeYet, match=f"rank 1 of 2 has .* of rank 0: {damaged.name}. Start those ranks"):
        merge_files(merge, tmp_path / "out", rank=Rank(1, 2))
    merge_files(merge, tmp_path / "out", rank=Rank(0, 2))
    assert content(tmp_path / "out") == content(tmp_path / "one")


def test_who_comes_late_finds_that_all_is_done(models, tmp_path):
    """Of a merge of one file rank 1 has nothing to write."""
    merge = merge_of(models)
    merge_files(merge, tmp_path / "out", rank=Rank(0, 2))
    assert [path.name for path in (tmp_path / "out.state").iterdir()] == ["merge.json"]
    before = content(tmp_path / "out")
    merge_files(merge, tmp_path / "out", rank=Rank(1, 2))
    assert content(tmp_path / "out") == before
    with pytest.raises(CheckpointError, match="out exists and is not empty"):
        merge_files(merge_of(models, "dare"), tmp_path / "out", rank=Rank(1, 2))
    by_one = merge_of(models, "dare")
    merge_files(by_one, tmp_path / "out", overwrite=True)
    assert content(tmp_path / "out") != before and not (tmp_path / "out.state").exists()


def test_that_all_is_done_is_not_said_of_another_folder(models, tmp_path):
    """Which may have the number that the removed one had."""
    merge = merge_of(models)
    merge_files(merge, tmp_path / "out", rank=Rank(0, 2))
    shutil.move(tmp_path / "out", tmp_path / "moved")
    (tmp_path / "moved/model.safetensors").rename(tmp_path / "moved/other.safetensors")
    (tmp_path / "moved").rename(tmp_path / "out")
    (tmp_path / "out/other.safetensors").touch()
    with pytest.raises(CheckpointError, match="out exists and is not empty"):
        merge_files(merge, tmp_path / "out", rank=Rank(1, 2))


def test_who_comes_while_the_last_one_ends_waits(models, tmp_path, monkeypatch):
    merge, amid, go_on = merge_of(models), threading.Event(), threading.Event()
    finish = file_merge._Run.finish

    def slow(self, *arguments):
        amid.set()
        assert go_on.wait(60)
        finish(self, *arguments)

    monkeypatch.setattr(file_merge._Run, "finish", slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(merge_files, merge, tmp_path / "out", rank=Rank(0, 2))
        assert amid.wait(60)
        late = pool.submit(merge_files, merge, tmp_path / "out", rank=Rank(1, 2))
        time.sleep(0.3)
        assert not late.done()
        go_on.set()
        first.result()
        late.result()


@pytest.mark.parametrize("running", [True, False])
def test_a_rank_of_another_merge_is_refused(models, tmp_path, monkeypatch, running):
    """While others are at work, before any shard is there; and after they have ended, and left shards."""
    merge = merge_of(models, shard_bytes=5000)
    other = merge_of(models, "dare", shard_bytes=5000)
    message = "out.state is of another merge, with other method: give all ranks the same recipe, models and kind of device"

    def refused(*_):
        with pytest.raises(CheckpointError, match=message):
            merge_files(other, tmp_path / "out", rank=Rank(1, 2))

    with monkeypatch.context() as patch, pytest.warns(NotWholeYet):
        if running:
            run = file_merge._Run.merge
            patch.setattr(file_merge._Run, "merge", lambda *arguments: (refused(), run(*arguments)))
        merge_files(merge, tmp_path / "out", rank=Rank(0, 2))
    refused()
    merge_files(merge, tmp_path / "out", rank=Rank(1, 2))
    merge_files(merge, tmp_path / "one")
    assert content(tmp_path / "out") == content(tmp_path / "one")


def test_another_merge_that_wrote_nothing_is_no_hindrance(models, tmp_path, monkeypatch):
    def killed(*_):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(file_merge.Record, "forget", lambda self: None)
        patch.setattr(file_merge._Run, "merge", killed)
        with pytest.raises(SystemExit):
            merge_files(merge_of(models, "dare"), tmp_path / "out", rank=Rank(0, 2))
    assert (tmp_path / "out.state/merge.json").exists()
    merge_files(merge_of(models), tmp_path / "out", rank=Rank(0, 2))
    merge_files(merge_of(models), tmp_path / "one")
    assert content(tmp_path / "out") == content(tmp_path / "one")


@pytest.mark.parametrize("ranks", [(Rank(0, 2), Rank()), (Rank(), Rank(0, 2))], ids=["ranks first", "one first"])
def test_ranks_and_a_merge_by_one_exclude_each_other(models, tmp_path, monkeypatch, ranks):
    first, second = ranks

    def again(*_):
        merge_files(merge_of(models), tmp_path / "out", rank=second)

    monkeypatch.setattr(file_merge._Run, "merge", again)
    with pytest.raises(CheckpointError, match="out.state is held by another merge"):
        merge_files(merge_of(models), tmp_path / "out", rank=first)


def test_two_processes_of_one_rank_are_refused(models, tmp_path, monkeypatch):
    run = file_merge._Run._merge_all

    def again(*arguments):
        monkeypatch.setattr(file_merge._Run, "_merge_all", run)
        with pytest.raises(CheckpointError, match=r"\.part is written by another process; give every process a rank of its own"):
            merge_files(merge_of(models), tmp_path / "out", rank=Rank(0, 2))
        run(*arguments)

    monkeypatch.setattr(file_merge._Run, "_merge_all", again)
    merge_files(merge_of(models), tmp_path / "out", rank=Rank(0, 2))
    merge_files(merge_of(models), tmp_path / "one")
    assert content(tmp_path / "out") == content(tmp_path / "one")


def test_a_shard_that_was_being_written_begins_anew(tmp_path):
    (shard,) = plan_shards([("w", torch.float32, torch.Size([3]))], 100)
    (tmp_path / "model.safetensors.part").write_bytes(b"x" * 1000)
    with ShardWriter(tmp_path, shard) as writer:
        writer.write("w", 0, torch.ones(3))
    assert (tmp_path / "model.safetensors").stat().st_size == shard.total_bytes


@pytest.mark.parametrize(("number", "count"), [(2, 2), (-1, 2), (0, 0), (5, 3)])
def test_a_rank_that_is_none_is_refused(number, count):
    with pytest.raises(ValueError, match=f"rank {number} of {count}: ranks are numbered from 0 on"):
        Rank(number, count)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_bytes_are_balanced(count):
    sizes = torch.randint(1, 500, (40,), generator=torch.Generator().manual_seed(count)).tolist()
    shards = plan_shards([(f"w{i}", torch.float32, torch.Size([size])) for i, size in enumerate(sizes)], 1)
    shares = [Rank(number, count).share(shards) for number in range(count)]
    assert sorted(shard.file for share in shares for shard in share) == sorted(owners_of(shards, count))
    held = [sum(shard.total_bytes for shard in share) for share in shares]
    assert max(held) - min(held) <= max(shard.total_bytes for shard in shards)
