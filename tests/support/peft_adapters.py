"""Tiny models, adapters of them as the real PEFT saves them, and what PEFT makes of these."""

import json
import warnings
from functools import partial

import pytest
import torch
from helpers import assert_close

import samerge_ext as sm

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
transformers.logging.disable_progress_bar()

SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
GPT2 = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
T5 = transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)


def llama(**settings):
    config = transformers.LlamaConfig(**SIZES, intermediate_size=24, num_key_value_heads=1, **settings)
    return transformers.LlamaForCausalLM(config)


def bert():
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, intermediate_size=24, num_labels=3))


def gpt2(kind=transformers.GPT2LMHeadModel):
    return kind(transformers.GPT2Config(**GPT2, num_labels=3, pad_token_id=0))


def resnet():
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"}
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes))


# A model, the layers of it that an adapter may target, and the modules that it may save whole.
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
MODELS = {
    "llama": (llama, [*ATTENTION, "embed_tokens", "lm_head"], ["lm_head", "embed_tokens"]),
    "tied llama": (partial(llama, tie_word_embeddings=True), [*ATTENTION, "embed_tokens", "lm_head"], ["embed_tokens"]),
    "bert": (bert, ["query", "key", "value", "dense", "word_embeddings"], ["classifier"]),
    "gpt2": (gpt2, ["c_attn", "c_proj", "c_fc", "wte"], ["ln_f"]),
    "gpt2 classifier": (partial(gpt2, transformers.GPT2ForSequenceClassification), ["attn.c_proj", "c_fc", "score"], ["score"]),
    "resnet": (resnet, ["convolution", "classifier.1"], ["classifier"]),
}


def write_models(folder):
    """A folder for each model."""
    for name, (make, _, _) in MODELS.items():
        torch.manual_seed(0)
        make().eval().save_pretrained(folder / name)
    return folder


def load(folder):
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, architecture).from_pretrained(folder)


def write(base, folder, config, seed=0):
    """Saves an adapter whose trained tensors were all moved."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(load(base), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder)


def merged_by_peft(base, folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(load(base), folder, **options).merge_and_unload()


def packed_of(base, folder, form=None):
    """The adapter's model as it is packed."""
    packed = sm.PackedWeights.from_folders(base, {"one": folder}, task_vector_dtype=form)
    packed = packed.in_memory()
    return packed.state_dict(packed.merge(packed.coefficients(1.0)))


def assert_is_pefts(found, base, folder):
    truth = merged_by_peft(base, folder).state_dict()
    for name in found:
        assert_close(found[name].float(), truth[name].double(), name)
