"""Tiny language models in folders whose tokenizers know some words, and what rows a merged model is to have."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

WIDTH = 8
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MATRICES = (*(f"self_attn.{name}_proj" for name in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
NORMS = ("model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight", "model.norm.weight")
LAYERS = {**{f"model.layers.0.{name}.weight": (WIDTH, WIDTH) for name in MATRICES}, **dict.fromkeys(NORMS, (WIDTH,))}


def numbered(words: list[str] | dict[str, int]) -> dict[str, int]:
    return words if isinstance(words, dict) else {word: number for number, word in enumerate(words)}


def write_tokenizer(
    folder: Path, words: list[str] | dict[str, int], added: tuple[str, ...] = (), template: str | None = None
) -> None:
    """A tokenizer.json that transformers loads; words that are added are special tokens."""
    numbers = numbered(words)
    own = {word: number for word, number in numbers.items() if word not in added}
    flags = {"single_word": False, "lstrip": False, "rstrip": True, "normalized": False, "special": True}
    entries = [{"id": numbers[word], "content": word, **flags} for word in added]
    model = {"type": "WordLevel", "vocab": own, "unk_token": next(iter(own))}
    content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": entries, "normalizer": None,
               "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None, "model": model}  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    decoder = {str(numbers[word]): {"content": word, **flags} for word in added}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": decoder, "unk_token": next(iter(own))}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | ({"chat_template": template} if template else {})))


def write_model(
    folder: Path,
    words: list[str] | dict[str, int],
    rows: int | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
    added: tuple[str, ...] = (),
) -> dict[str, torch.Tensor]:
    """Its tensors; ``rows`` of the embeddings, one for each word by default."""
    rows = max(numbered(words).values()) + 1 if rows is None else rows
    generator = torch.Generator().manual_seed(seed)
    shapes = {EMBEDDINGS: (rows, WIDTH), **LAYERS} | ({} if tied else {HEAD: (rows, WIDTH)})
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    write_tokenizer(folder, words, added)
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": rows, "tie_word_embeddings": tied}
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": WIDTH}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(config | sizes))
    return tensors


def rows_of(words: list[str] | dict[str, int], tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The row of every word that has one, in fp64."""
    return {word: tensor[number].double() for word, number in numbered(words).items() if number < len(tensor)}


def completed(tokens: list[str], models: list[dict[str, torch.Tensor]], missing: str = "base") -> list[dict[str, torch.Tensor]]:
    """The rows of every model, the first of which is the base, with those of the tokens that it lacks."""
    found = []
    for model in models:
        rows = {}
        for token in tokens:
            having = [other[token] for other in models if token in other]
            if token in model:
                rows[token] = model[token]
            elif missing == "base" and token in models[0]:
                rows[token] = models[0][token]
            elif having:
                rows[token] = sum(having) / len(having)
            else:
                rows[token] = torch.zeros(WIDTH, dtype=torch.float64)
        found.append(rows)
    return found
