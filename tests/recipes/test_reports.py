"""What merges leave to read: reports, their code, `samerge check`, `report` and `compare`."""

import contextlib
import fcntl
import json
import os
import struct
import subprocess
import sys
import termios

import classifiers
import pytest
import torch
import yaml
from classifiers import LABELS
from helpers import ROOT
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from samerge_ext.cli.commands import app
from samerge_ext.recipes.from_report import add_loss_slice
from samerge_ext.reports.report import read_report


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return classifiers.write(tmp_path_factory.mktemp("models"))


def samerge(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def recipe(models, path, **keys):
    content = {
        "merge_method": "task_arithmetic",
        "base_model": str(models / "base"),
        "models": [str(models / task) for task in LABELS],
        "heads": ["classifier.*"],
        "parameters": {"weight": 0.4},
        **keys,
    }
    path.write_text(yaml.safe_dump(content))
    return path


def learned(models, path, **parameters):
    files = {"mood": str(models / "mood.txt"), "topic": str(models / "topic.jsonl")}
    parameters = {"steps": 3, "learning_rate": 0.01, "progress": False, **parameters}
    keys = {"calibration": {"files": files, "batch_size": 3}, "parameters": parameters}
    return recipe(models, path, merge_method="samerging", **keys)


def test_a_merge_from_file_to_file_says_what_it_was_and_how_to_load_it(models, tmp_path, monkeypatch):
    run = samerge("merge", recipe(models, tmp_path / "merge.yaml"), tmp_path / "merged")
    assert run.exit_code == 0, run.output
    found = read_report(tmp_path / "merged")
    assert [(of["name"], of["role"]) for of in found.models] == [("base", "base"), ("mood", "expert"), ("topic", "expert")]
    assert all(of["files"] for of in found.models) and found.run["seconds"] > 0 and found.run["peak_bytes"] > 0
    assert {value for row in found.coefficients.values() for value in row.values()} == {0.4} and found.heads == list(LABELS)
    card = (tmp_path / "merged/README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "transformers"

    monkeypatch.chdir(tmp_path)
    namespace = {}
    exec(card.partition("```python\n")[2].partition("```")[0], namespace)
    head = load_file("merged/heads/mood.safetensors")
    assert torch.equal(namespace["model"].state_dict()["classifier.weight"], head["classifier.weight"])


def test_without_a_report_the_card_is_there(models, tmp_path):
    for name, path in (("files", recipe(models, tmp_path / "f.yaml")), ("learned", learned(models, tmp_path / "l.yaml"))):
        run = samerge("merge", path, tmp_path / name, "--no-report")
        assert run.exit_code == 0, run.output
        assert (tmp_path / name / "README.md").is_file() and not list((tmp_path / name).glob("report.*"))
        refused = samerge("report", tmp_path / name)
        assert refused.exit_code == 1 and "holds no report.json" in refused.output


def test_check_says_what_there_is_and_fails_as_the_merge_does(models, tmp_path):
    fits = recipe(models, tmp_path / "merge.yaml")
    run = samerge("check", fits, tmp_path / "out")
    assert run.exit_code == 0, run.output
    said = ("task_arithmetic of 2 models:", "merged: 39 tensors", "kept per task: classifier.bias", "that are free", "memory:")
    for text in said:
        assert text in run.output, text
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.state").exists()

    headless = recipe(models, tmp_path / "headless.yaml", heads=[])
    errors = [samerge(*command) for command in (("check", headless), ("merge", headless, tmp_path / "out"))]
    assert errors[0].exit_code == errors[1].exit_code == 1 and "classifier" in errors[0].output
    assert errors[0].output == errors[1].output
    for command in ("check", "merge"):
        taken = samerge(command, fits, models / "base")
        assert taken.exit_code == 1 and "is merged" in taken.output

    run = samerge("check", learned(models, tmp_path / "learned.yaml"), tmp_path / "out")
    assert run.exit_code == 0 and "learns from mood: 2 batches" in run.output and "  resident: " in run.output
    run = samerge("check", learned(models, tmp_path / "rank.yaml", granularity="rank", rank=1))
    assert run.exit_code == 0 and "  resident: " in run.output


def test_commands_print_json_or_nothing(models, tmp_path):
    of_files, of_learned = recipe(models, tmp_path / "f.yaml"), learned(models, tmp_path / "l.yaml", memory_budget="8GB")
    found = json.loads(samerge("check", of_files, tmp_path / "out", "--json").output)
    assert [(of["name"], of["role"]) for of in found["models"]] == [("base", "base"), ("mood", "expert"), ("topic", "expert")]
    assert found["tensors"] == 39 and found["written_as"] == ["float32"] and found["buffers"] < found["memory"] and found["free"]
    assert found["kept_per_task"] == ["classifier.bias", "classifier.weight"] and "ways" not in found
    found = json.loads(samerge("check", of_learned, "--json").output)
    assert found["batches"] == {"mood": 2, "topic": 4} and found["chosen"] == found["ways"][0]["name"] == "resident"

    for path, method, out in ((of_files, "task_arithmetic", "files"), (of_learned, "samerging", "learned")):
        said = json.loads(samerge("merge", path, tmp_path / out, "--json").output.splitlines()[-1])
        assert said.pop("seconds") > 0
        assert said == {"out": str(tmp_path / out), "merge_method": method, "experts": list(LABELS)}
        quiet = samerge("merge", path, tmp_path / out, "--overwrite", "--quiet")
        assert quiet.exit_code == 0 and quiet.output == ""
    found = json.loads(samerge("compare", tmp_path / "files", tmp_path / "learned", "--json").output)
    assert found["differences"]["recipe.merge_method"] == ["task_arithmetic", "samerging"]
    assert [row["task"] for row in found["coefficients"]] == list(LABELS) and found["amounts"]["weights"][0].endswith("KB")


def test_a_merge_from_file_to_file_shows_how_far_it_is_on_a_terminal(models, tmp_path):
    """tqdm counts the bytes that are written, all of them."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    program = "from samerge_ext.cli.main import main; main()"
    arguments = ["merge", str(recipe(models, tmp_path / "f.yaml")), str(tmp_path / "out")]
    streams = {"stderr": slave, "stdout": subprocess.DEVNULL, "env": {**os.environ, "PYTHONPATH": str(ROOT)}}
    with subprocess.Popen([sys.executable, "-c", program, *arguments], **streams) as run:
        os.close(slave)
        shown = b""
        with contextlib.suppress(OSError):  # of a terminal that nobody writes to any more
            while block := os.read(master, 4096):
                shown += block
    os.close(master)
    assert run.returncode == 0 and b"out:" in shown and b"100%" in shown, shown


def test_a_slice_of_the_loss_rises_along_its_gradient(models, tmp_path):
    """By central differences around λ."""
    path = learned(models, tmp_path / "merge.yaml", rho=0.05)
    assert samerge("merge", path, tmp_path / "out").exit_code == 0
    found = read_report(tmp_path / "out")
    assert len(found.history) == 3 and found.config["rho"] == 0.05 and "progress" not in found.recipe["parameters"]
    add_loss_slice(found, tmp_path / "out")
    at, losses, norm = (found.loss_slice[key] for key in ("distances", "losses", "gradient_norm"))
    middle = len(at) // 2
    assert at[middle] == 0 and at[-1] == pytest.approx(3 * 0.05) and found.loss_slice["batches"] == 2 + 4
    slope = (losses[middle + 1] - losses[middle - 1]) / (at[middle + 1] - at[middle - 1])
    assert norm > 0 and slope == pytest.approx(norm, rel=0.05)


def test_report_adds_what_takes_time_and_compare_sets_two_side_by_side(models, tmp_path):
    assert samerge("merge", learned(models, tmp_path / "l.yaml"), tmp_path / "learned").exit_code == 0
    assert samerge("merge", recipe(models, tmp_path / "f.yaml"), tmp_path / "files").exit_code == 0
    for name in ("learned", "files"):
        run = samerge("report", tmp_path / name, "--similarity")
        assert run.exit_code == 0 and run.output.strip().endswith("report.html"), run.output
    one, other = (read_report(tmp_path / name) for name in ("learned", "files"))
    assert one.similarity == other.similarity and one.similarity["models"] == list(LABELS)
    assert "Sign conflicts" in (tmp_path / "learned/report.html").read_text()
    refused = samerge("report", tmp_path / "files", "--loss-slice")
    assert refused.exit_code == 1 and "task_arithmetic has no such loss" in refused.output

    run = samerge("compare", tmp_path / "learned", tmp_path / "files")
    assert run.exit_code == 0 and "recipe.merge_method" in run.output and "mean |B − A|" in run.output, run.output
    run = samerge("compare", tmp_path / "learned", tmp_path / "files", "--html", tmp_path / "both.html")
    assert run.exit_code == 0 and "What differs" in (tmp_path / "both.html").read_text()


def test_models_that_changed_since_are_not_measured(models, tmp_path):
    for name in ("base", *LABELS):
        (tmp_path / name).mkdir()
        for file in (models / name).iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    assert samerge("merge", recipe(tmp_path, tmp_path / "f.yaml"), tmp_path / "out").exit_code == 0
    weights = load_file(tmp_path / "mood/model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, tmp_path / "mood/model.safetensors", {"format": "pt"})
    run = samerge("report", tmp_path / "out", "--similarity")
    assert run.exit_code == 1 and "not what was merged" in run.output
    content = json.loads((tmp_path / "out/report.json").read_text())
    (tmp_path / "out/report.json").write_text(json.dumps({**content, "recipe": {}}))
    assert "merged in Python" in samerge("report", tmp_path / "out", "--similarity").output
