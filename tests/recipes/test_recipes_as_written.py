"""Recipes as people write them: models by their paths, no models, numbers as texts, settings and devices that do not exist."""

import json

import pytest
import yaml

from samerge_ext.learning.config import check_device
from samerge_ext.models.texts import read_texts
from samerge_ext.recipes.recipe import load_recipe
from samerge_ext.recipes.tokenizers import companions_of


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
        ({"steps": 0}, "steps=0; expected a whole number"),
    ):
        with pytest.raises(ValueError, match=f"parameters of samerging: {said}"):
            learned(tmp_path, **parameters)


def test_devices_that_are_not_there_are_refused():
    check_device(None), check_device("cpu")
    with pytest.raises(ValueError, match="device='gpu': torch knows no such device"):
        check_device("gpu")
    with pytest.raises(ValueError, match="device='cuda:99': torch finds [0-9]+ GPUs here"):
        check_device("cuda:99")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".parquet"])
def test_tables_are_no_texts(tmp_path, suffix):
    file = tmp_path / f"texts{suffix}"
    file.write_text("text,label\ngood,1\n")
    with pytest.raises(ValueError, match="is no file with one text a line"):
        read_texts(file)


def test_the_union_of_tokenizers_is_the_one_that_knows_all_tokens(tmp_path):
    """Chat tokens that all experts have, in rows of the embeddings that the base keeps free."""
    words = {"a": 0, "b": 1}
    found = recipe(tmp_path, models=[str(tmp_path / "a"), str(tmp_path / "b")], tokenizer_source="union")
    for name, more in (("base", {}), ("a", {"<|im_start|>": 2}), ("b", {"<|im_start|>": 2})):
        (tmp_path / name / "vocab.json").write_text(json.dumps({**words, **more}))
    with pytest.warns(UserWarning, match=r"base lacks 1 tokens of .*a \('<\|im_start\|>' …\)"):
        assert companions_of(found).tokenizer == tmp_path / "a"
    (tmp_path / "b/vocab.json").write_text(json.dumps({**words, "<|user|>": 2}))
    with pytest.raises(ValueError, match="the vocabularies of .* differ: by vocab.json, .*user"):
        companions_of(found)
    (tmp_path / "b/vocab.json").write_text(json.dumps({**words, "<|user|>": 3}))
    with pytest.raises(ValueError, match="token '<|user|>' is only in the other"):
        companions_of(found)
