"""`samerge merge`: recipes, what is refused in them, and folders that transformers loads."""

import json

import classifiers
import pytest
import torch
import yaml
from classifiers import LABELS, transformers, weights
from typer.testing import CliRunner

import samerge_ext as sm
from samerge_ext.cli.commands import app
from samerge_ext.recipes.recipe import load_recipe
from samerge_ext.recipes.run import run_recipe


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return classifiers.write(tmp_path_factory.mktemp("models"))


@pytest.fixture
def write(models, tmp_path):
    def write(**keys):
        content = {
            "merge_method": "task_arithmetic",
            "base_model": str(models / "base"),
            "models": [{"model": str(models / task)} for task in LABELS],
            "heads": ["classifier.*"],
            **keys,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
        return path

    return write


def learned(models, **keys):
    files = {"mood": str(models / "mood.txt"), "topic": str(models / "topic.jsonl")}
    return {
        "merge_method": "samerging",
        "calibration": {"files": files, "batch_size": 2},
        "parameters": {"steps": 4, "learning_rate": 0.01, "progress": False},
        **keys,
    }


def test_task_arithmetic_with_mergekits_keys(models, write, tmp_path):
    entries = [{"model": str(models / task), "parameters": {"weight": w}} for task, w in zip(LABELS, (0.2, 0.5), strict=True)]
    run_recipe(load_recipe(write(models=entries, parameters={"lambda": 2.0}), {}), tmp_path / "out")
    base, mood, topic, merged = (weights(f) for f in (models / "base", models / "mood", models / "topic", tmp_path / "out"))
    for name, tensor in merged.items():
        expected = base[name] + 0.4 * (mood[name] - base[name]) + 1.0 * (topic[name] - base[name])
        torch.testing.assert_close(tensor, expected)


def test_a_file_that_names_no_method_is_merged_by_wudi_or_learned_where_it_has_texts(models, write, tmp_path):
    run_recipe(load_recipe(write(merge_method=None), {}), tmp_path / "default")
    run_recipe(load_recipe(write(merge_method="wudi"), {}), tmp_path / "wudi")
    default, named = weights(tmp_path / "default"), weights(tmp_path / "wudi")
    assert all(torch.equal(default[name], tensor) for name, tensor in named.items())
    assert load_recipe(write(**learned(models, merge_method=None)), {}).merge_method == "samerging"


def test_linear_is_the_weighted_mean(models, write, tmp_path):
    entries = [{"model": str(models / task), "parameters": {"weight": w}} for task, w in zip(LABELS, (1.0, 3.0), strict=True)]
    run_recipe(load_recipe(write(merge_method="linear", models=entries), {}), tmp_path / "out")
    mood, topic, merged = (weights(f) for f in (models / "mood", models / "topic", tmp_path / "out"))
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, 0.25 * mood[name] + 0.75 * topic[name])


def entries(models, *parameters):
    return [{"model": str(models / task), "parameters": p} for task, p in zip(LABELS, parameters, strict=True)]


def merged_by(write, out, **keys):
    run_recipe(load_recipe(write(**keys), {}), out)
    return weights(out)


def test_ties_reads_density_weight_and_lambda_of_models_and_of_all(models, write, tmp_path):
    listed = entries(models, {"weight": 0.5, "density": 0.3}, {})
    parameters = {"weight": 2, "density": "6e-1", "lambda": 0.9}
    found = merged_by(write, tmp_path / "out", merge_method="ties", models=listed, parameters=parameters)
    packed = sm.PackedWeights.from_folders(models / "base", {t: models / t for t in LABELS}, heads="classifier.*")
    expected = sm.ties(packed, [0.3, 0.6], 0.9, weights=[0.5, 2.0]).state_dict()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[f"bert.{name}"]), name
    parameters["trim"] = "vector"
    whole = merged_by(write, tmp_path / "whole", merge_method="ties", models=listed, parameters=parameters)
    expected = sm.ties(packed, [0.3, 0.6], 0.9, weights=[0.5, 2.0], trim="vector").state_dict()
    assert torch.equal(whole["pooler.dense.weight"], expected["bert.pooler.dense.weight"])


@pytest.mark.parametrize("rule", ["linear", "ties"])
def test_dare_from_a_recipe(models, write, tmp_path, rule):
    listed = entries(models, {"weight": 0.4}, {"weight": 0.4})
    parameters = {"density": 0.5, "seed": 7, "int8_mask": True}
    found = merged_by(write, tmp_path / "out", merge_method=f"dare_{rule}", models=listed, parameters=parameters)
    packed = sm.PackedWeights.from_folders(models / "base", {t: models / t for t in LABELS}, heads="classifier.*")
    expected = sm.dare(packed, 0.5, 1.0, weights=0.4, rule=rule, seed=7).state_dict()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[f"bert.{name}"]), name


def test_parameters_by_name_and_by_depth(models, write, tmp_path):
    by_name = [{"filter": "attention", "value": [0.0, 1.0]}, {"value": 0.5}]
    found = merged_by(write, tmp_path / "out", models=entries(models, {"weight": by_name}, {"weight": 0.0}))
    base, mood = weights(models / "base"), weights(models / "mood")
    for name, tensor in found.items():
        weight = float(name.split(".")[2]) if "attention" in name else 0.5  # of two layers
        torch.testing.assert_close(tensor, base[name] + weight * (mood[name] - base[name]))


def test_the_base_may_be_among_the_models(models, write, tmp_path):
    listed = [{"model": str(models / "base")}, *entries(models, {"weight": 0.5}, {"weight": 0.5})]
    found = merged_by(write, tmp_path / "out", models=listed)
    expected = merged_by(write, tmp_path / "without", models=listed[1:])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_linear_needs_no_base_and_no_sum_of_one(models, write, tmp_path):
    keys = {"merge_method": "linear", "models": entries(models, {"weight": 0.5}, {"weight": 2.0})}
    found = merged_by(write, tmp_path / "out", base_model=None, parameters={"normalize": False}, **keys)
    mood, topic = weights(models / "mood"), weights(models / "topic")
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, 0.5 * mood[name] + 2.0 * topic[name])


def test_out_dtype_and_heads_of_files(models, write, tmp_path):
    found = merged_by(write, tmp_path / "out", out_dtype="bfloat16")
    assert {t.dtype for t in found.values() if t.is_floating_point()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    assert (tmp_path / "out/heads/mood.safetensors").exists()
    assert "merge_method: task_arithmetic" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"merge_method": "ties"}, "ties needs 'weight' for every model"),
        ({"merge_method": "ties", "parameters": {"weight": 1, "density": 1.2}}, "density 1.2 lies outside"),
        ({"merge_method": "ties", "parameters": {"weight": "much"}}, "'much' is not a number"),
        (
            {"merge_method": "ties", "parameters": {"weight": [0, 1], "trim": "vector"}},
            "weight differs between tensors",
        ),
    ],
)
def test_values_that_are_refused_when_merging(write, tmp_path, keys, message):
    with pytest.raises(ValueError, match=message):
        run_recipe(load_recipe(write(**keys), {}), tmp_path / "out")
    assert not (tmp_path / "out.state").exists()


def test_dtype_is_what_is_written_and_loaded(write, tmp_path):
    run_recipe(load_recipe(write(dtype="bfloat16"), {}), tmp_path / "out")
    assert {t.dtype for t in weights(tmp_path / "out").values() if t.is_floating_point()} == {torch.bfloat16}
    run_recipe(load_recipe(write(), {}), tmp_path / "same")
    assert {t.dtype for t in weights(tmp_path / "same").values() if t.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("form", ["bfloat16", "int4"])
def test_task_vectors_are_stored_as_the_recipe_says(models, write, tmp_path, form):
    result = run_recipe(load_recipe(write(**learned(models, task_vector_dtype=form)), {}), tmp_path / "out")
    stored = result.packed.task_vectors
    assert stored.bits == 4 if form == "int4" else stored.dtype == torch.bfloat16
    assert result.packed.base.dtype == torch.float32 and len(result.history) == 4
    options = CliRunner().invoke(app, ["merge", str(write()), str(tmp_path / "other"), "--task-vector-dtype", "int3"])
    assert options.exit_code == 1 and "task_vector_dtype: Input should be 'float32'" in options.output


def test_factors_are_kept_of_adapters_alone(models, write, tmp_path):
    with pytest.raises(ValueError, match="expert 'mood' .* is no LoRA adapter"):
        run_recipe(load_recipe(write(**learned(models, task_vector_dtype="lora")), {}), tmp_path / "out")


@pytest.mark.parametrize("method", ["samerging", "adamerging", "statsmerging"])
def test_a_learned_merge_is_the_one_from_python(models, write, tmp_path, method):
    result = run_recipe(load_recipe(write(**learned(models, merge_method=method)), {}), tmp_path / "out")
    packed = sm.PackedWeights.from_folders(models / "base", {task: models / task for task in LABELS}, heads="classifier.*")
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / "base")
    texts = {
        "mood": [line for line in (models / "mood.txt").read_text().splitlines() if line],
        "topic": [json.loads(line)["text"] for line in (models / "topic.jsonl").read_text().splitlines()],
    }
    batches = {
        task: [tokenizer(held[i : i + 2], padding=True, return_tensors="pt") for i in range(0, len(held), 2)]
        for task, held in texts.items()
    }
    experts = {task: transformers.AutoModelForSequenceClassification.from_pretrained(models / task) for task in LABELS}

    def logits(module, batch, task):
        pooled = module.bert(batch["input_ids"], attention_mask=batch["attention_mask"]).pooler_output
        return experts[task].classifier(pooled)

    module = transformers.AutoModelForSequenceClassification.from_pretrained(models / "base")
    configs = {"samerging": sm.SAMergingConfig, "adamerging": sm.AdaMergingConfig, "statsmerging": sm.StatsMergingConfig}
    config = configs[method](steps=4, learning_rate=0.01, progress=False)
    expected = getattr(sm, method)(module, packed, batches, logits, config=config)
    torch.testing.assert_close(result.coefficients, expected.coefficients, rtol=1e-4, atol=1e-6)
    assert (tmp_path / "out/heads/topic.safetensors").exists()
    assert not (tmp_path / "out.state").exists(), "the state of a finished merge is removed"
    summary = json.loads((tmp_path / "out/coefficients.json").read_text())
    assert summary["steps"] == 4 and set(summary["coefficients"]) == set(LABELS)
    torch.testing.assert_close(weights(tmp_path / "out")["pooler.dense.weight"], result.state_dict()["bert.pooler.dense.weight"])


def test_every_key_is_an_option_too(models, write, tmp_path):
    arguments = [
        "merge", str(write()), str(tmp_path / "out"), "--merge-method", "samerging", "--dtype", "bfloat16",
        "--task", "a", "--task", "b", "--calibration", f"a={models / 'mood.txt'}", "--calibration", f"b={models / 'topic.jsonl'}",
        "--calibration-texts", "2", "--batch-size", "1", "--max-length", "4",
        "--parameter", "steps=2", "--parameter", "progress=false",
    ]  # fmt: skip
    run = CliRunner().invoke(app, arguments)
    assert run.exit_code == 0, run.output
    assert "samerging: 2 experts merged" in run.output
    assert set(json.loads((tmp_path / "out/coefficients.json").read_text())["coefficients"]) == {"a", "b"}


def test_a_taken_target_is_refused_before_any_work(models, write, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("mine")
    (tmp_path / "base.safetensors").touch()  # of which nothing can be read
    run = CliRunner().invoke(app, ["merge", str(write(base_model=str(tmp_path / "base.safetensors"))), str(tmp_path / "out")])
    assert run.exit_code == 1 and "overwrite" in run.output
    assert (tmp_path / "out/precious").read_text() == "mine"


def test_an_interrupted_merge_continues(models, write, tmp_path, monkeypatch):
    """The state lies beside the target until the folder is whole."""
    keys = learned(models)
    keys["parameters"] |= {"checkpoint_every": 2}
    recipe = load_recipe(write(**keys), {})
    expected = run_recipe(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(sm.Result, "save_pretrained", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe, tmp_path / "out")
    assert (tmp_path / "out.state/state.pt").exists() and not (tmp_path / "out").exists()
    assert torch.equal(run_recipe(recipe, tmp_path / "out").coefficients, expected.coefficients)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"merge_methud": "linear"}, r"no key 'merge_methud' \(merge_method\?\); the keys are merge_method, base_model"),
        ({"merge_method": "lerp"}, "merge_method: 'lerp' is not a method here. Those that are: linear"),
        ({"parameters": {"lamda": 1.0}}, r"unknown \['lamda'\]"),
        ({"merge_method": "samerging"}, "samerging needs 'calibration'"),
        ({"calibration": {"files": {}}}, "task_arithmetic does not read 'calibration'"),
        ({"tasks": ["one"]}, "tasks names 1, models lists 2"),
        ({"base_model": None}, "task_arithmetic needs 'base_model'"),
        ({"merge_method": "ties", "parameters": {"rescale": True, "trim": "vector"}}, "'rescale' is by tensor"),
        ({"merge_method": "ties", "parameters": {"trim": "row"}}, "choose tensor or vector"),
    ],
)
def test_recipes_that_are_refused(write, keys, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(write(**keys), {})


def test_a_learned_methods_parameters_are_checked(models, write):
    keys = learned(models)
    keys["parameters"] = {"learning_rates": 0.1}
    with pytest.raises(ValueError, match="parameters of samerging: .*learning_rates"):
        load_recipe(write(**keys), {})
    keys["parameters"] = {"rho": -1}
    with pytest.raises(ValueError, match="rho=-1"):
        load_recipe(write(**keys), {})


def test_missing_heads_advise_the_pattern(write, tmp_path):
    run = CliRunner().invoke(app, ["merge", str(write(heads=None)), str(tmp_path / "out")])
    assert run.exit_code == 1
    assert "'classifier.bias' is [3], in base" in run.output and "heads=['classifier.*']" in run.output


def test_a_calibration_file_without_texts_is_refused(models, write, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    keys = learned(models)
    keys["calibration"]["files"]["mood"] = str(empty)
    with pytest.raises(ValueError, match="empty.txt holds no texts"):
        run_recipe(load_recipe(write(**keys), {}), tmp_path / "out")


def test_a_jsonl_record_without_text_names_its_line(models, write, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "sun"}\n{"txt": "rain"}\n')
    keys = learned(models)
    keys["calibration"]["files"]["mood"] = str(broken)
    with pytest.raises(ValueError, match="broken.jsonl, line 2"):
        run_recipe(load_recipe(write(**keys), {}), tmp_path / "out")


def test_statsmergings_own_parameters_are_a_recipes(models, write, tmp_path):
    keys = learned(models, merge_method="statsmerging")
    keys["parameters"] |= {"of": "task_vectors", "singular_values": 1, "loss": "kl", "hidden": 8}
    result = run_recipe(load_recipe(write(**keys), {}), tmp_path / "out")
    assert result.learner.settings.of == "task_vectors" and result.learner.weight.shape == (1, 4, 8)
    loaded = sm.StatsMergeLearner.load(tmp_path / "out/learner/learner.safetensors")
    assert torch.equal(loaded.weight, result.learner.weight)
    keys["parameters"] |= {"of": "base"}
    with pytest.raises(ValueError, match="of='base'"):
        load_recipe(write(**keys), {})
