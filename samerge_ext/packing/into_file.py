"""Packing model folders into a packed file, and opening one as packed weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samerge_ext.checkpoints.files import SAFETENSORS_CODES, SAFETENSORS_DTYPES
from samerge_ext.checkpoints.lora import model_and_adapter
from samerge_ext.checkpoints.reading import CheckpointError, cut
from samerge_ext.checkpoints.sources import Experts, Source
from samerge_ext.checkpoints.tokenizers import MergedTokenizer
from samerge_ext.packing.factors import LORA, FactoredTaskVectors, require_adapters
from samerge_ext.packing.in_pieces import InPieces
from samerge_ext.packing.into_memory import aligned, check_form, empty_task_vectors, outline, quantise, stored_dtype
from samerge_ext.packing.layout import Layout
from samerge_ext.packing.packed_file import PackedFile, PackedFileWriter, file_numbers, file_task_vectors, rows_of
from samerge_ext.packing.quantised import FORMATS, QuantisedTaskVectors
from samerge_ext.packing.validation import check_range, check_sources

SUFFIXES = (".safetensors", ".bin", ".json")  # of the files that a model folder's weights may be in


def open_packed(file: Path, device: torch.device, verify: bool) -> dict[str, Any]:
    """The fields of packed weights; see `PackedWeights.open`."""
    opened = PackedFile(file)
    with _blaming(opened):
        if verify:
            opened.verify()
        return _fields(opened, device)


def open_made_from(identity: dict, file: Path, device: torch.device) -> dict[str, Any] | None:
    """As `open_packed`; None, without reading on, where the file was made from something else."""
    opened = PackedFile(file)
    if opened.about.get("identity") != identity:
        opened.close()
        return None
    with _blaming(opened):
        opened.verify()
        return _fields(opened, device)


@contextmanager
def _blaming(opened: PackedFile) -> Iterator[None]:
    """Closes a file whose header does not tell of packed weights, or whose bodies are damaged."""
    try:
        yield
    except BaseException as error:
        opened.close()
        if isinstance(error, CheckpointError) or not isinstance(error, Exception) or isinstance(error, OSError):
            raise
        fault = cut(repr(error), 200)  # of many types, from a header of any values
        raise CheckpointError(f"{opened.path} holds no packed weights ({fault}); make it again from the folders") from error


def _fields(opened: PackedFile, device: torch.device) -> dict[str, Any]:
    about = opened.about
    numbers = sum(math.prod(shape) for shape, is_packed in zip(about["shapes"], about["packed"], strict=True) if is_packed)
    if numbers > opened.shape("base").numel():
        raise ValueError(f"its layers are of {numbers} numbers, its base of fewer")
    layout = Layout.build(
        about["names"],
        [torch.Size(shape) for shape in about["shapes"]],
        [SAFETENSORS_DTYPES[code] for code in about["dtypes"]],
        about["packed"],
        device,
    )
    tasks = tuple(about["tasks"])
    small = {key: {name: opened.read(body) for name, body in names.items()} for key, names in about["small"].items()}
    base = file_numbers(opened, "base", device)
    task_vectors: InPieces
    if about["form"] == LORA:
        factors = [small[f"factors/{t}"] for t in range(len(tasks))]
        task_vectors = FactoredTaskVectors.from_tensors(layout, factors, torch.promote_types(base.dtype, torch.float32))
    else:
        task_vectors = file_task_vectors(opened, len(tasks), device)
    return {
        "layout": layout,
        "tasks": tasks,
        "base": base,
        "task_vectors": task_vectors,
        "unchanged": {name: tensor.to(device) for name, tensor in small["unchanged"].items()},
        "aliases": about["aliases"],
        "buffers": small["buffers"],
        "expert_buffers": {task: small[f"buffers/{t}"] for t, task in enumerate(tasks)},
        "heads": {task: small[f"heads/{t}"] for t, task in enumerate(tasks)},
        "folder": Path(about["folder"]),
        "inputs": about["identity"].get("folders", {}),
        "experts": {task: Path(path) for task, path in about["experts"].items()} if about["form"] in FORMATS else {},
        "places": about["experts"],
        "tokenizer": MergedTokenizer.from_json(about["tokenizer"]) if about.get("tokenizer") else None,
    }


def pack_into_file(
    path: Path,
    about: dict,
    base: Source,
    experts: Experts,
    dtype: torch.dtype,
    task_vector_dtype: torch.dtype | str | None,
    heads: str | Sequence[str],
    keep: str | Sequence[str],
    device: torch.device,
) -> dict[str, Any]:
    """Packs layer by layer into a packed file: what is held is one layer, all that is no layer, and LoRA factors where these
    are kept. Returns as `open_packed`."""
    form = task_vector_dtype or dtype
    models = aligned(base, experts, heads, keep, about["folder"])
    base, experts = models.base, models.experts
    check_form(form, experts)
    changed = check_sources(base, experts, models.heads, dtype, stored_dtype(dtype, form))
    fields = outline(models, changed, dtype, "cpu")
    layout, tasks = fields["layout"], fields["tasks"]
    small = {key: fields[key] for key in ("unchanged", "buffers")}
    for t, task in enumerate(tasks):
        small[f"buffers/{t}"], small[f"heads/{t}"] = fields["expert_buffers"][task], fields["heads"][task]
    wide = torch.promote_types(dtype, torch.float32)
    if form == LORA:
        factors = FactoredTaskVectors.of(require_adapters(experts), layout, wide)
        small.update({f"factors/{t}": factors.tensors(t) for t in range(len(tasks))})
    about = {
        **about,
        "tasks": tasks,
        "form": None if isinstance(form, torch.dtype) else form,
        "names": layout.names,
        "shapes": [list(shape) for shape in layout.shapes],
        "dtypes": [SAFETENSORS_CODES[each] for each in layout.dtypes],
        "packed": [offset is not None for offset in layout.offsets],
        "aliases": fields["aliases"],
        "small": {key: {name: f"{key}/{name}" for name in tensors} for key, tensors in small.items()},
    }
    bodies = {f"{key}/{name}": tensor for key, tensors in small.items() for name, tensor in tensors.items()}
    writer = PackedFileWriter(path, layout, rows_of(len(experts), dtype, form), bodies, about)
    try:
        for layer, name in enumerate(layout.names):
            if name in changed:
                pretrained = base.read(name).to(wide)
                narrow = _narrowed(f"{base.label}: '{name}'", pretrained, dtype)
                task_vectors: Iterable[Tensor] = ()
                if isinstance(form, torch.dtype):
                    task_vectors = (
                        _narrowed(f"{expert.label}: '{name}' minus the base's", expert.read(name).to(wide) - pretrained, form)
                        for _, expert in experts
                    )
                elif form in FORMATS:
                    codes = QuantisedTaskVectors.zeros(len(experts), layout.extent(layer)[1], form)
                    quantise(codes, name, pretrained, experts)
                    task_vectors = itertools.chain(codes.codes, codes.scales)
                writer.write(layer, itertools.chain([narrow], task_vectors))
        return _fields(writer.finish(), device)
    finally:
        writer.abandon()


def _narrowed(what: str, numbers: Tensor, dtype: torch.dtype) -> Tensor:
    numbers = numbers.to(dtype)
    if dtype == torch.float16:  # the other types have the range of fp32
        check_range(what, numbers)
    return numbers


def described(
    base: Source,
    experts: Experts,
    dtype: torch.dtype,
    task_vector_dtype: torch.dtype | str | None,
    heads: str | Sequence[str],
    keep: str | Sequence[str],
    device: torch.device | str,
    folder: Path | None,
) -> dict[str, Any]:
    """The fields that packing would give, for a plan: layout and shapes from the headers, base and task vectors on `meta`.

    Every layer counts as changed. Values are read of heads, buffers and LoRA factors alone.
    """
    models = aligned(base, experts, heads, keep, folder)
    base, experts = models.base, models.experts
    fields = outline(models, base.names, dtype, device)
    form = task_vector_dtype or dtype
    check_form(form, experts)
    task_vectors = empty_task_vectors(experts, fields["layout"], dtype, form, "meta")
    numbers = torch.empty(fields["layout"].numel, dtype=dtype, device="meta")
    return {**fields, "base": numbers, "task_vectors": task_vectors}


def identity_of(folders: Sequence[str | Path], **settings: object) -> dict:
    """What a packed file was made from: every weight file's size and time of change."""
    found = {}
    parts = (part for path in folders for part in model_and_adapter(path) if part is not None)
    for folder in dict.fromkeys(parts):
        files = [folder] if folder.is_file() else sorted(f for f in folder.iterdir() if f.suffix in SUFFIXES)
        found[str(folder.resolve())] = {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in files}
    return {"folders": found, **{key: str(value) for key, value in settings.items()}}


def require_unchanged(before: dict, after: dict) -> None:
    """Raises CheckpointError where a file's identity is another one by now."""
    for folder, files in before["folders"].items():
        for name, found in files.items():
            if after["folders"][folder].get(name) != found:
                path = folder if Path(folder).is_file() else f"{folder}/{name}"
                raise CheckpointError(f"{path} changed while it was being packed; merge again")
