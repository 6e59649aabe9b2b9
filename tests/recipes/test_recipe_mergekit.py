"""mergekit's YAML as people write it: what is merged, what is refused and how, what goes along, and what the reader is told."""

import json

import pytest
import torch
import yaml
from folders import read_all
from mergekit_recipes import SHAPES, load, merged, recipe, same, told, write_models

from samerge_ext.recipes.entries import parse_model
from samerge_ext.recipes.recipe import load_recipe


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The working directory, with the folders base, a and b."""
    monkeypatch.chdir(tmp_path)
    return write_models(tmp_path)


def test_empty_keys_are_not_there(root):
    text = """
models:
  - model: base
    parameters:
      # no parameters necessary for base model
  - model: a
    parameters: {weight: 0.5, density: }
  - model: b
    parameters: {weight: 0.5}
merge_method: task_arithmetic
base_model: base
parameters:
dtype:
slices:
"""
    same(merged(root, text), merged(root, recipe(), "expected"))


@pytest.mark.parametrize(("number", "boolean"), [(1, True), (0, False), (1.0, True), ("yes", True), ([1, 0], [True, False])])
def test_normalize_may_be_a_number(root, number, boolean):
    found, expected = (recipe("ties", parameters={"density": 0.5, "normalize": value}) for value in (number, boolean))
    same(merged(root, found), merged(root, expected, "expected"))
    with pytest.raises(ValueError, match="2 is neither true nor false"):
        merged(root, recipe("ties", parameters={"normalize": 2}))


@pytest.mark.parametrize("spelled", ["base/", "./base", "a/../base", "ABSOLUTE", "link"])
@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
def test_the_base_may_be_spelled_in_any_way(root, spelled, method):
    (root / "link").symlink_to("base")
    place = str(root / "base") if spelled == "ABSOLUTE" else spelled
    listed = {"model": place, "parameters": {"weight": 0.7}}
    found = merged(root, recipe(method, [listed, "a", "b"], parameters={"weight": 0.1}))
    expected = merged(root, recipe(method, [{**listed, "model": "base"}, "a", "b"]), "expected")
    same(found, expected)


def test_a_weight_for_all_is_the_bases_too_in_a_mean_and_only_where_it_is_given(root):
    (root / "x").mkdir()
    (root / "a").rename(root / "x/base")
    own = [{"model": "x/base"}, {"model": "b"}]
    found = merged(root, recipe("linear", own, parameters={"weight": 1.0}))
    three = [read_all(root / name) for name in ("x/base", "b", "base")]
    same(found, {name: sum(t[name] for t in three) / 3 for name in SHAPES})
    with pytest.raises(ValueError, match="linear needs 'weight' for every model; 'embed.weight' has none"):
        merged(root, recipe("linear", ["x/base", "b"], parameters={"weight": [{"filter": "mlp", "value": 1}]}))


def test_equal_folder_names_and_weight_files(root):
    expected = merged(root, recipe(), "expected")
    for name in ("a", "b"):
        (root / f"run_{name}").mkdir()
        (root / name).rename(root / f"run_{name}/checkpoint-5")
    places = ["run_a/checkpoint-5", "run_b/checkpoint-5"]
    assert load(root, recipe(models=places)).tasks == ["run_a-checkpoint-5", "run_b-checkpoint-5"]
    same(merged(root, recipe(models=places)), expected)
    files = [f"{place}/model.safetensors" for place in places]
    assert load(root, recipe(models=files)).tasks == ["run_a-checkpoint-5", "run_b-checkpoint-5"]
    same(merged(root, recipe(models=files)), expected)


def test_a_model_listed_twice_counts_twice(root):
    listed = ["a", {"model": "./a", "parameters": {"weight": 0.25}}]
    assert load(root, recipe(models=listed)).tasks == ["a", "a-2"]
    once = [{"model": "a", "parameters": {"weight": 0.75}}]
    same(merged(root, recipe(models=listed)), merged(root, recipe(models=once), "expected"))


def test_model_and_adapter_are_told_apart_by_what_exists(root):
    for name in ("a+b", "lora"):
        (root / name).mkdir()
    (root / "lora/adapter_config.json").write_text("{}")
    assert [tuple(map(str, parse_model(text))) for text in ("a+b", "a+lora", "org/a+org/b")] == [
        ("a+b", "None"), ("a", "lora"), ("org/a+org/b", "None"),
    ]  # fmt: skip
    assert tuple(map(str, parse_model({"model": {"path": "a"}, "lora": {"path": "lora", "revision": None}}))) == ("a", "lora")
    found = load(root, recipe(models=["a", "./base+lora"]))
    assert [str(entry.model) for entry in found.experts] == ["a", "lora"] and found.tasks == ["a", "lora"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"models": ["a+b"]}, "b holds no PEFT adapter"),
        ({"base_model": "base+lora"}, "a base with an adapter"),
        ({"models": [{"model": {"model": "a", "override_architecture": "X"}}]}, "no key 'override_architecture'"),
        ({"models": [{"model": {"path": "a", "revision": "main"}}]}, "no key 'revision'"),
        ({"models": [{"model": ""}]}, "'' is not a model's folder"),
        ({"merge_method": "dare-ties"}, "it is written dare_ties. Those that are: linear, task_arithmetic"),
        ({"merge_method": "slurp"}, "merge_method: 'slurp' is not a method here"),
        ({"parameters": {"lamda": 1}}, r"unknown \['lamda'\]; known are"),
        ({"models": [{"model": "a", "weight": 0.5}]}, "models.0: there is no key 'weight'; the keys are model, adapter, par"),
        ({"model": []}, r"no key 'model' \(models\?\)"),
        ({"modules": {"text": {}}}, "'modules': parts of a model"),
        ({"unsafe_truncate_embeddings": True}, "'unsafe_truncate_embeddings': rows are not cut"),
        ({"slices": []}, "'models' and 'slices' both say"),
        ({"tokenizer": {"tokens": {"x": {"source": {"kind": "one"}}}}}, "'x': kind: 'one' is neither zero nor model_token"),
        ({"tokenizer": {"tokens": {"x": {"source": {"kind": "model_token", "model": "a"}}}}}, "either its token or its token_id"),
        ({"tokenizer": {"tokens": {"x": {"force": "perhaps"}}}}, "tokenizer.tokens.x.force: "),
        ({"tokenizer": {"source": "base", "pad_to_multiple_of": 0}}, "tokenizer.pad_to_multiple_of: "),
        ({"tokenizer": {"missing": "any"}}, "tokenizer.missing: "),
        ({"merge_method": "linear", "base_model": None, "tokenizer": {"missing": "base"}}, "takes the rows of 'base_model'"),
        ({"tokenizer": {"sauce": "base"}}, "tokenizer: there is no key 'sauce'"),
        ({"tokenizer": {}, "tokenizer_source": "base"}, "say the same"),
        ({"tasks": ["org/news", "b"]}, "'org/news' is not a task name"),
        ({"dtype": "bf16"}, "dtype: Input should be 'float32', 'bfloat16', 'float16' or 'float64'"),
    ],
)
def test_what_is_refused_says_what_there_is(root, keys, message):
    (root / "lora").mkdir()
    (root / "lora/adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=message):
        load(root, {**recipe(), **keys} if "models" not in keys else recipe(**keys))


def sliced(*sources, **keys):
    layers = [{"model": m, "layer_range": [0, 2], "parameters": {"weight": 0.5}} if isinstance(m, str) else m for m in sources]
    return {"merge_method": "task_arithmetic", "base_model": "base", "slices": [{"sources": layers, **keys}]}


def test_one_slice_of_all_layers_is_a_plain_merge(root):
    expected = merged(root, recipe(), "expected")
    same(merged(root, sliced("a", "b")), expected)
    content = sliced("base", "a", "b", base_model="./base", residual_weight=None)
    del content["base_model"]
    same(merged(root, content), expected)
    listed = [{"model": m, "layer_range": [0, 2], "parameters": {"weight": 0.5}} for m in "ab"]
    same(merged(root, recipe(models=listed)), expected)


def test_a_slices_parameters_come_before_the_files(root):
    content = sliced("a", "b", parameters={"lambda": [{"filter": "mlp", "value": 0.5}]})
    found = merged(root, {**content, "parameters": {"lambda": 2.0}})
    by_name = [{"filter": "mlp", "value": 0.5}, {"value": 2.0}]
    same(found, merged(root, recipe(parameters={"lambda": by_name}), "expected"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (sliced({"model": "a", "layer_range": [0, 3]}, "b"), r"a has 2 layers, and layer_range is \[0, 3\]; it lies in \[0, 2\]"),
        (sliced({"model": "a", "layer_range": [0, 1]}, "b"), r"the sources of a slice have \[1, 2\] layers"),
        (sliced({"model": "a"}), "every source needs a model and its layer_range"),
        (sliced("a", layers=3), "no key 'layers'; the keys are sources"),
        (sliced("a", base_model="b"), "another one than the file's"),
    ],
)
def test_slices_that_are_refused(root, content, message):
    with pytest.raises(ValueError, match=message):
        merged(root, content)
    assert not (root / "out").exists() and not (root / "out.state").exists()


def test_what_changes_nothing_is_named(root):
    expected = merged(root, recipe(), "expected")
    keys = {"name": "x", "allow_crimes": True, "copy_tokenizer": True, "random_seed": 1}
    found, said = told(lambda: merged(root, recipe(parameters={"density": 0.1, "int8_mask": True}, **keys)))
    same(found, expected)
    assert "allow_crimes, copy_tokenizer: mergekit's options" in said and "task_arithmetic does not read density" in said
    own = [{"model": m, "parameters": {"weight": 0.5, "normalize": True}} for m in "ab"]
    found, said = told(lambda: merged(root, recipe(models=own)))
    same(found, expected)
    assert "a model's parameters: task_arithmetic does not read normalize there" in said
    _, said = told(lambda: merged(root, recipe("linear", parameters={"int8_mask": True})))
    assert not said
    found, said = told(lambda: merged(root, recipe("linear", parameters={"lambda": 2.0, "rescale": True})))
    same(found, merged(root, recipe("linear"), "expected"))
    assert "linear does not read lambda, rescale there" in said


def test_random_seed_is_dares_seed(root):
    found = merged(root, recipe("dare_linear", parameters={"density": 0.5}, random_seed=7))
    same(found, merged(root, recipe("dare_linear", parameters={"density": 0.5, "seed": 7}), "expected"))
    other = merged(root, recipe("dare_linear", parameters={"density": 0.5}))
    assert not torch.equal(found["embed.weight"], other["embed.weight"])


@pytest.mark.parametrize(("name", "dtype"), [("torch.bfloat16", torch.bfloat16), ("float64", torch.float64)])
def test_dtypes(root, name, dtype):
    assert {tensor.dtype for tensor in merged(root, recipe(dtype=name)).values()} == {dtype}
    assert json.loads((root / "out/config.json").read_text())["dtype"] == name.removeprefix("torch.")


@pytest.mark.parametrize("encode", [lambda s: b"\xef\xbb\xbf" + s.encode(), lambda s: s.replace("\n", "\r\n").encode()])
def test_files_of_other_editors(root, encode):
    path = root / "recipe.yaml"
    path.write_bytes(encode(yaml.safe_dump(recipe())))
    assert load_recipe(path, {}).tasks == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"merge_method: ties  # caf\xe9\n", "recipe.yaml is not UTF-8"),
        (b"merge_method: ties\n\tmodels: 1\n", "recipe.yaml is not valid YAML"),
        (b"parameters: {weight: 1}\nparameters: {density: 1}\n", "'parameters' is there twice, in line 1 and in line 2"),
        (b"a: 1\n---\nb: 2\n", "recipe.yaml is not valid YAML: expected a single document"),
        (b"- a\n", "recipe.yaml holds a list"),
    ],
)
def test_files_that_are_no_recipe(root, content, message):
    (root / "recipe.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_recipe(root / "recipe.yaml", {})


def tokenizer(folder, words, template=None, form="tokenizer.json"):
    vocabulary = {word: number for number, word in enumerate(words)}
    if form == "tokenizer.json":
        content = {"model": {"type": "WordLevel", "vocab": vocabulary}, "added_tokens": [], "x": folder.name}
        (folder / form).write_text(json.dumps(content))
    else:
        (folder / form).write_text("\n".join(words) if form == "vocab.txt" else json.dumps(vocabulary))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template} if template else {}))


@pytest.mark.parametrize("source", ["base", "union", "a", {"model": "a"}])
def test_the_tokenizer_that_is_asked_for_goes_along(root, source):
    for name in ("base", "a", "b"):
        tokenizer(root / name, ["x", "y"])
    merged(root, recipe(tokenizer={"source": source}))
    wanted = "base" if source in ("base", "union") else "a"
    assert json.loads((root / "out/tokenizer.json").read_text())["x"] == wanted
    merged(root, recipe(tokenizer_source=source), "other")
    assert json.loads((root / "other/tokenizer.json").read_text())["x"] == wanted


def test_tokens_of_unknown_embeddings_are_not_moved(root):
    for name, words in {"base": ["x", "y"], "a": ["x", "y"], "b": ["y", "x"]}.items():
        tokenizer(root / name, words)
    for source in ("base", "union"):
        with pytest.raises(ValueError, match="base .* has no embeddings under a known name"):
            merged(root, recipe(tokenizer_source=source))
    assert not (root / "out").exists() and not (root / "out.state").exists()


def test_without_tokenizers_nothing_is_compared(root):
    _, said = told(lambda: merged(root, recipe(tokenizer_source="union")))
    assert "tokenizer: base has no vocabulary, so that none goes along" in said


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("auto", "{{ common }}"),
        ("a", "{{ common }}"),
        ("base", "{{ of base }}"),
        ("file.jinja", "{{ of file }}"),
        ("{{ itself }}", "{{ itself }}"),
        (None, "{{ of base }}"),
    ],
)
def test_chat_templates(root, wanted, found):
    for name, template in {"base": "{{ of base }}", "a": "{{ common }}", "b": "{{ common }}"}.items():
        tokenizer(root / name, ["x"], template)
    (root / "file.jinja").write_text("{{ of file }}")
    merged(root, recipe(chat_template=wanted))
    assert json.loads((root / "out/tokenizer_config.json").read_text())["chat_template"] == found
    if wanted not in (None, "base"):
        assert (root / "out/chat_template.jinja").read_text() == found
    with pytest.raises(ValueError, match="'llama9' is none of auto, base, chatml, no model's folder"):
        merged(root, recipe(chat_template="llama9"))


def test_chatml_is_what_transformers_makes_of_it(root):
    jinja2 = pytest.importorskip("jinja2")
    merged(root, recipe(chat_template="chatml"))
    template = jinja2.Template((root / "out/chat_template.jinja").read_text())
    text = template.render(messages=[{"role": "user", "content": "hi"}], add_generation_prompt=True)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_what_only_other_models_have_is_said(root):
    tokenizer(root / "a", ["x"], "{{ x }}")
    (root / "b/generation_config.json").write_text("{}")
    (root / "base/config.json").unlink()
    _, said = told(lambda: merged(root, recipe()))
    assert "base has no config.json" in said and "copy that of a" in said
    assert "a chat template is in a and none in base" in said and "chat_template: auto" in said
    assert "a generation_config.json is in b and none in base" in said
    (root / "base/config.json").write_text("{}")
    _, said = told(lambda: merged(root, recipe(models=["a"], chat_template="auto")))
    assert not said
