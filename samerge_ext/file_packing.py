"""Packing model folders into a packed file, and opening one as packed weights."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from samerge_ext.checkpoint_files import SAFETENSORS_DTYPES
from samerge_ext.layout import Layout
from samerge_ext.packed_file import CODES, PackedFile, PackedFileWriter, file_numbers
from samerge_ext.quantised import empty_task_vectors
from samerge_ext.sources import matches
from samerge_ext.validation import check_sources

if TYPE_CHECKING:
    from samerge_ext.packing import PackedWeights

SUFFIXES = (".safetensors", ".bin", ".json")  # of the files that a model folder's weights may be in


def open_packed(
    kind: type[PackedWeights], file: Path, device: torch.device, verify: bool, made_from: dict | None
) -> PackedWeights | None:
    """See `PackedWeights.open`."""
    opened = PackedFile(file)
    about = opened.about
    if made_from is not None and about["identity"] != made_from:
        opened.close()
        return None
    if verify:
        opened.verify()
    layout = Layout.build(
        about["names"],
        [torch.Size(shape) for shape in about["shapes"]],
        [SAFETENSORS_DTYPES[code] for code in about["dtypes"]],
        about["packed"],
        device,
    )
    tasks = tuple(about["tasks"])
    base, task_vectors = file_numbers(opened, len(tasks), device)
    small = {key: {name: opened.read(body) for name, body in names.items()} for key, names in about["small"].items()}
    return kind(
        layout=layout,
        tasks=tasks,
        base=base,
        task_vectors=task_vectors,
        unchanged={name: tensor.to(device) for name, tensor in small["unchanged"].items()},
        aliases=about["aliases"],
        buffers=small["buffers"],
        expert_buffers={task: small[f"buffers/{t}"] for t, task in enumerate(tasks)},
        heads={task: small[f"heads/{t}"] for t, task in enumerate(tasks)},
        folder=Path(about["folder"]),
    )


def pack_into_file(path: Path, about: dict, base, experts, dtype, task_vector_dtype, heads) -> None:
    """Packs layer by layer into a packed file: what is held is one layer, and all that is no layer."""
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    task_vector_dtype = task_vector_dtype or dtype
    changed = check_sources(base, experts, heads, dtype, task_vector_dtype)
    layers = [name for name in base.names if not (base.is_buffer(name) or matches(name, heads))]
    shapes, dtypes, packed = [base.shape(n) for n in layers], [base.dtype(n) for n in layers], [n in changed for n in layers]
    layout = Layout.build(layers, shapes, dtypes, packed)
    buffers = {n: base.read(n) for n in base.names if base.is_buffer(n) and not matches(n, heads)}
    small = {"unchanged": {n: base.read(n).to(dtype) for n in layers if n not in changed}, "buffers": buffers}
    for t, (_, expert) in enumerate(experts):
        small[f"buffers/{t}"] = {n: expert.read(n) for n, buffer in buffers.items() if buffer.is_floating_point()}
        small[f"heads/{t}"] = {n: expert.read(n) for n in expert.names if matches(n, heads)}
    about = {
        **about,
        "tasks": [task for task, _ in experts],
        "names": layers,
        "shapes": [list(shape) for shape in shapes],
        "dtypes": [CODES[each] for each in dtypes],
        "packed": packed,
        "aliases": {alias: name for alias, name in base.aliases.items() if name in set(layers)},
        "small": {key: {name: f"{key}/{name}" for name in tensors} for key, tensors in small.items()},
    }
    bodies = {f"{key}/{name}": tensor for key, tensors in small.items() for name, tensor in tensors.items()}
    writer = PackedFileWriter(path, layout, len(experts), (dtype, task_vector_dtype), bodies, about)
    wide = torch.float64 if torch.float64 in (dtype, task_vector_dtype) else torch.float32
    try:
        for layer, name in enumerate(layers):
            if name in changed:
                pretrained = base.read(name).to(wide)
                task_vectors = (expert.read(name).to(wide) - pretrained for _, expert in experts)
                writer.write(layer, itertools.chain([pretrained], task_vectors))
        writer.finish()
    except BaseException:
        writer.abandon()
        raise


def described(kind: type[PackedWeights], base, experts, dtype, task_vector_dtype, heads, device) -> PackedWeights:
    """What packing would give, for a plan: layout and shapes from the headers, base and task vectors on `meta`.

    Every layer counts as changed. Values are read of heads and buffers alone.
    """
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    layers = [name for name in base.names if not (base.is_buffer(name) or matches(name, heads))]
    layout = Layout.build(layers, [base.shape(n) for n in layers], [base.dtype(n) for n in layers], [True] * len(layers), device)
    buffers = {n: base.read(n) for n in base.names if base.is_buffer(n) and not matches(n, heads)}
    return kind(
        layout=layout,
        tasks=tuple(task for task, _ in experts),
        base=torch.empty(layout.numel, dtype=dtype, device="meta"),
        task_vectors=empty_task_vectors(len(experts), layout.numel, task_vector_dtype or dtype, "meta"),
        aliases={alias: name for alias, name in base.aliases.items() if name in set(layers)},
        buffers=buffers,
        expert_buffers={task: {n: b for n, b in buffers.items() if b.is_floating_point()} for task, _ in experts},
        heads={task: {n: expert.read(n) for n in expert.names if matches(n, heads)} for task, expert in experts},
    )


def identity_of(folders: Sequence[Path], **settings) -> dict:
    """What a packed file was made from: every weight file's size and time of change."""
    found = {}
    for folder in map(Path, folders):
        files = (
            [folder] if folder.is_file() else sorted(f for f in folder.iterdir() if f.suffix in (".safetensors", ".bin", ".json"))
        )
        found[str(folder.resolve())] = {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in files}
    return {"folders": found, **{key: str(value) for key, value in settings.items()}}
