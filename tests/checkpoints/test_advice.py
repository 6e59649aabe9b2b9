"""Every kind of difference has its own advice, and what can be followed is followed."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from samerge_ext.checkpoints.alignment import align
from samerge_ext.checkpoints.sources import StateDictSource
from samerge_ext.recipes.recipe import Recipe
from samerge_ext.recipes.run import run_recipe


def model(layers=2, **more):
    names = ["embed_tokens.weight", *(f"layers.{i}.{part}.weight" for i in range(layers) for part in ("q", "norm"))]
    torch.manual_seed(len(more))
    return {name: torch.randn(4, 4) for name in names} | {name.replace("/", "."): tensor for name, tensor in more.items()}


def some(*shape):
    return torch.rand(shape)


PLAIN = model()
CASES = {  # base, expert, what is advised
    "heads of an expert": (PLAIN, model(**{"classifier/weight": some(2, 4)}), r"per task with heads=\['classifier\.\*'\]"),
    "a head of the base": (model(**{"score/weight": some(2, 4)}), PLAIN, r"heads=\['score\.\*'\]"),
    "heads by other names": (
        model(**{"pooler/dense/weight": some(4, 4)}),
        model(**{"classifier/dense/bias": some(4), "head": some(2, 4)}),
        r"heads=\['pooler\.\*', 'classifier\.\*', 'head'\]",
    ),
    "a tower of an expert": (PLAIN, model(**{"visual/blocks/0/weight": some(3)}), r"keep it, .* with keep=\['visual\.\*'\]"),
    "a tower of the base": (model(**{"text_model/embed/weight": some(3)}), PLAIN, r"the base's with keep=\['text_model\.\*'\]"),
    "an untied expert": (PLAIN, model(**{"lm_head/weight": some(4, 4)}), "expert 'a' is untied: its 'lm_head.weight'"),
    "an untied base": (model(**{"lm_head/weight": some(4, 4)}), PLAIN, "base is untied: its 'lm_head.weight'"),
    "more layers": (PLAIN, model(layers=3), "base has 2 layers, expert 'a' has 3: only models of one size merge"),
    "fewer layers": (model(layers=3), PLAIN, "base has 3 layers, expert 'a' has 2: only models of one size merge"),
    "a quantised expert": (PLAIN, model(**{"layers/0/q/qweight": some(4, 4)}), "expert 'a' is quantised: dequantise it first"),
    "a quantised base": (model(**{"layers/0/q/weight/absmax": some(4)}), PLAIN, "base is quantised: dequantise it first"),
    "experts of a mixture": (
        model(**{f"layers/0/mlp/experts/{i}/w1/weight": some(4, 4) for i in range(2)}),
        model(**{"layers/0/mlp/experts/gate_up_proj": some(2, 4, 8)}),
        "expert 'a' stores all experts of a mixture as one tensor, .* save_pretrained",
    ),
    "another architecture": (PLAIN, {f"blocks.{i}.w": some(3, 3) for i in range(2)}, "not models of one architecture"),
}


def message(base, expert, **options):
    with pytest.raises(ValueError) as refused:
        align(StateDictSource(base, "base"), [("a", StateDictSource(expert, "expert 'a'"))], **options)
    return str(refused.value)


@pytest.mark.parametrize("kind", CASES)
def test_each_kind_of_difference_has_its_own_advice(kind):
    base, expert, expected = CASES[kind]
    text = message(base, expert)
    assert re.search(expected, text), text
    others = [other for name, (*_, other) in CASES.items() if name != kind and re.search(other, text)]
    assert not others, (text, others)
    assert len(text) < 700 and ("lacks" in text)


def test_heads_are_not_advised_for_what_all_tasks_share():
    for name in ("embeddings.position.weight", "layers.1.k.weight", "norm.weight"):
        assert "heads=" not in message(PLAIN, {**PLAIN, name: some(3)})


@pytest.mark.parametrize("kind", [name for name, (*_, expected) in CASES.items() if "heads=" in expected or "keep=" in expected])
def test_advice_that_can_be_followed_is(kind, tmp_path):
    base, expert, _ = CASES[kind]
    expert = {name: tensor + 1 for name, tensor in expert.items()}
    for name, tensors in (("base", base), ("a", expert)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "a"), "parameters": {"weight": 1.0}}],
    }
    with pytest.raises(ValueError) as refused:
        run_recipe(Recipe.model_validate(recipe), tmp_path / "out")
    key, patterns = re.search(r"(heads|keep)=(\[.*?\])", str(refused.value)).groups()
    run_recipe(Recipe.model_validate({**recipe, key: eval(patterns)}), tmp_path / "out")
    written = load_file(tmp_path / "out/model.safetensors")
    own = expert.keys() - base.keys()
    assert written.keys() == base.keys() | (own if key == "keep" else set())
    assert all(torch.allclose(written[name], expert[name]) for name in (PLAIN.keys() if key == "heads" else expert.keys()))
    assert all(torch.equal(written[name], base[name]) for name in base.keys() - expert.keys())
    if key == "heads" and own:
        assert load_file(tmp_path / "out/heads/a.safetensors").keys() == own
