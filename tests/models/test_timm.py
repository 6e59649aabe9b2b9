"""Classifiers of timm: their own logits, transforms and heads, without an adapter.

It is run with open_clip's tests, by `make test-open-clip`.
"""

import copy

import pytest
import torch
from helpers import assert_alike
from torch.func import functional_call

import samerge_ext as sm
from samerge_ext.models import find_pictures, picture_batches

pytest.importorskip("transformers")
from families import move, save_pictures  # noqa: E402

timm = pytest.importorskip("timm", reason="timm is not installed: make test-open-clip")


def logits(module, batch, task):
    return module(batch["pixel_values"])


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit"])
def test_a_classifier_is_merged_on_pictures(name, tmp_path):
    """Running statistics are the average of the experts', and heads their own."""
    torch.manual_seed(0)
    base = timm.create_model(name, num_classes=2).eval()
    experts = {}
    for seed, (task, classes) in enumerate({"a": 3, "b": 2}.items(), 1):
        experts[task] = copy.deepcopy(base)
        experts[task].reset_classifier(classes)
        move(experts[task], seed, by=0.01)
        for buffer in experts[task].buffers():
            if buffer.is_floating_point():
                buffer += 0.1 * torch.rand_like(buffer)
    head = next(name for name, part in base.named_modules() if part is base.get_classifier())
    save_pictures(tmp_path)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=base))
    batches = {task: picture_batches(find_pictures(tmp_path / task), transform, batch_size=2) for task in experts}

    packed = sm.PackedWeights.from_modules(base, experts, heads=f"{head}.*")
    config = sm.SAMergingConfig(steps=2, learning_rate=0.1, progress=False)
    result = sm.samerging(copy.deepcopy(base), packed, batches, logits, config=config)
    coefficients = result.summary()["coefficients"]
    tuned = {task: expert.state_dict() for task, expert in experts.items()}
    for task, expert in experts.items():
        tensors = {layer: tensor.double() for layer, tensor in expert.state_dict().items()}  # the head, and the rest replaced
        for layer, tensor in base.state_dict().items():
            if layer in coefficients["a"]:
                change = sum(coefficients[each][layer] * (tuned[each][layer].double() - tensor) for each in tuned)
                tensors[layer] = tensor.double() + change
            elif layer.endswith(("running_mean", "running_var")):
                tensors[layer] = torch.stack([tuned[each][layer].double() for each in tuned]).mean(0)
        pixels = batches[task][0]["pixel_values"]
        with torch.no_grad():
            truth = functional_call(copy.deepcopy(expert).double(), tensors, (pixels.double(),))
            result.module.reset_classifier(truth.shape[1])
            result.module.load_state_dict({**result.state_dict(), **result.heads[task]})
            assert_alike(result.module(pixels), truth, task)
