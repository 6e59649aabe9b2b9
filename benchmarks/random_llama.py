"""Models of Llama's shape with random weights, and experts of theirs: packed, on `meta`, in memory or in a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from samerge_ext import PackedWeights
from samerge_ext.checkpoints.files import SAFETENSORS_CODES
from samerge_ext.models import parameters_on_meta
from samerge_ext.packing.layout import Layout
from samerge_ext.packing.packed_file import PackedFileWriter, rows_of
from samerge_ext.packing.quantised import FORMATS, QuantisedTaskVectors

ALIASES = {"lm_head.weight": "model.embed_tokens.weight"}


@dataclass(frozen=True)
class Shape:
    """dtype: of the base, and of what is merged. batch, tokens: of a task's calibration batch. groups: of heads that share keys
    and values, as many as heads by default."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    dtype: torch.dtype
    experts: int
    batch: int
    tokens: int
    groups: int | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(f"task{t}" for t in range(self.experts))


SHAPES = {
    "test": Shape(256, 704, 10, 4, 4096, torch.float32, 6, 2, 16),
    "SmolLM2-135M": Shape(576, 1536, 30, 9, 49152, torch.float32, 4, 2, 128, groups=3),
    "SmolLM2-135M-bf16": Shape(576, 1536, 30, 9, 49152, torch.bfloat16, 4, 2, 128, groups=3),
    "300M": Shape(1024, 2816, 20, 16, 32000, torch.float32, 8, 1, 32),
    "1B": Shape(2048, 5632, 22, 32, 32000, torch.float32, 8, 2, 128),
    "7B": Shape(4096, 11008, 32, 32, 32000, torch.bfloat16, 8, 2, 128),
}


def llama(shape: Shape, with_weights: bool = False):
    """The model, by default without memory for its weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.groups or shape.heads, vocab_size=shape.vocabulary,
        tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    if with_weights:
        torch.ones(32 << 20, dtype=torch.uint8)  # freed: from now on malloc puts weights up to this size into its heap
    with nullcontext() if with_weights else parameters_on_meta():
        return LlamaForCausalLM(config)


def packed_weights(shape: Shape, form: str, device: str) -> PackedWeights:
    """With weights in the CPU's memory, made on the device; or "meta": without."""
    layout = _layout(shape)
    kept_on = "meta" if device == "meta" else "cpu"
    base = torch.empty(layout.numel, dtype=shape.dtype, device=kept_on)
    if form in FORMATS:
        task_vectors = QuantisedTaskVectors.zeros(shape.experts, layout.numel, form, kept_on)
        rows = [base, *task_vectors.codes, *task_vectors.scales]
    else:
        task_vectors = torch.zeros(shape.experts, layout.numel, dtype=torch.bfloat16, device=kept_on)
        rows = [base, *task_vectors]
    if device != "meta":
        for layer, tensors in _layers(shape, form, layout, device):
            start, length = layout.extent(layer)
            for row, tensor in zip(rows, tensors, strict=True):
                per = layout.numel // len(row)
                place = row[start // per : (start + length) // per]
                place[: tensor.numel()] = tensor.reshape(-1)
                place[tensor.numel() :] = 0
    return PackedWeights(layout, shape.tasks, base, task_vectors, aliases=ALIASES)


def write_packed(path: Path, shape: Shape, form: str, device: str) -> None:
    """The same as a packed file, layer by layer; a real one is made from folders with PackedWeights.from_folders(file=)."""
    layout = _layout(shape)
    of_tasks = {f"{kind}/{t}": {} for kind in ("buffers", "heads") for t in range(shape.experts)}
    about = {
        "folder": str(path.parent),
        "experts": {},
        "form": form if form in FORMATS else None,
        "identity": {},
        "tasks": shape.tasks,
        "names": layout.names,
        "shapes": [list(each) for each in layout.shapes],
        "dtypes": [SAFETENSORS_CODES[each] for each in layout.dtypes],
        "packed": [True] * len(layout.names),
        "aliases": ALIASES,
        "small": {"unchanged": {}, "buffers": {}, **of_tasks},
    }
    rows = rows_of(shape.experts, shape.dtype, form if form in FORMATS else torch.bfloat16)
    writer = PackedFileWriter(path, layout, rows, {}, about)
    for layer, tensors in _layers(shape, form, layout, device):
        writer.write(layer, tensors)
    writer.finish()


def _layout(shape: Shape) -> Layout:
    layers = dict(llama(shape).named_parameters())
    dtypes = [shape.dtype] * len(layers)
    return Layout.build(list(layers), [p.shape for p in layers.values()], dtypes, [True] * len(layers))


def _layers(shape: Shape, form: str, layout: Layout, device: str) -> Iterator[tuple[int, list[Tensor]]]:
    """Layer by layer: base and task vectors, bf16 or codes and scales."""
    generator = torch.Generator(device).manual_seed(0)
    for layer, size in enumerate(layout.shapes):
        if len(size) == 1:
            base = torch.ones(size, dtype=shape.dtype)
        else:
            base = torch.randn(size, generator=generator, device=device).mul_(0.02).to(shape.dtype)
        # Random numbers are dear: task vectors are one draw, turned, with a different sign pattern for every task.
        draw = torch.randn(size.numel(), generator=generator, device=device).mul_(0.004).to(torch.bfloat16)
        task_vectors = [draw.roll(977 * t) * (-1) ** t for t in range(shape.experts)]
        if form in FORMATS:
            codes = QuantisedTaskVectors.zeros(shape.experts, layout.extent(layer)[1], form, device)
            for t, task_vector in enumerate(task_vectors):
                codes.write(t, 0, task_vector)
            task_vectors = [*codes.codes, *codes.scales]
        yield layer, [base, *task_vectors]
