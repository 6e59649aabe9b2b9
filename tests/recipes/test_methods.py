"""mergekit's methods from a recipe: its parameters are those of the methods in Python, and which models are merged."""

import pytest
import torch
import yaml
from folders import read_all
from helpers import assert_close
from safetensors.torch import save_file

import samerge_ext as sm
from samerge_ext.recipes.parameters import METHODS
from samerge_ext.recipes.recipe import load_recipe
from samerge_ext.recipes.rules import RULES
from samerge_ext.recipes.run import run_recipe

SHAPES = {"embed.weight": (6, 40), "layers.0.mlp.weight": (40, 30), "layers.1.mlp.weight": (40, 30), "norm.bias": (30,)}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The folders base, a, b and c in the working directory."""
    monkeypatch.chdir(tmp_path)
    base = {}
    for seed, name in enumerate(("base", "a", "b", "c")):
        generator = torch.Generator().manual_seed(seed)
        tensors = {n: torch.randn(s, generator=generator) for n, s in SHAPES.items()}
        base = base or tensors
        (tmp_path / name).mkdir()
        tensors = tensors if name == "base" else {n: base[n] + 0.3 * x for n, x in tensors.items()}
        save_file(tensors, tmp_path / name / "model.safetensors")
    return tmp_path


def recipe(method, models="ab", parameters=None, base="base", own=None):
    entries = [{"model": model, "parameters": {k: v[i] for k, v in (own or {}).items()}} for i, model in enumerate(models)]
    return {"merge_method": method, "base_model": base, "models": entries, "parameters": parameters or {}}


def load(root, content):
    (root / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return load_recipe(root / "recipe.yaml", {})


def merged(root, content, out="out"):
    run_recipe(load(root, content), root / out, overwrite=True)
    return read_all(root / out)


def packed(experts):
    return sm.PackedWeights.from_folders("base", {name: name for name in experts})


def test_every_method_has_a_rule():
    assert set(METHODS) == set(RULES)


CASES = [
    ("slerp", "a", {"t": 0.3}, {}, lambda p: sm.slerp(p, 0.3)),
    ("nuslerp", "ab", {}, {"weight": [1, 3]}, lambda p: sm.nuslerp(p, [1, 3])),
    ("nuslerp", "ab", {"nuslerp_flatten": False}, {"weight": [1, 3]}, lambda p: sm.nuslerp(p, [1, 3], over="rows")),
    (
        "nuslerp", "ab", {"nuslerp_flatten": False, "nuslerp_row_wise": True}, {"weight": [1, 3]},
        lambda p: sm.nuslerp(p, [1, 3], over="columns"),
    ),
    (
        "multislerp", "abc", {"normalize_weights": False}, {"weight": [1, 3, 2]},
        lambda p: sm.multislerp(p, [1, 3, 2], normalize=False),
    ),
    ("model_stock", "abc", {"filter_wise": True}, {}, lambda p: sm.model_stock(p, filter_wise=True)),
    (
        "breadcrumbs", "ab", {"lambda": 0.9, "gamma": 0.1}, {"weight": [1, 0.5], "density": [0.4, 0.6]},
        lambda p: sm.breadcrumbs(p, [0.4, 0.6], 0.9, gamma=0.1, weights=[1, 0.5]),
    ),
    (
        "breadcrumbs_ties", "ab", {"weight": 0.5, "density": 0.4, "normalize": True}, {"gamma": [0.0, 0.2]},
        lambda p: sm.breadcrumbs(p, 0.4, gamma=[0.0, 0.2], weights=0.5, rule="ties", normalize=True),
    ),
    (
        "della", "ab", {"density": 0.5, "seed": 4}, {"weight": [1, 2], "epsilon": [0.1, 0.2]},
        lambda p: sm.della(p, 0.5, epsilon=[0.1, 0.2], weights=[1, 2], seed=4),
    ),
    (
        "della_linear", "ab", {"density": 0.5, "rescale": False}, {"weight": [1, 2]},
        lambda p: sm.della(p, 0.5, weights=[1, 2], rule="linear", normalize=False, rescale=False),
    ),
    ("sce", "abc", {"select_topk": 0.3, "int8_mask": True}, {}, lambda p: sm.sce(p, 0.3)),
    ("nearswap", "a", {"t": 0.1}, {}, lambda p: sm.nearswap(p, 0.1)),
    ("arcee_fusion", "a", {}, {}, sm.arcee_fusion),
    ("ram", "abc", {"epsilon": 0.1}, {}, lambda p: sm.ram(p, epsilon=0.1)),
    ("ramplus_tl", "abc", {"epsilon": 0.1, "r": 0.3, "alpha": 1.0}, {}, lambda p: sm.ram(p, 0.3, 1.0, epsilon=0.1)),
]  # fmt: skip


@pytest.mark.parametrize(("method", "models", "parameters", "own", "in_python"), CASES)
def test_a_recipe_gives_what_python_gives(root, method, models, parameters, own, in_python):
    found = merged(root, recipe(method, models, parameters, own=own))
    for name, tensor in in_python(packed(models)).state_dict().items():
        assert_close(found[name], tensor.double(), name)


def test_karcher_merges_the_base_too_where_it_is_given(root):
    expected = sm.karcher(packed("ab"), max_iter=4).state_dict()
    for name, tensor in merged(root, recipe("karcher", parameters={"max_iter": 4}, base=None)).items():
        assert_close(tensor, expected[name].double(), name)
    with_base = merged(root, recipe("karcher", ["a", "b"], {"max_iter": 4}))
    listed = merged(root, recipe("karcher", ["a", "b", "base"], {"max_iter": 4}, base=None), "other")
    for name, tensor in listed.items():
        assert torch.equal(with_base[name], tensor), name
        assert not torch.allclose(tensor, expected[name])


@pytest.mark.parametrize("method", ["nuslerp", "multislerp"])
def test_without_a_base_the_models_themselves_are_merged(root, method):
    zero = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    experts = {name: read_all(root / name) for name in "ab"}
    weights = sm.PackedWeights.from_state_dicts(zero, experts)
    expected = getattr(sm, method)(weights, [1.0, 2.0]).state_dict()
    for name, tensor in merged(root, recipe(method, base=None, own={"weight": [1, 2]})).items():
        assert_close(tensor, expected[name].double(), name)


def test_a_passed_through_model_may_be_scaled(root):
    scale = [{"filter": "mlp", "value": [0.5, 2.0]}, {"value": 1.0}]
    found, model = merged(root, recipe("passthrough", "a", base=None, own={"scale": [scale]})), read_all(root / "a")
    factors = {"layers.0.mlp.weight": 0.5, "layers.1.mlp.weight": 2.0}
    assert all(torch.equal(tensor, factors.get(name, 1.0) * model[name]) for name, tensor in found.items())


def test_slerps_t_by_name_and_over_the_layers(root):
    found = merged(root, recipe("slerp", "a", {"t": [{"filter": "mlp", "value": [0.0, 1.0]}, {"value": 0.5}]}))
    half = sm.slerp(packed("a"), 0.5).state_dict()
    for name, whole in (("layers.0.mlp.weight", "base"), ("layers.1.mlp.weight", "a")):
        assert_close(found[name], read_all(root / whole)[name].double(), name)
    assert_close(found["embed.weight"], half["embed.weight"].double())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (recipe("slerp", "ab", {"t": 0.5}), r"slerp merges 1 model beside the base, and models lists \['a', 'b'\]"),
        (recipe("slerp", "a", {"t": 0.5}, base=None), "slerp needs 'base_model'"),
        (recipe("slerp", "a", {"t": [{"filter": "mlp", "value": 1}]}), "slerp needs 't'; 'embed.weight' has none"),
        (recipe("slerp", "a", {"t": "x"}), "t: 'x' is not a number"),
        (recipe("nuslerp", "abc", {"weight": 1}), "nuslerp merges 2 models beside the base"),
        (recipe("nuslerp", "ab"), "nuslerp needs 'weight' for every model; 'embed.weight' has none"),
        (recipe("model_stock", "a"), "model_stock merges 2 models or more beside the base"),
        (recipe("multislerp", "ab", own={"weight": [1, -1]}), "the sum of the weights, which is 0; set normalize_weights"),
        (recipe("breadcrumbs", "a", {"weight": 1, "gamma": 2}), "gamma: 2 lies outside of 0"),
        (recipe("della", "a", {"weight": 1, "density": 0.1}), "'embed.weight': density ± epsilon, 0.1 ± 0.15, is to lie between"),
        (recipe("karcher", "ab", {"max_iter": 0.5}), "max_iter: 0.5 is not a whole number ≥ 1"),
        (recipe("karcher", "ab", {"tol": 0}), "tol: 0 is not a number above 0"),
        (recipe("ram", "ab", {"epsilon": -1}), "epsilon: -1 is negative"),
        (recipe("sce", "ab", {"select": 0.5}), r"unknown \['select'\]; known are \['device', 'int8_mask', 'select_topk'\]"),
        (recipe("passthrough", "ab", base=None), "passthrough merges 1 model, and models lists"),
    ],
)
def test_what_is_refused(root, content, message):
    with pytest.raises(ValueError, match=message):
        merged(root, content)
    assert not (root / "out").exists() and not (root / "out.state").exists()


def test_della_is_seeded_by_random_seed(root):
    content = recipe("della", "ab", {"weight": 1.0, "density": 0.5})
    seeded = merged(root, {**content, "random_seed": 7})
    assert_close(seeded["embed.weight"], sm.della(packed("ab"), seed=7).state_dict()["embed.weight"].double())
    assert not torch.equal(seeded["embed.weight"], merged(root, content)["embed.weight"])
