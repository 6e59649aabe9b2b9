"""A config.json that says more than the folder's tensors can be is refused before a model of it is made."""

import json
import time

import families
import pytest

from samerge_ext.checkpoints.architecture import Architecture, bounded_by_tensors
from samerge_ext.models.architecture import empty_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    families.make("llama").save_pretrained(folder := tmp_path_factory.mktemp("llama"))
    return folder


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_hidden_layers", 100_000, "num_hidden_layers is 100000, and the folder has 21 tensors"),
        ("num_hidden_layers", 10**12, "num_hidden_layers is 1000000000000, and the folder has 21 tensors"),
        ("num_hidden_layers", 1000, "more than 4096 tensors, and the folder has 21 tensors"),
        ("hidden_size", 10**10, "hidden_size is 10000000000"),
    ],
)
def test_a_model_is_not_larger_than_its_tensors(llama, tmp_path, key, value, message):
    (tmp_path / "model.safetensors").symlink_to(llama / "model.safetensors")
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    started = time.perf_counter()
    with pytest.raises(ValueError, match=message):
        empty_model(tmp_path, "LlamaForCausalLM")
    Architecture.of_folder(tmp_path)  # where transformers' tables are a help alone, general rules are left
    assert time.perf_counter() - started < 60


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_is_within_the_bounds(family, tmp_path):
    model = families.make(family)
    model.save_pretrained(tmp_path)
    with bounded_by_tensors(tmp_path):
        families.make(family)
