"""Tensors of every type, model folders to read, and their comparison bit by bit."""

from pathlib import Path

import torch

from samerge_ext.checkpoints.files import SAFETENSORS_DTYPES
from samerge_ext.checkpoints.folder import open_checkpoint

DTYPES = list(SAFETENSORS_DTYPES.values())


def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {"w": torch.randn(7, 5), "b": torch.randn(7), "scale": torch.randn(()), "none": torch.empty(0, 3)}


def sample(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Random bytes as a tensor of any type."""
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    return torch.randint(high, (nbytes,), dtype=torch.uint8).view(dtype).reshape(shape)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality of type, shape and bits: of NaNs too, and of types that torch cannot compare."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def read_all(path) -> dict[str, torch.Tensor]:
    with open_checkpoint(path) as checkpoint:
        tensors = {name: checkpoint.read(name) for name in checkpoint.names}
        for name, tensor in tensors.items():
            assert checkpoint.shape(name) == tensor.shape, name
            assert checkpoint.dtype(name) == tensor.dtype, name
    return tensors


def assert_same(found: dict, expected: dict):
    assert set(found) == set(expected)
    for name in expected:
        assert same_bytes(found[name], expected[name]), name


def save_bert(folder: Path) -> Path:
    """A tiny BertForMaskedLM as transformers saves it, in several shards; its decoder is tied to its embeddings."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertForMaskedLM(BertConfig(vocab_size=99, **sizes)).save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder
