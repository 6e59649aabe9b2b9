"""The commands that merge nothing: `samerge info` and `samerge stats`."""

import csv
import json

import classifiers
import pytest
import torch
from classifiers import weights
from typer.testing import CliRunner

import samerge_ext as sm
from samerge_ext.cli.commands import app


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return classifiers.write(tmp_path_factory.mktemp("models"))


def test_info_lists_backends():
    run = CliRunner().invoke(app, ["info"])
    assert run.exit_code == 0
    for word in (sm.__version__, torch.__version__, "backend reference", "backend cuda", "threads"):
        assert word in run.output
    said = json.loads(CliRunner().invoke(app, ["info", "--json"]).output)
    assert said["threads"] == torch.get_num_threads() and isinstance(said["CUDA devices"], list)


def stats(models, *options):
    arguments = ["stats", str(models / "base"), str(models / "mood"), f"news={models / 'topic'}", "--head", "classifier.*"]
    return CliRunner().invoke(app, [*arguments, *options])


def test_stats_are_printed(models):
    run = stats(models)
    assert run.exit_code == 0, run.output
    lines = run.output.splitlines()
    assert lines[0].split() == ["task", "layer", "mean", "variance", "norm", "sigma_1", "sigma_2", "sigma_3"]
    word, norm = "bert.pooler.dense.weight", weights(models / "topic")["pooler.dense.weight"].norm()
    (row,) = [line.split() for line in lines if line.split()[:2] == ["news", word]]
    assert float(row[4]) == pytest.approx(norm.item(), rel=1e-5)
    (record,) = [row for row in json.loads(stats(models, "--json").output) if (row["task"], row["layer"]) == ("news", word)]
    assert record["norm"] == pytest.approx(norm.item(), rel=1e-6) and len(record) == 8


def test_stats_are_written_by_suffix(models, tmp_path):
    run = stats(models, "--of", "task_vectors", "--singular-values", "2", "--out", str(tmp_path / "stats.csv"))
    assert run.exit_code == 0, run.output
    with open(tmp_path / "stats.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["task"] for row in rows} == {"mood", "news"}
    base, mood = (weights(models / name)["pooler.dense.weight"] for name in ("base", "mood"))
    (row,) = [row for row in rows if row["task"] == "mood" and row["layer"] == "bert.pooler.dense.weight"]
    assert float(row["mean"]) == pytest.approx((mood - base).mean().item(), rel=1e-4)
    assert list(row) == ["task", "layer", "mean", "variance", "norm", "sigma_1", "sigma_2"]

    run = stats(models, "--out", str(tmp_path / "stats.json"), "--plot", str(tmp_path / "spectra.png"))
    assert run.exit_code == 0, run.output
    content = json.loads((tmp_path / "stats.json").read_text())
    assert content["of"] == "experts" and len(content["statistics"]) == len(rows)
    assert (tmp_path / "spectra.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_stats_that_cannot_be_made_are_refused(models, tmp_path):
    run = stats(models, "--out", str(tmp_path / "stats.txt"))
    assert run.exit_code == 1 and "written as .csv or .json" in run.output
    run = stats(models, "--of", "heads")
    assert run.exit_code == 1 and "heads" in run.output
    run = CliRunner().invoke(app, ["stats", str(models / "base"), str(tmp_path / "nowhere")])
    assert run.exit_code == 1 and "nowhere" in run.output
