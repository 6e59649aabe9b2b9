"""Learned recipes by the processes that torchrun starts."""

import json
import os
import subprocess
import sys

import classifiers
import pytest
import torch
import yaml
from classifiers import LABELS
from helpers import PATH_TOLERANCE, ROOT
from safetensors.torch import load_file
from typer.testing import CliRunner

import samerge_ext as sm
from samerge_ext.cli.commands import app

SECONDS = 240


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return classifiers.write(tmp_path_factory.mktemp("models"))


def recipe(models, folder, method="samerging", **parameters):
    """merge.yaml in a folder."""
    learned = {"steps": 4, "learning_rate": 0.01, "streamed": True, **parameters}
    said = {
        "merge_method": method,
        "base_model": str(models / "base"),
        "models": [{"model": str(models / task)} for task in LABELS],
        "heads": ["classifier.*"],
        "calibration": {"files": {"mood": str(models / "mood.txt"), "topic": str(models / "topic.jsonl")}, "batch_size": 2},
        "parameters": learned,
    }
    if method == "statsmerging":
        del learned["streamed"]
    path = folder / "merge.yaml"
    path.write_text(yaml.safe_dump(said))
    return path


def torchrun(size, *arguments):
    """The exit code and what was printed, of so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment)
    return run.returncode, run.stdout, run.stderr


def coefficients(folder):
    found = json.loads((folder / "coefficients.json").read_text())["coefficients"]
    return torch.tensor([list(row.values()) for row in found.values()], dtype=torch.float64)


def alone(config, out):
    run = CliRunner().invoke(app, ["merge", str(config), str(out)])
    assert run.exit_code == 0, run.output
    return coefficients(out)


def assert_alike(found, truth):
    assert (found - truth).norm() <= PATH_TOLERANCE[torch.float32] * truth.norm()


def test_the_same_command_merges_by_several_processes(models, tmp_path):
    config = recipe(models, tmp_path)
    code, output, errors = torchrun(2, "-m", "samerge_ext", "merge", config, tmp_path / "out")
    assert code == 0, errors
    assert output.count("2 experts merged in") == 1, "one process speaks"
    assert errors.count("| 0/4 ") == 1, "and shows its progress"
    truth = alone(config, tmp_path / "alone")
    assert_alike(coefficients(tmp_path / "out"), truth)
    expected = load_file(tmp_path / "alone" / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], tensor, rtol=1e-4, atol=1e-5) for name, tensor in expected.items())
    assert not (tmp_path / "out.state").exists()


def test_what_one_process_began_several_go_on_with(models, tmp_path, monkeypatch):
    truth = alone(recipe(models, tmp_path, steps=6), tmp_path / "alone")

    def stop(*_, **__):
        raise OSError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(sm.Result, "save_pretrained", stop)
        run = CliRunner().invoke(app, ["merge", str(recipe(models, tmp_path, steps=3)), str(tmp_path / "out")])
        assert run.exit_code == 1 and (tmp_path / "out.state" / "state.pt").exists()
    code, _, errors = torchrun(2, "-m", "samerge_ext", "merge", recipe(models, tmp_path, steps=6), tmp_path / "out")
    assert code == 0, errors
    assert "3/6" in errors, "it goes on from the third step"
    assert_alike(coefficients(tmp_path / "out"), truth)


FAILING = """
import os
from samerge_ext.cli.main import main
from samerge_ext.learning import loop

def broken(*arguments):
    raise OSError("the disk of this machine is gone")

if os.environ["RANK"] == "1":
    loop.inputs_of_steps = broken
main()
"""


def test_a_rank_that_fails_ends_the_others(models, tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    code, _, errors = torchrun(2, script, "merge", recipe(models, tmp_path), tmp_path / "out")
    assert code != 0
    assert "error: rank 1: the disk of this machine is gone" in errors
    assert not (tmp_path / "out").exists() and (tmp_path / "out.state").exists()


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        ("statsmerging", {}, "statsmerging is merged by one process; only samerging and adamerging by those of torchrun"),
        ("samerging", {"memory_budget": "1MB"}, "memory_budget=1 MB is not enough for a rank of this merge by 2"),
    ],
)
def test_what_several_processes_do_not_merge_is_refused(models, tmp_path, method, parameters, message):
    code, _, errors = torchrun(2, "-m", "samerge_ext", "merge", recipe(models, tmp_path, method, **parameters), tmp_path / "out")
    assert code != 0
    assert "error: rank 0: " in errors and message in errors
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.state" / "packed.safetensors").exists()
