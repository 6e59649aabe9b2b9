"""Recipes as people write them: models by their paths, no models, numbers as texts, settings and devices that do not exist."""

import json
import math

import pytest
import yaml

from samerge_ext.models.texts import read_texts
from samerge_ext.packing.stores import check_device, indexed
from samerge_ext.recipes.recipe import load_recipe


def recipe(tmp_path, **keys):
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir(exist_ok=True)
    content = {"merge_method": "task_arithmetic", "base_model": str(tmp_path / "base"), "models": [str(tmp_path / "a")], **keys}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    return load_recipe(tmp_path / "r.yaml", {})


def learned(tmp_path, **parameters):
    calibration = {"files": {"a": "a.txt"}}
    return recipe(tmp_path, merge_method="samerging", calibration=calibration, parameters=parameters)


def test_a_model_may_be_its_path_alone(tmp_path):
    assert [entry.model for entry in recipe(tmp_path).models] == [tmp_path / "a"]


def test_a_merge_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'models' lists no model; give those"):
        recipe(tmp_path, models=[])
    with pytest.raises(ValueError, match="'models' lists no model beside the base"):
        recipe(tmp_path, models=[{"model": str(tmp_path / "base")}])


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), ".inf"])
def test_a_weight_is_finite(tmp_path, weight):
    with pytest.raises(ValueError, match="is not a (finite )?number"):
        recipe(tmp_path, models=[{"model": str(tmp_path / "a"), "parameters": {"weight": weight}}])


def test_settings_of_learned_merges_have_their_fields_types(tmp_path):
    """YAML reads 1e-3 as a text."""
    settings = learned(tmp_path, learning_rate="1e-3", steps="20").method_settings(checkpoint_dir="state")
    assert settings.learning_rate == 1e-3 and settings.steps == 20 and settings.checkpoint_dir == "state"
    for parameters, said in (
        ({"learning_rate": "fast"}, "learning_rate: Input should be a valid number"),
        ({"seed": "a"}, "seed: Input should be a valid integer"),
        ({"learning_rat": 1}, r"there is no key 'learning_rat' \(learning_rate\?\); the keys are granularity"),
        ({"steps": 0}, "steps=0; expected a number ≥ 1"),
    ):
        with pytest.raises(ValueError, match=f"parameters of samerging: {said}"):
            learned(tmp_path, **parameters)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"steps": math.inf}, "steps: Input should be a finite number"),
        ({"rho": math.nan}, "rho=nan; expected a finite number"),
        ({"task_weights": [1]}, "task_weights: Input should be a valid"),
        ({"task_weights": {"a": math.inf}}, "task_weights={'a': inf}; expected a finite number for every name"),
        ({"task_weights": {"c": 1}}, r"task_weights names \['c'\]; the tasks are \['a'\]"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(tmp_path, parameters, message):
    with pytest.raises(ValueError, match=f"r.yaml is no recipe that can be merged:\n  .*parameters of samerging: {message}"):
        learned(tmp_path, **parameters)


def test_devices_that_are_not_there_are_refused():
    check_device(None), check_device("cpu")
    for refusing in (check_device, indexed):  # of a run, of a plan
        with pytest.raises(ValueError, match="device='gpu': torch knows no such device"):
            refusing("gpu")
    with pytest.raises(ValueError, match="device='cuda:99': torch finds [0-9]+ GPUs here"):
        check_device("cuda:99")
    for device in ("meta", "xla", "mps"):
        with pytest.raises(ValueError, match=f"device='{device}': torch cannot compute on it here"):
            check_device(device)


@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
def test_a_text_ends_with_its_line(tmp_path, suffix):
    """JSON and texts may hold what Unicode, and Python, call ends of lines."""
    texts = ["one\u2028two", "a\x85b\x0bc", "last"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) if suffix == ".jsonl" else text for text in texts]
    (tmp_path / f"x{suffix}").write_bytes("\r\n".join(lines).encode())
    assert read_texts(tmp_path / f"x{suffix}") == texts


@pytest.mark.parametrize(
    "line",
    ['{"text": 5}', '{"text": null}', '{"text": "\\ud800"}', '{"txt": "a"}', "[1]", "5", '"text"', "[" * 10**5],
    ids=lambda line: line[:20],
)
def test_a_line_without_a_text_is_named(tmp_path, line):
    (tmp_path / "x.jsonl").write_text(f'{{"text": "a"}}\n{line}\n')
    with pytest.raises(ValueError, match='x.jsonl, line 2: expected a JSON object with a text as its field "text"') as error:
        read_texts(tmp_path / "x.jsonl")
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".parquet"])
def test_tables_are_no_texts(tmp_path, suffix):
    file = tmp_path / f"texts{suffix}"
    file.write_text("text,label\ngood,1\n")
    with pytest.raises(ValueError, match="is no file with one text a line"):
        read_texts(file)
