"""Adapters whose modules transformers calls otherwise than their base's folder, and of tied embeddings."""

import pytest
import torch

import samerge_ext as sm

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def adapt(folder, model, **config):
    """Saves the model and a random LoRA adapter on it; the adapted model."""
    model.save_pretrained(folder / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, **config))
    adapted.save_pretrained(folder / "a")
    return adapted


def read(folder):
    packed = sm.PackedWeights.from_folders(folder / "base", {"a": folder / "a"})
    return sm.task_arithmetic(packed, 1.0).state_dict()


def test_an_adapter_has_the_modules_names_and_its_base_older_ones(tmp_path):
    """Those of ViT: transformers 5 calls vit.encoder.layer.0.attention.attention.query vit.layers.0.attention.q_proj."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3))
    adapt(tmp_path, model, target_modules="all-linear")
    fresh = transformers.ViTForImageClassification.from_pretrained(tmp_path / "base")
    expected = tmp_path / "expected"
    peft.PeftModel.from_pretrained(fresh, tmp_path / "a").merge_and_unload().save_pretrained(expected)
    found = read(tmp_path)
    packed = sm.PackedWeights.from_folders(tmp_path / "base", {"x": expected})
    for name, tensor in sm.task_arithmetic(packed, 1.0).state_dict().items():
        torch.testing.assert_close(found[name], tensor)


def test_factors_of_embeddings_and_of_the_head_tied_to_them_count_once(tmp_path):
    """peft's ensure_weight_tying stores both; its merge_and_unload() would add them both to the one tensor."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 12}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=True)).eval()
    adapted = adapt(tmp_path, model, target_modules=["embed_tokens"], ensure_weight_tying=True).eval()
    expected = adapted(torch.arange(8)[None]).logits
    own = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    own.load_state_dict(read(tmp_path), strict=False)
    torch.testing.assert_close(own(torch.arange(8)[None]).logits, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
