"""What merges leave to read: reports, their code, `samerge report` and `compare`."""

import classifiers
import pytest
import torch
import yaml
from classifiers import LABELS
from safetensors.torch import load_file
from typer.testing import CliRunner

from samerge_ext.cli.commands import app
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
