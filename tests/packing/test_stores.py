"""Stores: what a streamed model fetches, from memory and from a packed file, and the same learned merge with each."""

import threading

import pytest
import streaming
import torch

import samerge_ext as sm
from samerge_ext.budget.plan import written_of_buffers
from samerge_ext.checkpoints.reading import CheckpointError
from samerge_ext.packing.stores import StagedStore

LONG, A, B, C = ([start * 1024, length * 1024, False] for start, length in ((0, 8), (8, 1), (9, 2), (11, 1)))


@pytest.mark.parametrize(
    ("runs", "blocks"),
    [([LONG, A, B, C], 9), ([LONG, A, B], 16), ([LONG, A, B, A, LONG], 9), ([LONG, A, B, LONG], 16), ([LONG], 16)],
    ids=["even", "odd", "even, and around", "odd, and around", "one"],
)
def test_what_is_written_of_the_buffers_is_planned(runs, blocks):
    store = StagedStore(torch.zeros(12 * 1024), torch.zeros(1, 12 * 1024), torch.device("cpu"), 8 * 1024)
    for slot in store._slots:
        slot.base.fill_(torch.nan)
    for _ in range(4):
        store.begin_pass()
        for start, length, _ in runs:
            store.fetch(start, length)
    store._reader.shutdown()
    written = sum(int(slot.base.isfinite().sum()) for slot in store._slots)
    assert written <= written_of_buffers(runs, 8 * 1024) == blocks * 1024
    assert len(runs) == 1 or written == blocks * 1024


@pytest.mark.parametrize("piece", [1024, 3072, 1 << 20])
def test_pieces_arrive_whatever_the_order(packed_twice, piece):
    in_memory, in_file = packed_twice
    store = in_file.store(piece=piece)
    generator = torch.Generator().manual_seed(0)
    blocks, most = in_memory.layout.numel // 1024, min(piece, in_memory.layout.numel) // 1024
    for _ in range(3):  # the second pass is foreseen in part, the third not at all
        for _ in range(40):
            length = int(torch.randint(1, most + 1, (), generator=generator))
            start = int(torch.randint(0, blocks - length + 1, (), generator=generator))
            base, task_vectors = store.fetch(start * 1024, length * 1024)
            expected = slice(start * 1024, (start + length) * 1024)
            assert torch.equal(base, in_memory.base[expected])
            assert torch.equal(task_vectors, in_memory.task_vectors[:, expected])
        generator.manual_seed(0 if generator.initial_seed() else 1)
        store.begin_pass()


def test_a_pass_like_the_last_one_is_read_ahead(packed_twice, monkeypatch):
    in_file = packed_twice[1]
    store = in_file.store(piece=2048)
    pieces = [(start, 2048) for start in range(0, 16384, 2048)]
    pieces += pieces[::-1]
    asked = []
    load = StagedStore._load
    monkeypatch.setattr(StagedStore, "_load", lambda self, slot, wanted: (asked.append(wanted), load(self, slot, wanted)))
    ahead = []
    for _ in range(3):
        asked.clear()
        missing = 0
        for piece in pieces:
            missing += all(slot.holds != piece for slot in store._slots)
            store.fetch(*piece)
        ahead.append(missing)
        store.begin_pass()
    assert ahead[0] > 10 and ahead[1:] == [0, 0]


def test_reading_runs_beside_the_computation(packed_twice):
    in_file = packed_twice[1]
    threads = []
    read = type(in_file.base).read_into
    store = in_file.store(piece=1024)
    try:
        type(in_file.base).read_into = lambda self, *args: (threads.append(threading.current_thread().name), read(self, *args))[1]
        store.fetch(0, 1024)
    finally:
        type(in_file.base).read_into = read
    assert threads and all(name.startswith("samerge-reader") for name in threads)


@pytest.mark.parametrize("piece", [1024, None])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_learned_merge_from_a_file_takes_the_same_path(packed_twice, piece, dropout):
    in_memory, in_file = packed_twice
    results = []
    for weights, store in ((in_memory, None), (in_memory, in_memory.store()), (in_file, in_file.store(piece=piece))):
        module = streaming.make(1, dropout=dropout).train(dropout > 0)
        results.append(streaming.path_of_gradients(module, weights, store))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-10, atol=1e-12)


def test_a_file_that_is_cut_off_meanwhile_stops_the_merge(packed_twice):
    in_file = packed_twice[1]
    model = sm.MergedModel(streaming.make(1), in_file, streamed=True)
    tokens = streaming.make_batches()["red"][0]
    streaming.gradient(model, tokens)
    with open(in_file.base.file.path, "r+b") as file:
        file.truncate(5000)
    with pytest.raises(CheckpointError, match="was cut off while"):
        streaming.gradient(model, tokens)
