"""Adapters of PeftModels and of folders, merged into one: beside PEFT's own factors in fp64, and where no adapter is exact."""

import copy

import pytest
import torch
from helpers import assert_close

import samerge_ext as sm
from samerge_ext.checkpoints.reading import CheckpointError
from samerge_ext.integrations.peft import merge_adapters, save_merged

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
GPT2 = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "tie_word_embeddings": False}
CONFIG = sm.SAMergingConfig(steps=2, learning_rate=0.1, progress=False)
TASKS = ("news", "default")


def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, intermediate_size=24)).eval()


def gpt2():
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)).eval()


def resnet():
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"}
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes)).eval()


MODELS = {
    "llama": (llama, {"r": 2, "target_modules": ["q_proj", "up_proj"]}, {"r": 3, "target_modules": ["q_proj", "o_proj"]}),
    "gpt2": (gpt2, {"r": 2, "target_modules": ["c_attn", "wte"]}, {"r": 2, "target_modules": ["wte"]}),
    "resnet": (resnet, {"r": 2, "target_modules": ["convolution"]}, {"r": 2, "target_modules": ["convolution"]}),
}


def with_adapters(make, *settings):
    """A PeftModel whose adapters, all of whose factors are random, are TASKS."""
    base = make()
    kinds = [peft.LoraConfig(lora_alpha=5, use_rslora=i == 0, init_lora_weights=False, **each) for i, each in enumerate(settings)]
    for config in kinds:
        config.fan_in_fan_out = "c_attn" in config.target_modules
    model = peft.get_peft_model(base, kinds[0], adapter_name=TASKS[0])
    model.add_adapter(TASKS[1], kinds[1])
    return model.eval()


def data(make):
    torch.manual_seed(1)
    if make is resnet:
        batches = {task: [{"pixel_values": torch.randn(2, 3, 32, 32)}] for task in TASKS}
        return batches, sm.models.image_classification
    batches = {task: [{"input_ids": torch.randint(32, (2, 6)), "attention_mask": torch.ones(2, 6).long()}] for task in TASKS}
    return batches, sm.models.causal_lm


def merged_by_peft(make, model, result):
    """The base in fp64 plus λ times what PEFT itself says that an adapter adds to a layer."""
    expected = make().double()
    for name, part in model.named_modules():
        if not hasattr(part, "get_delta_weight"):
            continue
        module = name.removeprefix("base_model.model.")
        layer = result.packed.layout.names.index(f"{module}.weight")
        for task, weight in zip(result.packed.tasks, result.coefficients[:, layer].tolist(), strict=True):
            if task in part.scaling:
                expected.get_parameter(f"{module}.weight").data += weight * part.get_delta_weight(task).detach()
    return expected


@pytest.mark.parametrize("family", list(MODELS))
def test_a_merged_adapter_is_the_learned_sum(family, tmp_path):
    make, *settings = MODELS[family]
    model, (batches, logits) = with_adapters(make, *settings), data(make)
    before = copy.deepcopy(model).double()
    result = merge_adapters(model, batches, logits, config=CONFIG)
    assert result.packed.tasks == TASKS and result.coefficients.std() > 0.01
    assert save_merged(result, tmp_path / "merged")
    loaded = peft.PeftModel.from_pretrained(make().double(), tmp_path / "merged").double().eval()
    expected = merged_by_peft(make, before, result)
    batch = {name: t.double() if t.is_floating_point() else t for name, t in batches["news"][0].items()}
    with torch.no_grad():
        assert_close(loaded(**batch).logits.float(), expected(**batch).logits, "logits of the adapter")
        assert_close(result.module(**batches["news"][0]).logits, expected(**batch).logits, "logits of the merged module")


def test_folders_give_what_the_model_in_memory_does(tmp_path):
    make, *settings = MODELS["llama"]
    model, (batches, logits) = with_adapters(make, *settings), data(make)
    model.save_pretrained(tmp_path)
    folders = {"news": tmp_path / "news", "default": tmp_path}
    other = merge_adapters(make(), batches, logits, adapters=folders, config=CONFIG)
    assert torch.equal(other.coefficients, merge_adapters(model, batches, logits, config=CONFIG).coefficients)


def test_where_no_adapter_is_exact_the_whole_model_is_written(tmp_path):
    kinds = {"r": 2, "target_modules": ["q_proj"]}, {"r": 2, "target_modules": ["q_proj"], "use_dora": True}
    model, (batches, logits) = with_adapters(llama, *kinds), data(llama)
    result = merge_adapters(model, batches, logits, config=CONFIG)
    with pytest.warns(UserWarning, match="adapters change 'model.layers.0.self_attn.q_proj.weight' by something else than two"):
        assert not save_merged(result, tmp_path / "merged")
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert_close(loaded(**batches["news"][0]).logits, result.module(**batches["news"][0]).logits.double(), "logits")


def test_what_is_refused_leaves_the_model_as_it_was(tmp_path):
    make, *settings = MODELS["llama"]
    batches, logits = data(make)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no adapters; give a PeftModel, or adapters="):
        merge_adapters(make(), batches, logits)
    model = with_adapters(make, *settings)
    with pytest.raises(ValueError, match="news"):
        merge_adapters(model, {"default": batches["default"]}, logits)
    assert any("lora_A" in name for name, _ in model.named_parameters())
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    with pytest.raises(CheckpointError, match="taken"):
        save_merged(merge_adapters(model, batches, logits, config=CONFIG), tmp_path / "taken")
