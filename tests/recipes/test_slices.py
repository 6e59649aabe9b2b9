"""mergekit's slices: which layer of which model is where, what of it is merged by which parameters, and what is refused."""

import json

import pytest
import torch
import yaml
from folders import assert_same, read_all
from helpers import assert_close
from safetensors.torch import save_file

from samerge_ext.recipes.recipe import load_recipe
from samerge_ext.recipes.run import run_recipe

LAYERS = 3
CONFIG = {"model_type": "x", "num_hidden_layers": LAYERS, "layer_types": ["full", "sliding", "full"], "dtype": "float32"}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The models base, a and b, of three layers, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "a", "b")):
        generator = torch.Generator().manual_seed(seed)
        names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
        names += [f"model.layers.{i}.{part}.weight" for i in range(LAYERS) for part in ("mlp", "attn")]
        (tmp_path / name).mkdir()
        save_file({name: torch.randn(4, 6, generator=generator) for name in names}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def load(root, content):
    (root / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return load_recipe(root / "recipe.yaml", {})


def merged(root, content):
    run_recipe(load(root, content), root / "out")
    return read_all(root / "out")


def source(model, first, last, **parameters):
    return {"model": model, "layer_range": [first, last], "parameters": parameters or None}


def slices(*sources, method="passthrough", **keys):
    return {"merge_method": method, "slices": [{"sources": [s] if isinstance(s, dict) else list(s)} for s in sources], **keys}


def expected(root, layers, first, last):
    """layers: model and layer of each; what is before them is of ``first``, what is after of ``last``."""
    models = {name: read_all(root / name) for name in ("base", "a", "b")}
    found = {"model.embed_tokens.weight": models[first]["model.embed_tokens.weight"]}
    found |= {name: models[last][name] for name in ("model.norm.weight", "lm_head.weight")}
    for i, (model, layer) in enumerate(layers):
        for part in ("mlp", "attn"):
            found[f"model.layers.{i}.{part}.weight"] = models[model][f"model.layers.{layer}.{part}.weight"]
    return found


def test_a_deeper_model(root):
    found = merged(root, slices(source("a", 0, 2), source("b", 1, 3), source("a", 2, 3)))
    assert_same(found, expected(root, [("a", 0), ("a", 1), ("b", 1), ("b", 2), ("a", 2)], "a", "a"))
    config = json.loads((root / "out/config.json").read_text())
    assert config["num_hidden_layers"] == 5
    assert config["layer_types"] == ["full", "sliding", "sliding", "full", "full"]


def test_inputs_are_the_first_models_and_outputs_the_lasts(root):
    assert_same(merged(root, slices(source("a", 0, 1), source("b", 2, 3))), expected(root, [("a", 0), ("b", 2)], "a", "b"))


def test_one_slice_of_some_layers_is_a_shallower_model(root):
    assert_same(merged(root, slices(source("b", 1, 3))), expected(root, [("b", 1), ("b", 2)], "b", "b"))
    assert json.loads((root / "out/config.json").read_text())["num_hidden_layers"] == 2


def test_a_nested_configuration(root):
    (root / "a/config.json").write_text(json.dumps({"model_type": "x", "text_config": {"n_layer": 3, "model_type": "y"}}))
    merged(root, slices(source("a", 0, 2), source("a", 0, 2)))
    assert json.loads((root / "out/config.json").read_text())["text_config"]["n_layer"] == 4


def test_scales_are_found_by_the_sources_layers(root):
    """By its name in the source, and along the slice: in the second slice 0 to 1."""
    scale = [{"filter": "layers.1.mlp", "value": 3.0}, {"filter": "attn", "value": [0.0, 1.0]}, {"value": 1.0}]
    found = merged(root, slices(source("a", 0, 1), source("a", 1, 3, scale=scale)))
    plain = expected(root, [("a", 0), ("a", 1), ("a", 2)], "a", "a")
    for name, tensor in found.items():
        factor = {"model.layers.1.mlp.weight": 3.0, "model.layers.1.attn.weight": 0.0}.get(name, 1.0)
        assert torch.equal(tensor, factor * plain[name]), name


@pytest.mark.parametrize("listed", [True, False])
def test_task_vectors_of_layers_that_belong_together(root, listed):
    """The base has layers of its own; one that is not listed has those of the first source."""
    layers = (1, 3) if listed else (0, 2)
    base = [source("./base", *layers)] if listed else []
    content = slices(
        [*base, source("a", 0, 2, weight=0.5), source("b", 1, 3, weight=[0.2, 0.4])],
        [source("a", 0, 1, weight=1.0), source("b", 2, 3, weight=0.1)],
        method="task_arithmetic",
        base_model="base",
    )
    found = merged(root, content)
    models = {name: read_all(root / name) for name in ("base", "a", "b")}
    first, second, third = (layers[0], 0, 1), (layers[0] + 1, 1, 2), (0, 0, 2)
    weights_of = ((0.5, 0.2), (0.5, 0.4), (1.0, 0.1))
    for out, ((b, a, other), weights) in enumerate(zip((first, second, third), weights_of)):
        theta, one, two = (
            models[name][f"model.layers.{layer}.mlp.weight"].double() for name, layer in (("base", b), ("a", a), ("b", other))
        )
        merge = theta + weights[0] * (one - theta) + weights[1] * (two - theta)
        assert_close(found[f"model.layers.{out}.mlp.weight"], merge, str(out))


def test_a_slices_parameters_come_before_the_files(root):
    content = slices([source("base", 0, 1), source("a", 0, 1)], [source("base", 1, 3), source("a", 1, 3)], method="slerp")
    content |= {"base_model": "base", "parameters": {"t": 0.0}}
    content["slices"][1]["parameters"] = {"t": [{"filter": "mlp", "value": 1.0}]}
    found = merged(root, content)
    models = {name: read_all(root / name) for name in ("base", "a")}
    for name, tensor in found.items():
        whose = "a" if "mlp" in name and "layers.0" not in name else "base"
        assert_close(tensor, models[whose][name].double(), name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (slices(source("a", 0, 2), source("a", 2, 4)), r"a has 3 layers, and layer_range is \[2, 4\]; it lies in \[0, 3\]"),
        (slices(source("a", 2, 2)), r"layer_range is \[2, 2\]"),
        (slices([source("a", 0, 2), source("b", 0, 2)], source("a", 0, 1)), "passthrough merges 1 model, and models lists"),
        (slices([source("a", 0, 2), source("b", 0, 1)], method="linear"), r"the sources of a slice have \[1, 2\] layers"),
        (
            slices([source("a", 0, 2), source("b", 0, 2)], source("a", 0, 1), method="linear"),
            "slice 2 merges 1 models, the first 2",
        ),
        (slices(source("a", 0, 2), source("a", 0, 2), heads=["lm_head.*"]), "'heads' is of models that are merged whole"),
        (slices(source("a", 0, 2), source("a", 0, 2), method="samerging", base_model="base"), "samerging needs 'calibration'"),
        (slices(source("a", 0, 2), source("b", 0, 1, skale=1.0)), r"unknown \['skale'\]"),
        ({**slices(source("a", 0, 2)), "slices": []}, "a list of slices is expected"),
        (slices({"model": "a"}, source("b", 0, 1)), "every source needs a model and its layer_range"),
    ],
)
def test_slices_that_are_refused(root, content, message):
    with pytest.raises(ValueError, match=message):
        merged(root, content)
    assert not (root / "out").exists() and not (root / "out.state").exists()


def test_a_model_of_two_stacks_has_no_slices(root):
    tensors = read_all(root / "a")
    save_file({**tensors, "vision.layers.0.weight": torch.zeros(2)}, root / "a/model.safetensors")
    with pytest.raises(ValueError, match=r"a\) has stacks of layers, 'model.layers.', 'vision.layers.'; slices are of models"):
        merged(root, slices(source("a", 0, 2), source("a", 0, 2)))


def test_models_that_call_their_layers_otherwise_are_not_stacked(root):
    save_file({f"base.{name}": tensor for name, tensor in read_all(root / "b").items()}, root / "b/model.safetensors")
    with pytest.raises(ValueError, match="layers are called 'base.model.layers.' in .*b.* and 'model.layers.' in"):
        merged(root, slices(source("a", 0, 2), source("b", 0, 2)))


def test_a_layer_that_is_no_number_names_its_models(root):
    tensors = read_all(root / "b")
    tensors["model.layers.2.mlp.weight"][0] = torch.nan
    save_file(tensors, root / "b/model.safetensors")
    with pytest.raises(ValueError, match=r"source 1 of the slices \(a, b\): 'model.layers.1.mlp.weight' holds NaN"):
        merged(root, slices(source("a", 0, 1), source("b", 2, 3)))
