"""Folders of a base and of two LoRA experts of it, with the module that they are for."""

import json

import streaming
import torch
from safetensors.torch import save_file

from samerge_ext.checkpoints.adapter_tensors import PREFIX

WIDTH, BLOCKS, RANK, ALPHA = 48, 10, 3, 4


def module(seed=1, dtype=torch.float32):
    return streaming.make(seed, dtype, width=WIDTH, blocks=BLOCKS)


def adapter(base, seed):
    """Factors of all blocks' linear layers and of the tied embedding; the second one has a bias of its own."""
    torch.manual_seed(seed)
    tensors = {}
    for name in (f"blocks.{block}.{layer}" for block in range(BLOCKS) for layer in ("wide", "narrow")):
        out, width = base.get_parameter(f"{name}.weight").shape
        tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, width)
        tensors[f"{name}.lora_B.weight"] = 0.1 * torch.randn(out, RANK)
    vocabulary = base.embedding.num_embeddings
    tensors["embedding.lora_embedding_A"] = torch.randn(RANK, vocabulary)
    tensors["embedding.lora_embedding_B"] = 0.1 * torch.randn(WIDTH, RANK)
    if seed:
        tensors["blocks.1.wide.bias"] = torch.randn(2 * WIDTH)
    return {PREFIX + name: tensor for name, tensor in tensors.items()}


def write(path, dtype=torch.float32):
    """The base's folder and those of the tasks."""
    base = module(0, dtype)
    for folder in ("base", *streaming.TASKS):
        (path / folder).mkdir(parents=True)
    save_file({n: t.clone() for n, t in base.state_dict().items() if n != "head.weight"}, path / "base/model.safetensors")
    for seed, task in enumerate(streaming.TASKS):
        save_file(adapter(base, seed), path / task / "adapter_model.safetensors")
        settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}
        (path / task / "adapter_config.json").write_text(json.dumps(settings))
    return path / "base", {task: path / task for task in streaming.TASKS}
