"""`samerge merge` as several processes: by options, and as torchrun starts them."""

import os
import subprocess
import sys

import classifiers
import pytest
import yaml
from typer.testing import CliRunner

from samerge_ext.cli.commands import app


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return classifiers.write(tmp_path_factory.mktemp("models"))


@pytest.fixture
def recipe(models, tmp_path):
    experts = [{"model": str(models / task)} for task in ("mood", "topic")]
    keys = {"merge_method": "ties", "base_model": str(models / "base"), "models": experts, "heads": ["classifier.*"]}
    path = tmp_path / "ties.yaml"
    path.write_text(yaml.safe_dump({**keys, "parameters": {"weight": 0.5, "density": 0.4, "trim": "vector"}}))
    return path


def content(folder):
    """The files of a folder without the report's, which say how long a run took and what memory."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.stem != "report"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def merge(recipe, out, *options):
    return CliRunner().invoke(app, ["merge", str(recipe), str(out), "--shard-size", "20KB", *options])


def test_ranks_make_what_one_process_makes(recipe, tmp_path):
    assert merge(recipe, tmp_path / "one").exit_code == 0
    assert len(list((tmp_path / "one").glob("model-*.safetensors"))) > 2
    run = merge(recipe, tmp_path / "out", "--rank", "0", "--ranks", "2")
    assert run.exit_code == 0, run.output
    assert "ties: rank 0 of 2 is through after" in run.output
    assert "note: rank 0 of 2 has written its part and no other is at work; " in run.output
    assert "of rank 1: model-" in run.output and not (tmp_path / "out").exists()
    run = merge(recipe, tmp_path / "out", "--rank", "1", "--ranks", "2")
    assert run.exit_code == 0 and "note:" not in run.output, run.output
    assert content(tmp_path / "out") == content(tmp_path / "one")


def test_torchrun(recipe, tmp_path):
    assert merge(recipe, tmp_path / "one").exit_code == 0
    started = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "samerge_ext", "merge"]
    run = subprocess.run(
        [sys.executable, "-m", *started, str(recipe), str(tmp_path / "out"), "--shard-size", "20KB"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "rank 0 of 2 is through" in run.stdout and "rank 1 of 2 is through" in run.stdout
    assert content(tmp_path / "out") == content(tmp_path / "one")


def test_variables_that_torchrun_did_not_set_are_none_of_ours(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "8")
    run = merge(recipe, tmp_path / "out")
    assert run.exit_code == 0 and (tmp_path / "out/config.json").exists(), run.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", "1"], "--rank and --ranks go together"),
        (["--ranks", "2"], "--rank and --ranks go together"),
        (["--rank", "2", "--ranks", "2"], "rank 2 of 2: ranks are numbered from 0 on"),
        (["--shard-size", "big"], "shard_size 'big': give a number of bytes"),
        (["--timeout", "60"], "timeout is for methods that learn, and of ties no rank waits; leave it out"),
    ],
)
def test_options_that_make_no_sense_are_refused(recipe, tmp_path, options, message):
    before = sorted(tmp_path.iterdir())
    run = merge(recipe, tmp_path / "out", *options)
    assert run.exit_code == 1 and message in run.output, run.output
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", "0", "--ranks", "2"], "rank is for methods that go from file to file, and samerging learns; leave it out"),
        (["--shard-size", "1GB"], "shard_size is for methods that go from file to file, and samerging learns"),
        (["--timeout", "60"], "timeout=60: one process waits for no other; leave it out, or start several by torchrun"),
        (["--timeout", "0"], "timeout=0.0; expected a number of seconds > 0"),
    ],
)
def test_learned_merges_refuse_them(models, recipe, tmp_path, options, message):
    keys = yaml.safe_load(recipe.read_text())
    calibration = {"files": {"mood": str(models / "mood.txt"), "topic": str(models / "topic.jsonl")}}
    keys |= {"merge_method": "samerging", "parameters": {"steps": 1}, "calibration": calibration}
    recipe.write_text(yaml.safe_dump(keys))
    run = CliRunner().invoke(app, ["merge", str(recipe), str(tmp_path / "out"), *options])
    assert run.exit_code == 1 and message in run.output, run.output
