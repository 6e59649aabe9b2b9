"""Merges from file to file: the packed methods' numbers, bounded memory, interruptions and inputs that go wrong."""

import errno
import json
import os
import shutil
import time

import processes
import pytest
import torch
from folders import assert_same, read_all
from helpers import assert_close
from merges import OTHERS, SHAPES, TASKS, merge_of, rules, write

import samerge_ext as sm
from samerge_ext.checkpoints.reading import CheckpointError
from samerge_ext.checkpoints.saving import save_checkpoint
from samerge_ext.elementwise import file_merge, file_pieces, file_plan, opening, piecewise
from samerge_ext.elementwise.file_merge import merge_files
from samerge_ext.elementwise.piecewise import Combination
from samerge_ext.memory import PeakMemory
from samerge_ext.methods.dare import random_mask


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


def test_a_taken_target_is_refused(models, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        merge_files(merge_of(models), tmp_path / "out")
    assert not (tmp_path / "out.state").exists()


@pytest.mark.parametrize("task", ["../../evil", "a/b", "a\0b", "x" * 300, "", "spam"])
def test_a_task_that_cannot_name_a_file_of_its_own_is_refused(models, tmp_path, task):
    merge = merge_of(models)
    merge.experts[0] = (task, models / "news")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="is not a task name|two experts are named 'spam'"):
        merge_files(merge, tmp_path / "deep/deeper/out")
    assert sorted(tmp_path.rglob("*")) == before


def assert_untouched(models, tmp_path, before):
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.state").exists()
    for path, content in before.items():
        assert path.read_bytes() == content


@pytest.mark.parametrize("method", ["arithmetic", "ties"])
@pytest.mark.parametrize("where", ["base", "spam"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_none_name_their_file(models, tmp_path, method, where, value):
    tensors = read_all(models / where)
    tensors["layers.1.w"][3, 4] = value
    save_checkpoint(models / where, tensors, overwrite=True, companions_from=models / where)
    with pytest.raises(ValueError, match=rf"{where}\): 'layers.1.w' holds (NaN|Inf)"):
        merge_files(merge_of(models, method), tmp_path / "out")
    assert_untouched(models, tmp_path, {})


def spoil(folder, name, value, place=0):
    tensors = read_all(folder)
    tensors[name].view(-1)[place] = value
    save_checkpoint(folder, tensors, overwrite=True, companions_from=folder)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    ("method", "density"),
    [("ties", 0.0), ("dare", 0.0), ("dare", 0.3), ("dare_ties", 0.3), ("della", 0.3), ("breadcrumbs", 0.3), ("breadcrumbs", 0.0)],
)
def test_a_dropped_number_that_is_none_names_its_file(models, tmp_path, method, density, value):
    """Of tensors of one piece and of several, of which the last is not full."""
    for name, place in (("layers.1.w", 7), ("embed", 131000)):
        start, within = divmod(place, piecewise.ALIGNMENT)
        if density and method.startswith("dare"):  # the first number of its piece, from there on, that is dropped
            kept = random_mask(3, 0, start, name, density)
            within += int((~kept[within:]).nonzero()[0])
        before = (models / "news/model.safetensors").read_bytes()
        spoil(models / "news", name, value, start * piecewise.ALIGNMENT + within)
        merge = merge_of(models)
        merge.rule_of = rules(method, density)
        with pytest.raises(ValueError, match=rf"expert 'news' \(.*news\): '{name}' holds (NaN|Inf)"):
            merge_files(merge, tmp_path / "out")
        assert_untouched(models, tmp_path, {})
        (models / "news/model.safetensors").write_bytes(before)


@pytest.mark.parametrize("whole", [False, True])
def test_a_mask_of_all_models_stays(models, tmp_path, monkeypatch, whole):
    """What is infinite in all of them, from the first of its pieces on, is written as it is, and what follows is merged."""
    monkeypatch.setitem(file_pieces.BUFFER_BYTES, "cpu", 1)
    merge = merge_of(models, "arithmetic", whole=whole)
    merge_files(merge, tmp_path / "finite")
    expected = read_all(tmp_path / "finite")
    expected["embed"] = torch.full_like(expected["embed"], -torch.inf).triu(1)
    for name in ("base", *TASKS):
        tensors = {**read_all(models / name), "embed": expected["embed"]}
        save_checkpoint(models / name, tensors, overwrite=True, companions_from=models / name)
    merge_files(merge, tmp_path / "out")
    assert_same(read_all(tmp_path / "out"), expected)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "torch knows no such device"),
        ("cuda:99", "torch finds [0-9]+ GPUs here; leave device out to run on the CPU"),
        ("meta", "torch cannot compute on it here"),
        ("mps", "files are merged on the CPU or on a CUDA GPU"),
    ],
)
def test_a_device_that_cannot_be_used_is_refused(models, tmp_path, monkeypatch, device, message):
    if device == "mps":  # as on a machine that has it
        monkeypatch.setattr(opening, "check_device", lambda _: None)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=f"device='{device}': {message}"):
        merge_files(merge_of(models, device=device), tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


STATISTICS = {"norm.running_mean": (50,), "norm.running_var": (50,)}


@pytest.mark.parametrize(
    ("name", "where", "keys"),
    [
        ("head.w", "spam", {"heads": ("head.*",)}),
        ("norm.running_var", "base", {}),
        ("norm.running_mean", "news", {}),
        ("visual.w", "base", {"keep": ("visual.*",)}),
        ("visual.running_var", "base", {"keep": ("visual.*",)}),
    ],
)
def test_nothing_is_copied_that_is_no_number(tmp_path, name, where, keys):
    """Heads, running statistics, and what is kept."""
    extra = {"head.w": (3, 50), "visual.w": (8, 8), "visual.running_var": (8,)}
    models = write(tmp_path, SHAPES | STATISTICS | extra)
    if "keep" in keys:
        for task in TASKS:
            tensors = read_all(models / task)
            tensors = {each: tensor for each, tensor in tensors.items() if not each.startswith("visual")}
            save_checkpoint(models / task, tensors, overwrite=True, companions_from=models / task)
    spoil(models / where, name, torch.nan)
    with pytest.raises(ValueError, match=rf"{where}\): '{name}' holds NaN"):
        merge_files(merge_of(models, **keys), tmp_path / "out")
    assert_untouched(models, tmp_path, {})


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64], ids=str)
@pytest.mark.parametrize("where", ["base", "spam"])
@pytest.mark.parametrize("base", [True, False])
def test_a_weight_in_one_model_that_is_none_in_another_is_refused(models, tmp_path, where, dtype, base):
    tensors = read_all(models / where)
    tensors["layers.1.w"] = tensors["layers.1.w"].to(dtype)
    save_checkpoint(models / where, tensors, overwrite=True, companions_from=models / where)
    merge = merge_of(models, "arithmetic")
    if not base:  # linear: all models are experts
        merge.base, merge.experts = None, [("base", models / "base"), *merge.experts]
        merge.rule_of = lambda *_: Combination([1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="'layers.1.w' is torch") as error:
        merge_files(merge, tmp_path / "out")
    assert all(str(each) in str(error.value) for each in (torch.bfloat16, dtype, models / where))
    assert len([place for place in ("base", *TASKS) if str(models / place) in str(error.value)]) == 2
    assert_untouched(models, tmp_path, {})


def test_a_full_disk(models, tmp_path, monkeypatch):
    before = {path: path.read_bytes() for path in models.rglob("*.safetensors")}

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(CheckpointError, match="no space to write .*out"):
        merge_files(merge_of(models), tmp_path / "out")
    assert_untouched(models, tmp_path, before)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: os.truncate(path, 5000), "cut off while"),
        (lambda path: path.unlink(), "vanished while"),
        (lambda path: os.utime(path, ns=(0, 0)), "changed while"),
    ],
)
def test_an_input_that_goes_wrong_meanwhile(models, tmp_path, monkeypatch, harm, message):
    path = models / "news/model.safetensors"
    monkeypatch.setattr(file_plan.FilePlan, "in_order", lambda self, shard: (path.exists() and harm(path), list(shard.begins))[1])
    with pytest.raises(CheckpointError, match=f"news/model.safetensors {message}|news/model.safetensors was {message}"):
        merge_files(merge_of(models), tmp_path / "out")
    assert_untouched(models, tmp_path, {})


def test_an_overflow_is_told(models, tmp_path):
    merge = merge_of(models, out_dtype=torch.float16)
    merge.rule_of = lambda name, shape, dtype: Combination([1e7, 0.0])
    with pytest.raises(ValueError, match="overflows torch.float16"):
        merge_files(merge, tmp_path / "out")
