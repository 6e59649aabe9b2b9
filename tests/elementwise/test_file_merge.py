"""Merges from file to file: the packed methods' numbers, bounded memory, interruptions and inputs that go wrong."""

import json

import pytest
import torch
from folders import assert_same, read_all
from helpers import assert_close
from merges import OTHERS, SHAPES, TASKS, merge_of, rules, write

import samerge_ext as sm
from samerge_ext.checkpoints.saving import save_checkpoint
from samerge_ext.elementwise import file_pieces, piecewise
from samerge_ext.elementwise.file_merge import merge_files
from samerge_ext.memory import PeakMemory


def packed_result(packed, method, whole=False, align=False):
    packed = sm.align_norms(packed) if align else packed
    if method == "arithmetic":
        merged = sm.task_arithmetic(packed, [0.7, 0.4]).merged
    else:
        make = rules(method)
        merged = piecewise.merge_packed(packed, lambda name, shape: make(name, shape, packed.base.dtype), whole=whole)
    return packed.state_dict(merged)


@pytest.fixture
def models(tmp_path):
    return write(tmp_path)


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("method", ["arithmetic", "ties", "dare", "dare_ties", *OTHERS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_files_give_what_packed_weights_give(tmp_path, method, dtype, align):
    models = write(tmp_path, dtype=dtype)
    packed = sm.PackedWeights.from_folders(models / "base", {t: models / t for t in TASKS}, dtype=dtype)
    merge_files(merge_of(models, method, align=align), tmp_path / "out")
    assert_same(read_all(tmp_path / "out"), packed_result(packed, method, align=align))


@pytest.mark.parametrize("shard_bytes", [10**9, 5000])
def test_the_whole_vector(models, tmp_path, shard_bytes):
    packed = sm.PackedWeights.from_folders(models / "base", {t: models / t for t in TASKS}, dtype=torch.bfloat16)
    merge_files(merge_of(models, whole=True, shard_bytes=shard_bytes), tmp_path / "out")
    assert_same(read_all(tmp_path / "out"), packed_result(packed, "ties", whole=True))


@pytest.mark.parametrize("method", ["arithmetic", "ties", "dare", *OTHERS])
def test_neither_pieces_nor_shards_matter(models, tmp_path, monkeypatch, method):
    merge_files(merge_of(models, method), tmp_path / "one")
    monkeypatch.setitem(file_pieces.BUFFER_BYTES, "cpu", 1)
    merge_files(merge_of(models, method, shard_bytes=5000), tmp_path / "many")
    assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) >= 3
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(SHAPES)
    assert_same(read_all(tmp_path / "many"), read_all(tmp_path / "one"))


def test_a_folder_is_a_model(models, tmp_path):
    merge_files(merge_of(models, out_dtype=torch.float16), tmp_path / "out")
    assert {t.dtype for t in read_all(tmp_path / "out").values()} == {torch.float16}
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"model_type": "x", "dtype": "float16"}
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "tokenizer.json", "README.md", "model.safetensors"}
    assert not (tmp_path / "out.state").exists()


def test_stored_types_may_differ(models, tmp_path):
    """What tensors are merged in is what their types promote to, or dtype."""
    (tmp_path / "mixed").mkdir()
    wide = {name: tensor.float() for name, tensor in read_all(models / "news").items()}
    save_checkpoint(tmp_path / "wide", wide)
    merge = merge_of(models)
    merge.experts[0] = ("news", tmp_path / "wide")
    merge_files(merge, tmp_path / "out")
    assert {t.dtype for t in read_all(tmp_path / "out").values()} == {torch.float32}
    merge_files(merge_of(models, dtype=torch.float32), tmp_path / "named")
    assert_same(read_all(tmp_path / "out"), read_all(tmp_path / "named"))


def test_buffers_and_heads(tmp_path):
    shapes = {**SHAPES, "norm.running_mean": (8,), "head.w": (3, 4)}
    models = write(tmp_path, shapes, torch.float32)
    merge_files(merge_of(models, heads=("head.*",)), tmp_path / "out")
    found, experts = read_all(tmp_path / "out"), [read_all(models / task) for task in TASKS]
    assert "head.w" not in found
    base, shares = read_all(models / "base"), [0.9 * 0.7 / 1.1, 0.9 * 0.4 / 1.1]  # as much of every expert as of its weights
    mean = 0.1 * base["norm.running_mean"].double()
    mean += sum(share * expert["norm.running_mean"].double() for share, expert in zip(shares, experts))
    assert_close(found["norm.running_mean"], mean)
    for task, expert in zip(TASKS, experts):
        assert_same(read_all(tmp_path / f"out/heads/{task}.safetensors"), {"head.w": expert["head.w"]})


def test_memory_does_not_grow_with_the_model(tmp_path, monkeypatch, threads):
    """300 MB are merged within 40 MB, or 60 MB by methods that compute more at a time: three threads with pieces of 4 MB and what
    is made of them."""
    monkeypatch.setitem(file_pieces.BUFFER_BYTES, "cpu", 4 << 20)
    models = write(tmp_path, {f"w{i}": (5000, 1000) for i in range(10)})
    small = write(tmp_path / "small")
    threads(2)
    for method, limit in (("arithmetic", 40e6), ("ties", 40e6), ("dare", 40e6), ("della", 60e6), ("sce", 60e6)):
        merge_files(merge_of(small, method), tmp_path / "warm", overwrite=(tmp_path / "warm").exists())
        with PeakMemory() as peak:
            merge_files(merge_of(models, method), tmp_path / f"out-{method}")
        assert peak.rise < limit, f"{method}: {peak.rise / 1e6:.0f} MB"
