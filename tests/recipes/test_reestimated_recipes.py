"""`reestimate_batchnorm` of a recipe: beside the same in Python, and what is refused before anything is learned."""

import pytest
import torch
import transformers
from families import make, move, save_pictures
from helpers import assert_close
from safetensors.torch import load_file

import samerge_ext as sm
from samerge_ext.models import find_pictures, picture_batches
from samerge_ext.recipes.recipe import Recipe
from samerge_ext.recipes.run import run_recipe

SETTINGS = {"steps": 1, "learning_rate": 0.1, "progress": False}


def recipe(root, family="resnet", **keys):
    for seed, name in enumerate(("base", "a", "b")):
        model = move(make(family), seed)
        for part in model.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.running_mean += torch.randn_like(part.running_mean)
                part.running_var *= 1 + torch.rand_like(part.running_var)
        model.save_pretrained(root / name)
    save_pictures(root / "pictures").save_pretrained(root / "base")
    files = {task: root / "pictures" / task for task in "ab"}
    said = {"merge_method": "samerging", "calibration": {"files": files, "batch_size": 2}, "parameters": SETTINGS}
    models = [{"model": root / task} for task in "ab"]
    said |= {"base_model": root / "base", "models": models, "heads": ["classifier.*"], "reestimate_batchnorm": True, **keys}
    return Recipe(**{key: value for key, value in said.items() if value is not None})


def test_the_written_statistics_are_those_of_python(tmp_path):
    run_recipe(recipe(tmp_path), tmp_path / "out")
    packed = sm.PackedWeights.from_folders(tmp_path / "base", {t: tmp_path / t for t in "ab"}, heads="classifier.*")
    batches = {t: picture_batches(find_pictures(tmp_path / "pictures" / t), tmp_path / "base", 2) for t in "ab"}
    module = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    logits = sm.models.image_classification
    result = sm.samerging(module, packed, batches, logits, config=sm.SAMergingConfig(**SETTINGS))
    average = {name: buffer.clone() for name, buffer in module.named_buffers()}
    expected = sm.reestimate_batchnorm(result, batches, logits).state_dict()
    written = load_file(tmp_path / "out" / "model.safetensors")
    statistics = [name for name in written if name.endswith(("running_mean", "running_var"))]
    assert statistics
    for name in statistics:
        assert_close(written[name], expected[name].double(), name)
        assert not torch.allclose(written[name], average[name])


@pytest.mark.parametrize(
    ("family", "keys", "message"),
    [
        (
            "resnet",
            {"merge_method": "wudi", "calibration": None, "parameters": {}},
            "wudi goes from file to file and runs no model",
        ),
        ("resnet", {"parameters": {**SETTINGS, "streamed": True}}, "runs the whole merged model; leave out streamed"),
        ("vit", {}, "ViTForImageClassification has no BatchNorm with running statistics; leave out"),
    ],
)
def test_what_is_refused(tmp_path, family, keys, message, monkeypatch):
    monkeypatch.setattr(sm.PackedWeights, "from_folders", None)  # nothing is packed before
    with pytest.raises(ValueError, match=message):
        run_recipe(recipe(tmp_path, family, **keys), tmp_path / "out")
