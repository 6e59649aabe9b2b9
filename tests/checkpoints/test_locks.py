"""Locks that end with their process, and what is cleared away after processes that ended."""

import time
from concurrent.futures import ThreadPoolExecutor

import processes
import pytest

from samerge_ext.checkpoints.locks import held, partial_of, remove
from samerge_ext.checkpoints.reading import CheckpointError


def test_a_folder_is_held_by_one_at_a_time_and_gone_afterwards(tmp_path):
    state = tmp_path / "new/out.state"
    with held(state):
        with pytest.raises(CheckpointError, match="out.state is held by another merge; wait for its end"):
            with held(state):
                raise AssertionError
        assert [path.name for path in state.iterdir()] == ["lock"]
    assert not list(tmp_path.iterdir()), "parents that were made are gone too"
    with held(state):
        (state / "kept").write_text("")
    assert [path.name for path in state.iterdir()] == ["kept"]


def test_never_two_at_once_where_many_come_and_go(tmp_path):
    inside, most, entered = [], [], []

    def come_and_go():
        for _ in range(100):
            try:
                with held(tmp_path / "out.state"):
                    inside.append(1)
                    most.append(len(inside))
                    time.sleep(1e-4)
                    inside.pop()
            except CheckpointError:
                continue
            entered.append(1)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(come_and_go) for _ in range(4)]:
            done.result()
    assert max(most) == 1 and len(entered) > 4 and not list(tmp_path.iterdir())


def test_a_file_in_the_place_of_the_folder_is_told(tmp_path):
    (tmp_path / "out.state").write_text("")
    with pytest.raises(CheckpointError, match="out.state is no folder"), held(tmp_path / "out.state"):
        raise AssertionError


def hold_forever(folder, told):
    with held(folder / "out.state"), partial_of(folder / "packed"), partial_of(folder / "out", folder=True) as partial:
        (partial / "config.json").write_text("{}")
        told.send("held")
        time.sleep(60)


def test_what_a_killed_process_held_blocks_nobody(tmp_path):
    heard, told = processes.context.Pipe(duplex=False)
    process = processes.start(hold_forever, tmp_path, told)
    heard.recv()
    with pytest.raises(CheckpointError, match="is held by another merge"), held(tmp_path / "out.state"):
        raise AssertionError
    living = sorted(path.name for path in tmp_path.iterdir())
    with partial_of(tmp_path / "packed"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == living, "what is being written stays"
    process.kill()
    process.join()
    with held(tmp_path / "out.state"), partial_of(tmp_path / "packed"), partial_of(tmp_path / "out", folder=True):
        pass
    assert not list(tmp_path.iterdir())


def test_only_partial_names_of_the_same_path_are_cleared_away(tmp_path):
    others = (".state.pt.tmp", ".state.pt.012345.tmp", ".state.pt.01234567.tmp2", ".other.01234567.tmp", "state.pt.01234567.tmp")
    for name in (*others, "state.pt", ".state.pt.01234567.tmp"):
        (tmp_path / name).write_text("")
    remove(tmp_path / "state.pt")
    assert {path.name for path in tmp_path.iterdir()} == set(others)


def test_two_partial_files_of_one_path(tmp_path):
    with partial_of(tmp_path / "file") as one, partial_of(tmp_path / "file") as other:
        one.write_text("one")
        other.write_text("other")
        assert one.read_text() == "one"
        one.rename(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
