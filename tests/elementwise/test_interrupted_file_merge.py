"""Merges from file to file that are killed, stopped, damaged or called twice, and go on to the same bytes."""

import os
import shutil
import time

import processes
import pytest
from folders import assert_same, read_all
from merges import OTHERS, SHAPES, merge_of, write

from samerge_ext.checkpoints.reading import CheckpointError
from samerge_ext.elementwise import file_merge
from samerge_ext.elementwise.file_merge import merge_files


@pytest.fixture
def models(tmp_path):
    return write(tmp_path)


def merge_in_shards(models, out, whole, told=None):
    if told:
        told.send("started")
    merge_files(merge_of(models, whole=whole, align=True, shard_bytes=2_000_000), out)


@pytest.mark.parametrize("whole", [False, True])
def test_kills_lose_nothing(tmp_path, whole):
    """Killed at five moments from early to late, then run to its end: the bytes are those of a run in one piece."""
    models = write(tmp_path, {f"w{i}": (1_000_000,) for i in range(20)})
    begun = time.perf_counter()
    merge_in_shards(models, tmp_path / "one", whole)
    seconds = time.perf_counter() - begun
    finished = []
    for kill in range(5):
        heard, told = processes.context.Pipe(duplex=False)
        process = processes.start(merge_in_shards, models, tmp_path / "out", whole, told)
        heard.recv()
        time.sleep(seconds * (0.2 + 0.15 * kill))
        process.kill()
        process.join()
        if (tmp_path / "out").exists():
            break
        finished.append(len(list((tmp_path / "out.state").glob("notes/*.safetensors.json"))))
    assert finished == sorted(finished), f"finished shards are kept: {finished}"
    record = tmp_path / "out.state/merge.json"
    if not (tmp_path / "out").exists() or record.exists():  # the last kill may have left an empty state
        processes.in_a_process(merge_in_shards, models, tmp_path / "out", whole)
    assert not record.exists()
    for path in (tmp_path / "one").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


class Killed(BaseException):
    pass


def raise_killed(*_):
    raise Killed


def test_only_what_is_left_is_merged(models, tmp_path, monkeypatch):
    calls = []
    tensor = file_merge._Run._merge_tensor
    monkeypatch.setattr(file_merge._Run, "_merge_tensor", lambda self, *a: (calls.append(a[0]), tensor(self, *a)))
    with monkeypatch.context() as patch:
        patch.setattr(file_merge._Run, "finish", raise_killed)
        with pytest.raises(Killed):
            merge_files(merge_of(models, shard_bytes=5000), tmp_path / "out")
    assert sorted(calls) == sorted(SHAPES) and not (tmp_path / "out").exists()
    merge_files(merge_of(models, shard_bytes=5000), tmp_path / "out")
    assert sorted(calls) == sorted(SHAPES), "finished shards are used"
    assert set(read_all(tmp_path / "out")) == set(SHAPES)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-len(content) // 3] ^= 4
    path.write_bytes(content)


@pytest.fixture
def stopped(models, tmp_path, monkeypatch):
    """Merges to out, up to what makes weights a model; returns the finished shards."""

    def stopped(whole):
        with monkeypatch.context() as patch:
            patch.setattr(file_merge._Run, "finish", raise_killed)
            with pytest.raises(Killed):
                merge_files(merge_of(models, whole=whole, shard_bytes=5000), tmp_path / "out")
        return sorted((tmp_path / "out.state/merged").iterdir())

    return stopped


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    "harm",
    [
        lambda shards: shards[1].unlink(),
        lambda shards: os.truncate(shards[1], 5000),
        lambda shards: os.truncate(shards[0], shards[0].stat().st_size + 1),
        lambda shards: flip(shards[1]),
        lambda shards: shards[0].write_bytes(shards[1].read_bytes()),
        lambda shards: shutil.rmtree(shards[0].parent),
    ],
    ids=["removed", "cut", "longer", "changed", "another", "all removed"],
)
def test_finished_shards_are_written_again_where_they_are_not_what_was_written(models, tmp_path, stopped, harm, whole):
    merge_files(merge_of(models, whole=whole, shard_bytes=5000), tmp_path / "alone")
    harm(stopped(whole))
    merge_files(merge_of(models, whole=whole, shard_bytes=5000), tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "alone").iterdir()
    }


@pytest.mark.parametrize("method", OTHERS)
def test_an_interrupted_merge_ends_with_the_same_bytes(models, tmp_path, monkeypatch, method):
    merge_files(merge_of(models, method, shard_bytes=5000), tmp_path / "alone")
    with monkeypatch.context() as patch:
        patch.setattr(file_merge._Run, "finish", raise_killed)
        with pytest.raises(Killed):
            merge_files(merge_of(models, method, shard_bytes=5000), tmp_path / "out")
    flip(sorted((tmp_path / "out.state/merged").iterdir())[1])
    merge_files(merge_of(models, method, shard_bytes=5000), tmp_path / "out")
    for path in (tmp_path / "alone").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("harm", [lambda path: os.truncate(path, 0), lambda path: os.truncate(path, 300), flip])
def test_a_damaged_record_is_an_error_with_the_mend(models, tmp_path, stopped, harm):
    stopped(False)
    harm(tmp_path / "out.state/merge.json")
    with pytest.raises(CheckpointError, match="out.state/merge.json is empty, cut off or damaged: .* delete it to begin again"):
        merge_files(merge_of(models), tmp_path / "out")
    (tmp_path / "out.state/merge.json").unlink()
    merge_files(merge_of(models), tmp_path / "out")
    assert set(read_all(tmp_path / "out")) == set(SHAPES) and not (tmp_path / "out.state").exists()


def test_a_finished_folder_that_was_removed_is_merged_again(models, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(file_merge, "sync", lambda path: raise_killed() if path == tmp_path else None)
        with pytest.raises(Killed):
            merge_files(merge_of(models), tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    merge_files(merge_of(models), tmp_path / "out")
    assert set(read_all(tmp_path / "out")) == set(SHAPES)


def test_an_end_after_the_folder_has_its_name(models, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(file_merge, "sync", lambda path: raise_killed() if path == tmp_path else None)
        with pytest.raises(Killed):
            merge_files(merge_of(models), tmp_path / "out")
    assert (tmp_path / "out").exists() and (tmp_path / "out.state").exists()
    merge_files(merge_of(models), tmp_path / "out")
    assert not (tmp_path / "out.state").exists()


def test_another_merges_progress_is_not_used(models, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(file_merge._Run, "finish", raise_killed)
        with pytest.raises(Killed):
            merge_files(merge_of(models, "dare"), tmp_path / "out")
    merge_files(merge_of(models), tmp_path / "out")
    merge_files(merge_of(models), tmp_path / "alone")
    assert_same(read_all(tmp_path / "out"), read_all(tmp_path / "alone"))


def test_one_merge_at_a_time(models, tmp_path, monkeypatch):
    def again(*_):
        merge_files(merge_of(models), tmp_path / "out")

    monkeypatch.setattr(file_merge._Run, "merge", again)
    with pytest.raises(CheckpointError, match="out.state is held by another merge"):
        merge_files(merge_of(models), tmp_path / "out")
