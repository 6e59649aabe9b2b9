"""What goes wrong in a merge from file to file is named, and leaves nothing behind."""

import errno
import os

import pytest
import torch
from folders import assert_same, read_all
from merges import SHAPES, TASKS, merge_of, rules, write

from samerge_ext.checkpoints.reading import CheckpointError
from samerge_ext.checkpoints.saving import save_checkpoint
from samerge_ext.elementwise import file_pieces, file_plan, opening, piecewise
from samerge_ext.elementwise.file_merge import merge_files
from samerge_ext.elementwise.piecewise import Combination
from samerge_ext.methods.dare import random_mask


@pytest.fixture
def models(tmp_path):
    return write(tmp_path)


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
