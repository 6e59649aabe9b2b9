"""The shapes of real models' parameter tensors, in named_parameters() order: what a layer map looks like in practice.

Most of a transformer's layers are biases and norms of less than one block of 1,024 numbers; nearly all numbers are in matrices.
"""

from __future__ import annotations

Shape = tuple[int, ...]


def _linear(rows: int, columns: int) -> list[Shape]:
    return [(rows, columns), (rows,)]


def _norm(width: int) -> list[Shape]:
    return [(width,), (width,)]


def clip_vision(width: int, layers: int, patch: int, image: int = 224) -> list[Shape]:
    """transformers' CLIPVisionModel."""
    embeddings = [(width,), (width, 3, patch, patch), ((image // patch) ** 2 + 1, width)]
    layer = 4 * _linear(width, width) + _norm(width) + _linear(4 * width, width) + _linear(width, 4 * width) + _norm(width)
    return embeddings + _norm(width) + layers * layer + _norm(width)


def bert(width: int, layers: int, vocabulary: int, positions: int = 512) -> list[Shape]:
    """transformers' BertModel."""
    embeddings = [(vocabulary, width), (positions, width), (2, width), *_norm(width)]
    mlp = _linear(4 * width, width) + _linear(width, 4 * width)
    return embeddings + layers * (4 * _linear(width, width) + _norm(width) + mlp + _norm(width)) + _linear(width, width)


def llama_layer(width: int, mlp: int, keys: int | None = None) -> list[Shape]:
    """One decoder layer of transformers' LlamaModel. keys: the rows of its keys and values, where heads share them."""
    shared = (keys or width, width)
    return [(width, width), shared, shared, (width, width)] + 2 * [(mlp, width)] + [(width, mlp), (width,), (width,)]


def llama(width: int, layers: int, mlp: int, keys: int, vocabulary: int) -> list[Shape]:
    """transformers' LlamaForCausalLM with tied embeddings."""
    return [(vocabulary, width), *(layers * llama_layer(width, mlp, keys)), (width,)]


def matrices(numbers: int) -> list[Shape]:
    """`numbers` in matrices of 768 by 768, the last layer shorter."""
    whole, rest = divmod(numbers, 768 * 768)
    return whole * [(768, 768)] + ([(rest,)] if rest else [])


MODELS: dict[str, list[Shape]] = {
    "MiniLM": bert(384, 6, 30522),
    "ViT-B/32": clip_vision(768, 12, 32),
    "88M": matrices(88_000_000),
    "Llama-7B layer": llama_layer(4096, 11008),
    "Llama-3.2-1B": llama(2048, 16, 8192, 512, 128256),
    "ViT-L/14": clip_vision(1024, 24, 14),
    "1B": matrices(1_000_000_000),
    "tiny": bert(32, 1, 100, 20),
}
