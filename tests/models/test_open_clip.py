"""open_clip's models of every kind of image encoder: merged, written, and loaded again by open_clip; heads beside its own.

It is installed by `make test-open-clip`, which runs this file: beside PyPI's torchvision, which it needs, transformers cannot be
imported in a process of its own.
"""

import copy
import json

import pytest
import torch
import yaml
from helpers import assert_alike, assert_close
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.func import functional_call
from typer.testing import CliRunner

import samerge_ext as sm
from samerge_ext.cli.commands import app
from samerge_ext.models import find_pictures, picture_batches, zero_shot_classification, zero_shot_head
from samerge_ext.models.evaluation import evaluate
from samerge_ext.models.folders import FolderModel

pytest.importorskip("transformers")
from families import save_pictures  # noqa: E402

open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed: make test-open-clip")

TEXT = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "patch_size": 8, "layers": 2, "width": 16, "head_width": 8}
POOLED = {**VIT, "pool_type": "avg", "no_ln_pre": True, "final_ln_after_pool": True, "ls_init_value": 0.1}
TIMM = {"timm_model_pretrained": False, "timm_proj": "linear", "image_size": 32}
SIGLIP = {"custom_text": True, "init_logit_bias": -10.0}
FAMILIES = {  # the image tower, and what else the model is made of
    "ViT": (VIT, {}),
    "ViT quick GELU": (VIT, {"quick_gelu": True}),
    "ViT with pooled tokens": (POOLED, {}),
    "ViT with sines": ({**VIT, "pos_embed_type": "sin_cos_2d"}, {}),
    "ViT with attentional pooling": ({**VIT, "attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2}, {}),
    "ViT of SigLIP": (VIT, SIGLIP),
    "ResNet": ({"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64}, {}),
    "timm ResNet": ({**TIMM, "timm_model_name": "test_resnet", "timm_pool": "avg"}, {}),
    "timm ViT": ({**TIMM, "timm_model_name": "test_vit", "timm_pool": "", "image_size": 160}, SIGLIP),
    "timm ConvNeXt": ({**TIMM, "timm_model_name": "test_convnext", "timm_pool": "avg"}, {}),
}
CLASSES = {"a": ["cat", "red fox", "dog"], "b": ["car", "plane"]}
TEMPLATES = ["a photo of a {}.", "art of the {}"]


@pytest.fixture(params=FAMILIES)
def name(request, tmp_path, monkeypatch):
    """A model of open_clip by its name."""
    vision, others = FAMILIES[request.param]
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": TEXT, **others}
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [tmp_path / "tiny.json"])
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {})
    open_clip.factory._rescan_model_configs()
    return "tiny"


def made(name):
    """A model of random weights, what it makes of pictures, and its tokenizer."""
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    return model.eval(), preprocess, open_clip.get_tokenizer(name)


def fine_tuned(base, seed):
    """The image tower moved, its running statistics too."""
    torch.manual_seed(seed)
    expert = copy.deepcopy(base)
    with torch.no_grad():
        for tensor in expert.visual.parameters():
            tensor += 0.02 * torch.randn_like(tensor)
        for part in expert.visual.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.running_mean += 0.1 * torch.randn_like(part.running_mean)
                part.running_var *= 1 + torch.rand_like(part.running_var)
    return expert


def literal(base, experts, coefficients, heads, pictures, task):
    """Logits in fp64 of base + Σ λ τ, running statistics averaged."""
    tensors = {name: tensor.double() for name, tensor in base.state_dict().items()}
    tuned = {each: expert.state_dict() for each, expert in experts.items()}
    for layer, tensor in tensors.items():
        if layer.endswith(("running_mean", "running_var")):
            tensors[layer] = torch.stack([tuned[each][layer].double() for each in tuned]).mean(0)
        elif layer in coefficients["a"]:
            tensors[layer] = tensor + sum(coefficients[each][layer] * (tuned[each][layer].double() - tensor) for each in tuned)
    exact = copy.deepcopy(base).double()
    with torch.no_grad():
        features = functional_call(exact, tensors, (pictures.double(),))[0]  # normalised
    return features @ heads[task].double().T


def test_an_image_encoder_is_merged_and_loaded_again(name, tmp_path):
    base, preprocess, tokenizer = made(name)
    base.requires_grad_(False)
    experts = {task: fine_tuned(base, seed) for seed, task in enumerate("ab", 1)}
    heads = {task: zero_shot_head(base, tokenizer, classes, TEMPLATES) for task, classes in CLASSES.items()}
    save_pictures(tmp_path / "pictures")
    batches = {task: picture_batches(find_pictures(tmp_path / "pictures" / task), preprocess, 2) for task in "ab"}

    packed = sm.PackedWeights.from_modules(base, experts)
    config = sm.SAMergingConfig(steps=2, learning_rate=0.1, progress=False)
    result = sm.samerging(copy.deepcopy(base), packed, batches, zero_shot_classification(heads), config=config)
    assert all(name.startswith("visual.") for name in {*packed.layout.names} - {*packed.unchanged})
    coefficients = result.summary()["coefficients"]
    assert len({*coefficients["a"].values(), *coefficients["b"].values()}) > 2, "nothing was learned"

    path = result.save_pretrained(tmp_path / "merged") / "model.safetensors"
    loaded, _, _ = open_clip.create_model_and_transforms(name, pretrained=str(path))
    logits = zero_shot_classification(heads)
    for task in "ab":
        pictures = batches[task][0]["pixel_values"]
        with torch.no_grad():
            found = logits(loaded.eval(), pictures, task)
        assert_alike(found, literal(base, experts, coefficients, heads, pictures, task), f"logits of {task}")


def test_heads_are_those_of_open_clip(name):
    model, _, tokenizer = made(name)
    model = model.double()
    for templates in (TEMPLATES, [lambda c: f"a bad photo of a {c}.", "a {}".format]):
        own = open_clip.build_zero_shot_classifier(model, tokenizer, CLASSES["a"], templates, num_classes_per_batch=None)
        found = zero_shot_head(model, tokenizer, CLASSES["a"], templates)
        assert found.shape == (3, 16)
        assert_close(found, model.logit_scale.detach().exp() * own.T)


def save_folder(folder, name):
    """A base as open_clip's hub has it, and experts as its training leaves them; the base and the experts."""
    base, _, _ = made(name)
    experts = {task: fine_tuned(base, seed) for seed, task in enumerate("ab", 1)}
    (folder / "base").mkdir()
    save_file(base.state_dict(), folder / "base" / "open_clip_model.safetensors")
    config = {"model_cfg": json.loads((folder / "tiny.json").read_text()), "preprocess_cfg": {"mean": [0.5] * 3}}
    (folder / "base" / "open_clip_config.json").write_text(json.dumps(config))
    for task, expert in experts.items():
        tensors = {f"module.{name}": tensor for name, tensor in expert.state_dict().items()}
        torch.save({"epoch": 1, "name": task, "state_dict": tensors, "optimizer": {"state": {}}}, folder / f"{task}.pt")
    return base, experts


@pytest.mark.parametrize("name", ["ViT"], indirect=True)
def test_folders_of_the_hub_and_checkpoints_of_training_are_merged(name, tmp_path):
    """The folder that is written is one for open_clip's local-dir: as well."""
    base, experts = save_folder(tmp_path, name)
    packed = sm.PackedWeights.from_folders(tmp_path / "base", {task: tmp_path / f"{task}.pt" for task in "ab"})
    sm.task_arithmetic(packed, 0.5).save_pretrained(tmp_path / "out")
    loaded, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    for name, tensor in base.state_dict().items():
        change = sum(0.5 * (expert.state_dict()[name].double() - tensor.double()) for expert in experts.values())
        assert_close(loaded.state_dict()[name], tensor.double() + change, name)
    assert preprocess.transforms[-1].mean == [0.5] * 3


@pytest.mark.parametrize("name", ["ViT"], indirect=True)
def test_image_encoders_alone_are_experts(name, tmp_path):
    base, experts = save_folder(tmp_path, name)
    for task, expert in experts.items():
        tensors = {name: tensor for name, tensor in expert.state_dict().items() if name.startswith("visual.")}
        save_file(tensors, tmp_path / f"{task}.safetensors")
    keep = ["transformer.*", "token_embedding.*", "positional_embedding", "ln_final.*", "text_projection", "logit_scale"]
    for suffix, kept in (("pt", ()), ("safetensors", keep)):
        packed = sm.PackedWeights.from_folders(tmp_path / "base", {t: tmp_path / f"{t}.{suffix}" for t in "ab"}, keep=kept)
        found = sm.task_arithmetic(packed, 0.5).state_dict()
        for name, tensor in base.state_dict().items():
            change = sum(0.5 * (expert.state_dict()[name].double() - tensor.double()) for expert in experts.values())
            assert_close(found[name], tensor.double() + change, name)


@pytest.mark.parametrize("name", ["ViT", "ViT of SigLIP", "ResNet", "timm ResNet"], indirect=True)
def test_a_recipe_merges_streamed_as_python_does_resident(name, tmp_path):
    base, _ = save_folder(tmp_path, name)
    folder = f"local-dir:{tmp_path / 'base'}"
    _, _, preprocess = open_clip.create_model_and_transforms(folder)
    heads = {task: zero_shot_head(base, open_clip.get_tokenizer(folder), names) for task, names in CLASSES.items()}
    save_pictures(tmp_path / "pictures")
    batches = {task: picture_batches(find_pictures(tmp_path / "pictures" / task), preprocess, 2) for task in "ab"}
    packed = sm.PackedWeights.from_folders(tmp_path / "base", {task: tmp_path / f"{task}.pt" for task in "ab"})
    settings = {"steps": 2, "learning_rate": 0.1, "progress": False}
    logits = zero_shot_classification(heads)
    expected = sm.samerging(copy.deepcopy(base), packed, batches, logits, config=sm.SAMergingConfig(**settings))

    for task, names in CLASSES.items():
        (tmp_path / f"{task}.txt").write_text("\n".join(names))
    calibration = {
        "files": {task: str(tmp_path / "pictures" / task) for task in "ab"},
        "classes": {task: str(tmp_path / f"{task}.txt") for task in "ab"},
        "batch_size": 2,
    }
    models = [str(tmp_path / f"{task}.pt") for task in "ab"]
    recipe = {"base_model": str(tmp_path / "base"), "models": models, "tasks": ["a", "b"]}
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump({**recipe, "calibration": calibration, "parameters": {**settings, "streamed": True}})
    )
    done = CliRunner().invoke(app, ["merge", str(tmp_path / "recipe.yaml"), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    loaded, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    for name, tensor in expected.state_dict().items():
        assert_alike(loaded.state_dict()[name].float(), tensor, name)


@pytest.mark.parametrize("name", ["ViT", "ViT of SigLIP", "ResNet"], indirect=True)
def test_accuracy_is_that_of_open_clips_own_classifier(name, tmp_path):
    save_folder(tmp_path, name)
    folder, kinds = f"local-dir:{tmp_path / 'base'}", CLASSES["a"]
    model, _, preprocess = open_clip.create_model_and_transforms(folder)
    tokenizer, templates = open_clip.get_tokenizer(folder), [template.format for template in TEMPLATES]
    head = open_clip.build_zero_shot_classifier(model.eval(), tokenizer, kinds, templates)
    torch.manual_seed(0)
    right = []
    for number, kind in enumerate(kinds):
        (tmp_path / "a" / kind.replace(" ", "_")).mkdir(parents=True)
        for i in range(12):
            picture = Image.fromarray(torch.randint(256, (40, 33, 3), dtype=torch.uint8).numpy())
            picture.save(tmp_path / "a" / kind.replace(" ", "_") / f"{i}.png")
            with torch.no_grad():
                logits = model.encode_image(preprocess(picture)[None], normalize=True) @ head
            right.append(logits.argmax().item() == number)
    assert 0 < sum(right) < len(right)
    (tmp_path / "classes.txt").write_text("\n".join(kinds))
    (tmp_path / "templates.txt").write_text("\n".join(TEMPLATES))
    files = {"classes": {"a": tmp_path / "classes.txt"}, "templates": {"a": tmp_path / "templates.txt"}}
    assert evaluate(tmp_path / "base", {"a": tmp_path / "a"}, **files)["a"].accuracy == pytest.approx(sum(right) / len(right))


@pytest.mark.parametrize("name", ["ViT"], indirect=True)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_cfg": {"hf_model_name": "roberta-base"}}, "its text tower is of the hub"),
        ({"text_cfg": {**TEXT, "layers": 10**6}}, "layers is 1000000, and the folder has"),
        ({"vision_cfg": {**VIT, "patch": 3}}, "open_clip makes no model of"),
        ({"vision_cfg": {**VIT, "width": 24}}, "the packed layer is"),
    ],
)
def test_configurations_that_make_no_model_are_refused(name, tmp_path, change, message):
    save_folder(tmp_path, name)
    path = tmp_path / "base" / "open_clip_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({"model_cfg": {**config["model_cfg"], **change}}))
    with pytest.raises(ValueError, match=message):
        model = FolderModel.of(tmp_path / "base", {task: tmp_path / f"{task}.pt" for task in "ab"})
        packed = sm.PackedWeights.from_folders(model.base, model.experts, conversion=model.conversion)
        sm.average(packed, module=model.module)


@pytest.mark.parametrize("name", ["ViT"], indirect=True)
def test_another_tokenizer_is_refused(name, tmp_path):
    save_folder(tmp_path, name)
    with pytest.raises(ValueError, match="whose tokenizer is its own"):
        FolderModel.of(tmp_path / "base", {"a": tmp_path / "a.pt"}, tokenizer=sm.TokenizerConfig("union"))


@pytest.mark.parametrize("name", ["ResNet"], indirect=True)
def test_statistics_are_estimated_anew(name):
    """Those of the first layer are the moments of what the first convolution gives."""
    base, _, tokenizer = made(name)
    experts = {task: fine_tuned(base, seed) for seed, task in enumerate("ab", 1)}
    heads = {task: zero_shot_head(base, tokenizer, classes) for task, classes in CLASSES.items()}
    batches = {task: [torch.randn(4, 3, 32, 32)] for task in "ab"}
    merged = sm.task_arithmetic(sm.PackedWeights.from_modules(base, experts), module=copy.deepcopy(base))
    result = sm.reestimate_batchnorm(merged, batches, zero_shot_classification(heads))
    with torch.no_grad():
        given = result.module.visual.conv1(torch.cat([batches["a"][0], batches["b"][0]])).double()
    assert_alike(result.state_dict()["visual.bn1.running_mean"], given.mean((0, 2, 3)))
    assert_alike(result.state_dict()["visual.bn1.running_var"], given.var((0, 2, 3), correction=0))
