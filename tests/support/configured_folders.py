"""Folders of models that have a configuration and a tokenizer, and what is said of them before they are merged."""

import json
import warnings

from samerge_ext.checkpoints.compatibility import CompatibilityWarning, check_models

# Configurations as they lie on the hub, in what is compared or may differ.
LLAMA3 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 128000, "eos_token_id": 128001,
    "hidden_act": "silu", "hidden_size": 4096, "max_position_embeddings": 8192, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.40.0.dev0",
    "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
BERT = {
    "architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.1, "gradient_checkpointing": False,
    "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768, "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512, "model_type": "bert", "num_attention_heads": 12, "num_hidden_layers": 12,
    "pad_token_id": 0, "position_embedding_type": "absolute", "transformers_version": "4.6.0.dev0", "vocab_size": 30522,
}  # fmt: skip
QWEN = {
    "architectures": ["Qwen2ForCausalLM"], "bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu",
    "hidden_size": 3584, "max_position_embeddings": 131072, "max_window_layers": 28, "model_type": "qwen2",
    "num_attention_heads": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_mrope": False,
    "use_sliding_window": False, "vocab_size": 152064,
}  # fmt: skip
GEMMA3 = {
    "model_type": "gemma3", "eos_token_id": [1, 106], "image_token_index": 262144, "mm_tokens_per_image": 256,
    "text_config": {"hidden_size": 2560, "model_type": "gemma3_text", "num_attention_heads": 8, "rope_theta": 1000000.0,
                    "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "rope_local_base_freq": 10000.0,
                    "sliding_window": 1024},
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model", "num_attention_heads": 16, "patch_size": 14},
}  # fmt: skip
CLIP = {
    "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 512,
    "text_config": {"model_type": "clip_text_model", "num_attention_heads": 8, "hidden_act": "quick_gelu", "eos_token_id": 2},
    "vision_config": {"model_type": "clip_vision_model", "num_attention_heads": 12, "hidden_act": "quick_gelu", "image_size": 224,
                      "patch_size": 32},
}  # fmt: skip
WORDS = [f"word{i}" for i in range(400)]


def fast(words, added=(), **keys):
    """A tokenizer.json."""
    vocabulary = {word: number for number, word in enumerate(words)}
    tokens = [{"id": len(words) + i, "content": content, "special": True} for i, content in enumerate(added)]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": tokens,
            "model": {"type": "WordPiece", "vocab": vocabulary}, **keys}  # fmt: skip


def pieces(words):
    """A sentencepiece model: a message of messages with a string and a score, then another field."""
    encoded = [b"\x0a" + bytes([len(word)]) + word.encode() + b"\x15\0\0\0\0\x18\1" for word in words]
    return b"".join(b"\x0a" + bytes([len(piece)]) + piece for piece in encoded) + b"\x12\x02\x18\x01"


def write(folder, config=None, **files):
    """A folder of files: JSON of objects, else texts or bytes; a name has "__" in the place of its dot."""
    folder.mkdir(exist_ok=True)
    for file, content in {"config.json": config, **{key.replace("__", "."): value for key, value in files.items()}}.items():
        if isinstance(content, bytes):
            (folder / file).write_bytes(content)
        elif content is not None:
            (folder / file).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def warned(base, experts, heads=()):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_models(base, list(experts.items()), heads)
    assert all(issubclass(one.category, CompatibilityWarning) for one in caught)
    return [str(one.message) for one in caught]
