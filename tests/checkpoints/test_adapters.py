"""LoRA adapters as experts: what they make of the base, what is refused, teachers."""

import json

import pytest
import tiny
import torch
from helpers import assert_close
from safetensors.torch import save_file

import samerge_ext as sm
from samerge_ext.checkpoints.adapter_tensors import PREFIX

RANK, ALPHA = 2, 6


@pytest.fixture
def base():
    return tiny.make(0, torch.float32)


@pytest.fixture
def write(base, tmp_path):
    """Writes the base's folder and an adapter's; returns both."""

    def write(tensors, **config):
        for folder in ("base", "adapter"):
            (tmp_path / folder).mkdir(exist_ok=True)
        weights = {n: t.clone() for n, t in base.state_dict().items() if n != "tied.weight"}
        save_file(weights, tmp_path / "base/model.safetensors")
        save_file({PREFIX + name: tensor for name, tensor in tensors.items()}, tmp_path / "adapter/adapter_model.safetensors")
        settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, **config}
        (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(settings))
        return tmp_path / "base", {"red": tmp_path / "adapter"}

    return write


def factors(module, out, width, seed=0, names=("lora_A.weight", "lora_B.weight")):
    torch.manual_seed(seed)
    first, second = torch.randn(RANK, width), torch.randn(out, RANK)
    return {f"{module}.{names[0]}": first, f"{module}.{names[1]}": second}, second @ first


def row(packed):
    return packed.layout.views(packed.task_vectors[0])


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({}, ALPHA / RANK),
        ({"use_rslora": True}, ALPHA / RANK**0.5),
        ({"alpha_pattern": {"second": 1}}, 1 / RANK),
        ({"alpha_pattern": {"econd": 1}}, ALPHA / RANK),
    ],
)
def test_an_adapter_is_the_base_and_its_scaled_product(base, write, config, scaling):
    tensors, product = factors("second", 16, 8)
    tensors["first.bias"] = torch.ones(8)
    packed = sm.PackedWeights.from_folders(*write(tensors, **config))
    views = row(packed)
    assert set(views) == {"second.weight", "first.bias"}, "the rest is the base's"
    assert_close(base.second.weight + views["second.weight"], (base.second.weight + scaling * product).double())
    assert_close(views["first.bias"], (1 - base.first.bias).double())


def test_layers_that_store_their_weight_the_other_way(base, write):
    tensors, product = factors("second", 8, 16)
    packed = sm.PackedWeights.from_folders(*write(tensors, fan_in_fan_out=True))
    assert_close(base.second.weight + row(packed)["second.weight"], (base.second.weight + 3 * product.T).double())
    tensors, product = factors("second", 8, 16, names=("lora_embedding_A", "lora_embedding_B"))
    packed = sm.PackedWeights.from_folders(*write(tensors))
    assert_close(base.second.weight + row(packed)["second.weight"], (base.second.weight + 3 * product.T).double())


def test_a_quantised_adapters_teacher_is_the_adapter_itself(base, write):
    tensors, product = factors("second", 16, 8)
    packed = sm.PackedWeights.from_folders(*write(tensors), task_vector_dtype="int4")
    with sm.MergedModel(tiny.make(1, torch.float32), packed).teacher("red") as teacher:
        assert_close(teacher.second.weight, (base.second.weight + 3 * product).double())


def test_an_adapters_own_head_is_a_head(write):
    tensors, _ = factors("second", 16, 8)
    packed = sm.PackedWeights.from_folders(*write({**tensors, "head.weight": torch.ones(3, 8)}), heads="head.*")
    assert torch.equal(packed.heads["red"]["head.weight"], torch.ones(3, 8))


def test_what_is_no_lora_adapter_of_this_base_is_refused(write):
    tensors, _ = factors("second", 16, 8)
    others, _ = factors("third", 16, 8)
    wide, _ = factors("second", 16, 9)
    cases = [
        (tensors, {"peft_type": "IA3"}, "is a IA3 adapter"),
        (others, {}, r"base .*lacks 'third.weight'; is it an adapter of this base"),
        (wide, {}, r"\[16, 2\] · \[2, 9\] do not make a change of 'second.weight' \[16, 8\]"),
        ({"second.lora_A.weight": torch.ones(2, 8)}, {}, "'base_model.model.second.lora_B.weight' is missing"),
        ({**tensors, "second.lora_magnitude_vector": torch.ones(8)}, {}, "lora_magnitude_vector' is DORA of no linear layer"),
        ({**tensors, "head.weight": torch.ones(3, 8)}, {}, r"has, and base .* lacks, 'head.weight'.*head\.\*"),
    ]
    for held, config, message in cases:
        with pytest.raises(ValueError, match=message):
            sm.PackedWeights.from_folders(*write(held, **config))
