"""`samerge merge` of CLIP on pictures and class names: beside the same merge in Python, and what is refused."""

import json

import pytest
import torch
import yaml
from helpers import assert_alike, assert_close
from safetensors.torch import load_file
from typer.testing import CliRunner

import samerge_ext as sm
from samerge_ext.cli.commands import app
from samerge_ext.models import find_pictures, picture_batches, zero_shot_classification, zero_shot_head

transformers = pytest.importorskip("transformers")
from clips import CLASSES, KEEP, TEMPLATES, clip, save_clips, save_tasks  # noqa: E402
from families import make, move  # noqa: E402

SETTINGS = {"steps": 2, "learning_rate": 0.1, "progress": False}


@pytest.fixture
def folders(tmp_path):
    """The models, and a function that merges them: its result."""
    base, experts = save_clips(tmp_path, torch.float32)
    calibration = save_tasks(tmp_path)

    def merge(out="out", command="merge", calibration=calibration, **keys):
        recipe = {
            "merge_method": "samerging",
            "base_model": str(tmp_path / "base"),
            "models": [str(tmp_path / task) for task in CLASSES],
            "keep": KEEP,
            "calibration": calibration,
            "parameters": SETTINGS,
            **keys,
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        written = [str(tmp_path / out)] if command == "merge" else []
        return CliRunner().invoke(app, [command, str(tmp_path / "recipe.yaml"), *written])

    return tmp_path, base, experts, calibration, merge


def said(done):
    return " ".join(done.output.split())


def test_a_recipe_merges_as_python_does(folders):
    root, base, _, _, merge = folders
    done = merge()
    assert done.exit_code == 0, done.output
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "base")
    templates = {"a": ["a photo of a {}."], "b": TEMPLATES}
    heads = {task: zero_shot_head(base, tokenizer, names, templates[task]) for task, names in CLASSES.items()}
    batches = {task: picture_batches(find_pictures(root / "pictures" / task), root / "base", 2) for task in CLASSES}
    packed = sm.PackedWeights.from_folders(root / "base", {task: root / task for task in CLASSES}, keep=KEEP)
    logits = zero_shot_classification(heads)
    result = sm.samerging(clip(1, torch.float32), packed, batches, logits, config=sm.SAMergingConfig(**SETTINGS))
    written = load_file(root / "out" / "model.safetensors")
    for name, tensor in result.state_dict().items():
        assert_close(written[name], tensor.double(), name)
    assert {"config.json", "preprocessor_config.json", "tokenizer.json"} <= {path.name for path in (root / "out").iterdir()}
    assert json.loads((root / "out" / "config.json").read_text())["architectures"] == ["CLIPModel"]
    merged = transformers.CLIPModel.from_pretrained(root / "out")
    for name, tensor in base.state_dict().items():
        assert torch.equal(merged.state_dict()[name], tensor) != name.startswith("vision_model"), name


def test_towers_stored_under_the_whole_models_names_and_whole_models_are_experts_too(folders):
    """As the hub's older folders of image towers are."""
    root, _, experts, _, merge = folders
    merge("first")
    tensors = {n: t for n, t in experts["a"].state_dict().items() if n.startswith("vision_model")}
    torch.save(tensors, root / "a" / "pytorch_model.bin")
    (root / "a" / "model.safetensors").unlink()
    done = merge("second")
    assert done.exit_code == 0, done.output
    experts["b"].save_pretrained(root / "b")
    done = merge("third")
    assert done.exit_code == 0, done.output
    first, *others = (load_file(root / out / "model.safetensors") for out in ("first", "second", "third"))
    for other in others:
        assert first.keys() == other.keys() and all(torch.equal(other[name], tensor) for name, tensor in first.items())


def test_checked_within_a_budget_and_streamed(folders):
    root, *_, merge = folders
    done = merge(command="check")
    assert done.exit_code == 0 and "learns from a: 2 batches" in done.output, done.output
    written = {}
    for out, parameters in {"budget": {"memory_budget": "8GB"}, "streamed": {"streamed": True}}.items():
        done = merge(out, parameters={**SETTINGS, **parameters})
        assert done.exit_code == 0, done.output
        written[out] = load_file(root / out / "model.safetensors")
    for name, tensor in written["budget"].items():
        assert_alike(written["streamed"][name], tensor, name)


def test_what_makes_no_head_is_named(folders):
    root, _, _, calibration, merge = folders
    assert "classes are of [], the tasks are ['a', 'b']: add files for ['a', 'b']" in said(
        merge(calibration={key: value for key, value in calibration.items() if key not in ("classes", "templates")})
    )
    assert "templates are of ['c'], the tasks are ['a', 'b']: remove ['c']" in said(
        merge(calibration={**calibration, "templates": {"c": calibration["templates"]["b"]}})
    )
    missing = merge(calibration={**calibration, "classes": {**calibration["classes"], "a": str(root / "none.txt")}})
    assert missing.exit_code == 1 and "none.txt" in missing.output.replace("\n", "")
    (root / "templates.txt").write_text("a photo\n")
    assert "templates.txt: the template 'a photo' has no {}" in said(merge())
    (root / "a.txt").write_text("\n")
    assert "a.txt holds no texts" in said(merge())
    assert not (root / "out").exists()


def test_an_expert_with_a_text_tower_of_its_own_is_refused(folders):
    root, _, experts, _, merge = folders
    for expert, task in ((experts["a"], "a"), (move(experts["b"], 3), "b")):
        expert.save_pretrained(root / task)
    done = merge(keep=[])
    assert done.exit_code == 1 and "heads are made by the base's text tower" in said(done)
    assert not (root / "out").exists()


def test_classes_are_refused_where_the_model_has_heads(folders):
    root, *_, merge = folders
    for seed, name in enumerate(("base", "a", "b")):
        for path in (root / name).iterdir():
            if path.name != "preprocessor_config.json":
                path.unlink()
        move(make("vit"), seed).save_pretrained(root / name)
    done = merge(keep=[])
    assert done.exit_code == 1 and "classes and templates are CLIP's; these models are for image classification" in said(done)


def test_a_model_that_is_built_otherwise_is_refused(folders):
    """ALIGN has a temperature in the place of the logit scale."""
    root, *_, merge = folders
    text = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    vision = {"width_coefficient": 0.1, "depth_coefficient": 0.1, "image_size": 32, "hidden_dim": 16}
    config = transformers.AlignConfig(text_config=text, vision_config=vision, projection_dim=8)
    for name in ("base", "a", "b"):
        for path in (root / name).iterdir():
            if path.name.startswith(("config", "model")):
                path.unlink()
        transformers.AlignModel(config).save_pretrained(root / name)
    done = merge(keep=[])
    assert done.exit_code == 1 and "AlignModel is built otherwise than CLIP" in said(done)


def test_a_tower_without_its_whole_base_is_refused(folders):
    root, *_, merge = folders
    done = merge(base_model=str(root / "a"), models=[str(root / "b")], keep=[])
    assert done.exit_code == 1 and "names the architecture 'CLIPVisionModel'" in said(done)
