"""Values of recipes and options that no merge can have: refused when the file is read, by key, model and file."""

import json

import pytest
import torch
import yaml
from safetensors.torch import save_file
from typer.testing import CliRunner

from samerge_ext.cli.commands import app
from samerge_ext.recipes.recipe import load_recipe


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(seed)
        (root / name).mkdir()
        save_file({f"layers.{i}.weight": torch.randn(4, 4) for i in range(2)}, root / name / "model.safetensors")
        (root / name / "config.json").write_text("{}")
    return root


@pytest.fixture
def write(folders, tmp_path):
    def write(**keys):
        content = {"merge_method": "task_arithmetic", "base_model": str(folders / "base")}
        content["models"] = [str(folders / "a"), str(folders / "b")]
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**content, **keys}))
        return tmp_path / "recipe.yaml"

    return write


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"models": []}, "'models' lists no model"),
        ({"models": [5]}, "models.0: "),
        ({"models": ["\0"]}, r"models.0: '\\x00' is not a model's folder"),
        ({"models": [{"model": {"path": [1]}}]}, r"models.0: \[1\] is not a model's folder"),
        ({"models": ["x" * 100_000]}, "models.0: 'xxx.* is not a model's folder"),
        ({"merge_method": "dare_linear", "parameters": {"seed": [1]}}, r"parameters: seed: \[1\] is not a whole number"),
        ({"merge_method": "dare_linear", "random_seed": 10**30}, "seed: 10{30} is not a whole number of"),
        ({"merge_method": "dare_linear", "random_seed": "x"}, "seed: 'x' is not a whole number"),
        ({"parameters": {"weight": [{"filter": 5, "value": 1}]}}, "parameters: weight: 5 is not a filter"),
        ({"parameters": {"weight": [{"value": "abc"}]}}, "parameters: weight: 'abc' is not a number"),
        ({"parameters": {"weight": 1e308}}, r"weight: 1e\+308 is not a finite number that weights can have"),
        ({"parameters": {"lambda": float("inf")}}, "lambda: inf is not a finite number"),
        ({"parameters": {"weight": [1, "2024-01-01"]}}, "weight: '2024-01-01' is not a number"),
        ({"parameters": {"normalize": "perhaps"}}, "normalize: 'perhaps' is neither true nor false"),
        ({"merge_method": "ties", "parameters": {"density": [0, 2]}}, "density: density 2 lies outside"),
        ({"parameters": {"device": 0}}, "parameters: device: 0 is not a text"),
        ({"parameters": {"device": [{"value": "cuda"}]}}, r"parameters: device: .* is not a text"),
        ({"parameters": 5}, "parameters: "),
        ({"parameters": [1], "merge_method": "dare_ties", "random_seed": 1}, r"'parameters': \[1\]; keys and values are"),
        ({"tokenizer_source": 5}, "tokenizer: 5 is not a model's folder"),
        ({"tasks": ["a", "a"]}, "tasks names 'a' twice"),
        ({"merge_method": "x" * 100_000}, "merge_method: 'xxx"),
        ({"x" * 100_000: 1}, "there is no key 'xxx"),
        ({"models": [{"model": "a", "x": 1}] * 1000}, "and 990 more"),
    ],
)
def test_recipes_with_wrong_values(write, keys, message):
    path = write(**keys)
    with pytest.raises(ValueError, match=message) as error:
        load_recipe(path, {})
    assert str(path) in str(error.value) and len(str(error.value)) < 2500


def test_a_models_value_names_the_model(write, folders):
    path = write(models=[str(folders / "a"), {"model": str(folders / "b"), "parameters": {"weight": "abc"}}])
    with pytest.raises(ValueError, match=rf"parameters \({folders}/b\): weight: 'abc' is not a number"):
        load_recipe(path, {})


def run(*arguments):
    found = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return found


def test_what_is_found_with_the_models_is_one_message_too(write, folders, tmp_path):
    out = tmp_path / "out"
    for keys, message in [
        ({"heads": ["*"]}, "heads pattern '*'"),
        ({"models": ["~nosuchuser/x"]}, "~nosuchuser/x is neither a folder nor a file"),
        ({"models": ["a" * 300]}, "File name too long; give it a shorter name"),
        ({"models": [str(folders / "a/config.json/x")]}, "is neither a folder nor a file"),
        ({"chat_template": "~nosuchuser"}, "chat_template: '~nosuchuser' is none of"),
        ({"parameters": {"device": "cuda:99"}}, "device='cuda:99': torch finds"),
    ]:
        found = run("merge", write(**keys), out)
        assert found.exit_code == 1 and message in found.output, found.output
        assert not out.exists() and not (tmp_path / "out.state").exists()
    found = run("merge", write(), folders / "a/config.json/out")
    assert found.exit_code == 1 and "config.json" in found.output


@pytest.mark.parametrize("text", ["weight=[", "seed=!!int x", "weight=" + "[" * 10_000, "weight=&a [*a]", "weight=2024-13-45"])
def test_options_that_are_no_yaml_or_no_value(write, tmp_path, text):
    found = run("merge", write(), tmp_path / "out", "--parameter", text)
    assert found.exit_code in (1, 2) and len(found.output) < 3000 and text[:4] in found.output


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["{", "[]", '{"a":' * 300 + "1" + "}" * 300])
def test_files_beside_the_base_are_read_before_the_merge(write, folders, tmp_path, name, content, monkeypatch):
    """And not when the weights are written."""
    path = write(base_model=str(tmp_path / "damaged"))
    (tmp_path / "damaged").mkdir()
    for source in ("config.json", "model.safetensors"):
        (tmp_path / "damaged" / source).write_bytes((folders / "base" / source).read_bytes())
    (tmp_path / "damaged" / name).write_text(content)
    monkeypatch.setattr("samerge_ext.elementwise.file_merge._Run.merge", lambda *_: pytest.fail("merged"))
    found = run("merge", path, tmp_path / "out")
    assert found.exit_code == 1 and name in found.output
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.state").exists()


def test_a_limit_of_file_sizes_is_told_with_the_file(write, folders, tmp_path):
    """EFBIG, which names no file by itself."""
    import resource
    import signal

    from processes import in_a_process

    recipe = write()
    message = in_a_process(_merged_under_a_limit, recipe, tmp_path / "out", signal.SIGXFSZ, resource.RLIMIT_FSIZE)
    assert str(tmp_path / "out") in message and "ulimit -f" in message
    assert not (tmp_path / "out").exists() and json.loads((folders / "base/config.json").read_text()) == {}


def _merged_under_a_limit(recipe, out, signal_number, limit):
    import resource
    import signal

    signal.signal(signal_number, signal.SIG_IGN)
    resource.setrlimit(limit, (100, resource.RLIM_INFINITY))
    return run("merge", recipe, out).output


def test_what_only_the_merge_finds_wrong_names_the_recipe_too(write, tmp_path):
    file = write(tokenizer_source="uninn")
    result = CliRunner().invoke(app, ["merge", str(file), str(tmp_path / "out")])
    assert result.exit_code == 1 and not (tmp_path / "out").exists()
    assert "tokenizer: 'uninn' is neither base nor union" in result.output
    assert result.output.count(f"while merging as {file} says") == 1
