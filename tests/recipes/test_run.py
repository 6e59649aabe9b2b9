"""Learned merges from recipes: one at a time, what they keep in OUT.state, and equal files of equal runs."""

import json
import os

import classifiers
import pytest
import torch
from classifiers import LABELS
from safetensors.torch import load_file
from typer.testing import CliRunner

import samerge_ext as sm
from samerge_ext.budget.plan import HEAD_VECTORS
from samerge_ext.checkpoints.reading import CheckpointError
from samerge_ext.cli.commands import app
from samerge_ext.learning.run_state import STATE_FILE
from samerge_ext.recipes.recipe import Recipe
from samerge_ext.recipes.run import plan_recipe, run_recipe
from samerge_ext.statistics.features import FEATURES_FILE


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return classifiers.write(tmp_path_factory.mktemp("models"))


def recipe(models, method="samerging", **parameters):
    files = {"mood": models / "mood.txt", "topic": models / "topic.jsonl"}
    return Recipe(
        merge_method=method,
        base_model=models / "base",
        models=[{"model": models / task} for task in LABELS],
        heads=["classifier.*"],
        calibration={"files": files, "batch_size": 2},
        parameters={"steps": 4, "learning_rate": 0.01, "progress": False, **parameters},
    )


class Stopped(Exception):
    pass


def stop(*_, **__):
    raise Stopped


def stopped(monkeypatch, recipe, out):
    """Runs up to the moment before OUT is written."""
    with monkeypatch.context() as patch:
        patch.setattr(sm.Result, "save_pretrained", stop)
        with pytest.raises(Stopped):
            run_recipe(recipe, out)


def content(folder):
    """The files of a folder without the report's, which say how long a run took and what memory."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.stem != "report"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("method", ["samerging", "statsmerging"])
def test_equal_runs_write_equal_files(models, tmp_path, monkeypatch, method):
    """Also into another folder, with other checkpoints, and after an interruption."""
    run_recipe(recipe(models, method), tmp_path / "one")
    stopped(monkeypatch, recipe(models, method, checkpoint_every=3), tmp_path / "two")
    run_recipe(recipe(models, method, checkpoint_every=3), tmp_path / "two")
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert not (tmp_path / "two.state").exists()


def test_one_merge_at_a_time(models, tmp_path, monkeypatch):
    """Whoever comes second is told at once, leaves nothing, and harms nothing."""
    save = sm.Result.save_pretrained

    def again(self, *arguments, **keywords):
        before = content(tmp_path)
        for method in ("samerging", "statsmerging"):
            with pytest.raises(CheckpointError, match="out.state is held by another merge; wait for its end"):
                run_recipe(recipe(models, method), tmp_path / "out")
        data_free = Recipe(
            merge_method="task_arithmetic", base_model=models / "base",
            models=[{"model": models / task} for task in LABELS], heads=["classifier.*"],
        )  # fmt: skip
        with pytest.raises(CheckpointError, match="out.state is held by another merge"):
            run_recipe(data_free, tmp_path / "out")
        assert content(tmp_path) == before
        return save(self, *arguments, **keywords)

    monkeypatch.setattr(sm.Result, "save_pretrained", again)
    run_recipe(recipe(models), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    spoilt = bytearray(path.read_bytes())
    spoilt[-len(spoilt) // 3] ^= 4
    path.write_bytes(spoilt)


def test_a_damaged_state_is_told_with_the_mend(models, tmp_path, monkeypatch):
    stopped(monkeypatch, recipe(models), tmp_path / "out")
    state = tmp_path / "out.state" / STATE_FILE
    whole = state.read_bytes()
    for harm in (cut, flip):
        state.write_bytes(whole)
        harm(state)
        with pytest.raises(CheckpointError, match="state.pt is empty, cut off or damaged.*; restore it, or delete it to begin"):
            run_recipe(recipe(models), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_features_are_told_with_the_mend(models, tmp_path, monkeypatch):
    asked = recipe(models, "statsmerging")
    stopped(monkeypatch, asked, tmp_path / "out")
    path = tmp_path / "out.state" / FEATURES_FILE
    whole = path.read_bytes()
    for damaged in (b"", whole[:-4], whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="features.safetensors holds no features .*; delete it, and they are computed again"):
            run_recipe(asked, tmp_path / "out")
    path.unlink()
    run_recipe(asked, tmp_path / "out")


def test_an_empty_state_is_one_message_of_the_command(models, tmp_path, monkeypatch):
    asked = recipe(models)
    stopped(monkeypatch, asked, tmp_path / "out")
    os.truncate(tmp_path / "out.state" / STATE_FILE, 0)
    (tmp_path / "recipe.yaml").write_text(asked.model_dump_json(exclude_defaults=True))
    run = CliRunner().invoke(app, ["merge", str(tmp_path / "recipe.yaml"), str(tmp_path / "out")])
    assert run.exit_code == 1 and "state.pt is empty, cut off or damaged" in run.output and "Aborted" not in run.output


def test_what_killed_runs_left_half_written_goes_with_the_state(models, tmp_path, monkeypatch):
    stopped(monkeypatch, recipe(models), tmp_path / "out")
    for name in ("state.pt", "plan.json", "packed.safetensors", "features.safetensors"):
        (tmp_path / f"out.state/.{name}.01234567.tmp").write_text("half")
    run_recipe(recipe(models), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_refused_run_leaves_nothing(models, tmp_path):
    (models / "empty.txt").write_text("\n")
    asked = recipe(models)
    asked.calibration.files["mood"] = models / "empty.txt"
    with pytest.raises(ValueError, match="empty.txt holds no texts"):
        run_recipe(asked, tmp_path / "new/folder/out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["samerging", "statsmerging"])
def test_heads_are_trained_and_written_through_the_command(models, tmp_path, method):
    asked = recipe(models, method)
    (tmp_path / "recipe.yaml").write_text(asked.model_dump_json(exclude_defaults=True))
    options = ["--parameter", "train_heads=classifier.*", "--parameter", "head_learning_rate=0.01", "--parameter", "held_back=0"]
    run = CliRunner().invoke(app, ["merge", str(tmp_path / "recipe.yaml"), str(tmp_path / "out"), *options])
    assert run.exit_code == 0, run.output
    for task in LABELS:
        trained, expert = load_file(tmp_path / f"out/heads/{task}.safetensors"), load_file(models / task / "model.safetensors")
        assert trained.keys() == {"classifier.weight", "classifier.bias"}
        for name, tensor in trained.items():
            assert 1e-3 < (tensor - expert[name]).abs().max() < 0.1, "some steps of 0.01"
    summary = json.loads((tmp_path / "out/coefficients.json").read_text())
    assert summary["config"]["train_heads"] == "classifier.*"


def test_a_plan_of_a_recipe_counts_its_heads(models, monkeypatch):
    """From the folders' headers."""
    monkeypatch.setattr("samerge_ext.budget.plan.resident_bytes", lambda: 0)
    ways = [plan_recipe(recipe(models, **settings)).ways for settings in ({}, {"train_heads": "classifier.*"})]
    numbers = sum((16 + 1) * labels for labels in LABELS.values())
    for without, trained in zip(*ways, strict=True):
        assert trained.device_bytes >= without.device_bytes + HEAD_VECTORS * 4 * numbers


def test_an_interrupted_merge_continues_with_its_heads(models, tmp_path, monkeypatch):
    """And with what was best so far, after the second of four steps."""
    asked = recipe(models, "statsmerging", train_heads=["classifier.*"], head_learning_rate=0.01, measure_every=2)
    result = run_recipe(asked, tmp_path / "one")
    assert not torch.equal(result.heads["mood"]["classifier.weight"], result.packed.heads["mood"]["classifier.weight"])
    stopped(monkeypatch, asked, tmp_path / "two")
    run_recipe(asked, tmp_path / "two")
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_heads_that_cannot_be_trained_are_refused_before_weights_are_read(models, tmp_path, monkeypatch):
    monkeypatch.setattr(sm.PackedWeights, "from_folders", stop)
    with pytest.raises(ValueError, match="train_heads needs 'heads'"):
        Recipe.model_validate({**recipe(models).model_dump(), "heads": [], "parameters": {"train_heads": "*"}})
    with pytest.raises(ValueError, match="parameters of adamerging: .*adamerging has no teachers"):
        recipe(models, "adamerging", train_heads="classifier.*")
    asked = recipe(models, train_heads="classifier.*")
    asked.calibration.batch_size = 64
    with pytest.raises(ValueError, match="held_back=0.25 leaves no batch of task 'mood' to learn from, it has 1"):
        run_recipe(asked, tmp_path / "out")
