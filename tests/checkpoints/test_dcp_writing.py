"""Model folders as checkpoints of torch.distributed.checkpoint: what torch loads again, and what a merge does."""

import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoints_of_torch import tensors
from folders import assert_same, read_all, save_bert
from merges import SHAPES, TASKS, merge_of, write
from typer.testing import CliRunner

import samerge_ext as sm
from samerge_ext.checkpoints.folder import Checkpoint, open_checkpoint
from samerge_ext.checkpoints.reading import CheckpointError
from samerge_ext.checkpoints.saving import save_checkpoint
from samerge_ext.cli.commands import app
from samerge_ext.elementwise.file_merge import merge_files
from samerge_ext.memory import PeakMemory


@pytest.mark.parametrize("key", ["model", None])
def test_what_is_written_is_what_torch_loads(tmp_path, key):
    model = {name: tensor.contiguous() for name, tensor in tensors().items()}
    save_checkpoint(tmp_path / "folder", model, extra_files={"config.json": "{}", "tokenizer.json": "{}"})
    sm.save_dcp(tmp_path / "folder", tmp_path / "out", key=key)
    files = {f"__0_{i}.distcp" for i in range(len(model))}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".metadata", "config.json", "tokenizer.json", *files}
    found = {name: torch.zeros_like(tensor) for name, tensor in model.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(found if key is None else {key: found}, checkpoint_id=tmp_path / "out", no_dist=True)
    assert_same(found, model)
    assert_same(read_all(tmp_path / "out"), model)


def test_there_and_back_by_the_command(tmp_path):
    save_bert(tmp_path / "bert")
    for model, out, options in (("bert", "dcp", []), ("dcp", "again", ["--key", ""])):
        run = CliRunner().invoke(app, ["to-dcp", str(tmp_path / model), str(tmp_path / out), *options])
        assert run.exit_code == 0, run.output
    assert_same(read_all(tmp_path / "again"), read_all(tmp_path / "bert"))
    assert (tmp_path / "again/config.json").read_bytes() == (tmp_path / "bert/config.json").read_bytes()
    run = CliRunner().invoke(app, ["to-dcp", str(tmp_path / "bert"), str(tmp_path / "dcp")])
    assert run.exit_code == 1 and "exists and is not empty" in run.output


def test_models_of_both_kinds_are_merged(tmp_path):
    """The base as a folder, experts as checkpoints, from file to file and in memory; then all as checkpoints."""
    models = write(tmp_path)
    merge = merge_of(models)
    merge_files(merge, tmp_path / "one")
    merge.experts = [(task, sm.save_dcp(models / task, tmp_path / f"{task}-dcp")) for task in TASKS]
    merge_files(merge, tmp_path / "out")
    assert_same(read_all(tmp_path / "out"), read_all(tmp_path / "one"))
    packed = sm.PackedWeights.from_folders(models / "base", dict(merge.experts), dtype=torch.float32)
    expected = sm.PackedWeights.from_folders(models / "base", {task: models / task for task in TASKS}, dtype=torch.float32)
    assert torch.equal(packed.task_vectors, expected.task_vectors)
    merge.names_from = merge.base = sm.save_dcp(models / "base", tmp_path / "base-dcp")
    merge_files(merge, tmp_path / "all")
    assert_same(read_all(tmp_path / "all"), read_all(tmp_path / "one"))
    assert (tmp_path / "all/config.json").exists() and not (tmp_path / "all/__0_0.distcp").exists()


def test_all_of_its_files_are_inputs(tmp_path):
    """Which are not to be written over, and must not change meanwhile."""
    models = write(tmp_path)
    expert = sm.save_dcp(models / "news", tmp_path / "dcp")
    with open_checkpoint(expert) as checkpoint:
        files = {expert / f"__0_{i}.distcp" for i in range(len(SHAPES))}
        assert set(checkpoint.files) == {expert / ".metadata", *files}


def test_memory_is_that_of_one_tensor(tmp_path):
    model = {f"w{i}": torch.zeros(1_000_000) for i in range(40)}
    save_checkpoint(tmp_path / "small", {"w": torch.zeros(10)})
    save_checkpoint(tmp_path / "folder", model)
    del model
    sm.save_dcp(tmp_path / "small", tmp_path / "warm")
    with PeakMemory() as peak:
        sm.save_dcp(tmp_path / "folder", tmp_path / "out")
    assert peak.rise < 40e6, f"{peak.rise / 1e6:.0f} MB"
    with PeakMemory() as peak, open_checkpoint(tmp_path / "out") as checkpoint:
        for name in checkpoint.names:
            checkpoint.read_into(name, 5, torch.empty(1000))
    assert peak.rise < 10e6, f"{peak.rise / 1e6:.0f} MB"


def test_an_input_that_is_cut_off_leaves_nothing(tmp_path, monkeypatch):
    """torch puts errors into one of its own, which is no error of ours."""
    write(tmp_path)

    def read(self, name):
        raise CheckpointError(f"'{name}' cut off")

    monkeypatch.setattr(Checkpoint, "read", read)
    with pytest.raises(CheckpointError, match="^'embed' cut off$"):
        sm.save_dcp(tmp_path / "news", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
