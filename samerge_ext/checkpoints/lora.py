"""LoRA adapters, as PEFT saves them, as experts: base + scaling · B A, one tensor or a range of its numbers at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from samerge_ext.checkpoints.adapter_config import CONFIG, WEIGHTS, AdapterConfig
from samerge_ext.checkpoints.adapter_edits import Edit, Pair, product_numbers
from samerge_ext.checkpoints.adapter_tensors import edits_of
from samerge_ext.checkpoints.files import SafetensorsFile
from samerge_ext.checkpoints.folder import open_checkpoint
from samerge_ext.checkpoints.places import is_adapter
from samerge_ext.checkpoints.reading import CheckpointError
from samerge_ext.checkpoints.sources import CheckpointSource, Source

# What an expert adds to a layer of m rows: left [m, r] @ right [r, n]; a difference of the layer's shape; or nothing.
Change = tuple[Tensor, Tensor] | Tensor | None


def model_and_adapter(path: str | Path) -> tuple[Path | None, Path | None]:
    """The folders of a full model and of an adapter on top that an expert's path stands for; one of them may be None.

    "MODEL+ADAPTER" names both. A model's folder that holds an adapter too is both, as for transformers; an adapter_config.json
    that lies beside a model without the adapter's weights says nothing.
    """
    whole = Path(path)
    if is_adapter(whole):
        return None, whole
    if whole.exists() or "+" not in str(path):
        return whole, whole if any((whole / file).is_file() for file in (WEIGHTS, "adapter_model.bin")) else None
    parts = str(path).split("+")
    splits = [(Path("+".join(parts[:i])), Path("+".join(parts[i:]))) for i in range(1, len(parts))]
    model, adapter = next(((model, adapter) for model, adapter in splits if model.exists()), splits[0])
    if not (adapter / CONFIG).is_file():
        raise CheckpointError(f"{path}: {adapter} holds no {CONFIG}; MODEL+ADAPTER names a model's folder and a PEFT adapter's")
    return model, adapter


def model_of(path: str | Path) -> Path:
    """The folder of the full model in an expert's path. Raises CheckpointError for an adapter by itself."""
    model, _ = model_and_adapter(path)
    if model is None:
        raise _homeless(path)
    return model


@contextmanager
def open_expert(path: str | Path, base: Source | None, label: str) -> Iterator[Source]:
    """The source of a model folder, of an adapter of ``base``, or of "MODEL+ADAPTER", an adapter of another full model.

    Raises CheckpointError where it cannot be read, and for an adapter by itself where ``base`` is None.
    """
    model, adapter = model_and_adapter(path)
    if model is None:
        if base is None:
            raise _homeless(path)
        with AdapterSource(Path(path), base, label) as source:
            yield source
        return
    with open_checkpoint(model, beside_adapter=True) as checkpoint:
        full = CheckpointSource(checkpoint, label)
        if adapter is None:
            yield full
        else:
            with AdapterSource(adapter, full, label) as source:
                yield source


class AdapterSource(Source):
    """The model that a LoRA adapter makes of its base (arXiv 2106.09685): W + scaling · B A where it has factors
    A [r, n] and B [m, r], in fp32, with scaling alpha / r, or alpha / √r (rsLoRA); its own tensors where it has whole ones
    (biases, modules_to_save); its own rows where single tokens were trained; the base's elsewhere.

    Raises CheckpointError for another kind of adapter, and for a tensor whose place in the base is not found or has another
    shape.
    """

    def __init__(self, folder: Path, base: Source, label: str):
        self.label = f"{label} ({folder})"
        self._base = base
        config = AdapterConfig(folder)
        if not (folder / WEIGHTS).is_file():
            raise CheckpointError(f"{folder} lacks {WEIGHTS}; save the adapter with safe_serialization=True")
        self._file = SafetensorsFile(folder / WEIGHTS)
        try:
            self._edits: dict[str, Edit] = edits_of(self._file, config, base, self.label)
        except BaseException:
            self._file.close()
            raise
        config.warn_of_another_base(base.files[0].parent if base.files else None)
        self.aliases = dict(base.aliases)
        self.names = (*base.names, *(name for name in self._edits if name not in base))
        self._stored = frozenset(self.names)
        self.files = (folder / WEIGHTS, folder / CONFIG, *base.files)

    def __enter__(self) -> AdapterSource:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def is_buffer(self, name: str) -> bool:
        return self._base.is_buffer(name) if name in self._base else super().is_buffer(name)

    def weight_dtype(self, name: str) -> torch.dtype:
        """The base's: factors are trained in wider types than the model that they belong to."""
        return self._base.weight_dtype(name) if name in self._base else self.dtype(name)

    def change(self, name: str) -> Change:
        """What the adapter adds to a tensor of the base: the product of two factors [m, r] and [r, n], in fp32 and with the
        scaling in the first; where it has a tensor of its own, the difference; None where it adds nothing."""
        name = self.aliases.get(name, name)
        edit = self._edits.get(name)
        if edit is None:
            return None
        own = self._file.read(edit.own) if edit.own else None
        if own is not None and torch.equal(own, self._base.read(name).to(own.dtype)):  # as PEFT keeps an embedding beside factors
            own = None
        if own is not None or edit.bias or (edit.pair and not edit.is_product):
            wide = torch.promote_types(self._dtype(name), torch.float32)
            return self._read(name).to(wide) - self._base.read(name).to(wide)
        if edit.pair:
            return edit.pair.read(self._file)
        return self._rows(name, edit.rows, edit.tokens) if edit.rows else None

    def _shape(self, name: str) -> torch.Size:
        edit = self._edits.get(name)
        return self._file.shape(edit.own) if edit and edit.own else self._base.shape(name)

    def _dtype(self, name: str) -> torch.dtype:
        edit = self._edits.get(name)
        if edit is None:
            return self._base.dtype(name)
        stored = self._file.dtype(edit.own) if edit.own else self._base.dtype(name)
        return stored if edit.is_whole else torch.promote_types(stored, torch.float32)

    def _read(self, name: str) -> Tensor:
        edit = self._edits.get(name)
        if edit is None:
            return self._base.read(name)
        if edit.own and edit.is_whole:
            return self._file.read(edit.own)
        out = torch.empty(self._shape(name), dtype=self._dtype(name))
        self._read_into(name, 0, out.view(-1))
        return out

    def _read_into(self, name: str, start: int, out: Tensor) -> None:
        edit = self._edits.get(name)
        source, stored = (self._file, edit.own) if edit and edit.own else (self._base, name)
        if edit is None or edit.is_whole:
            source.read_into(stored, start, out)
            return
        if edit.pair and edit.pair.magnitude and (wanted := self._whole_outputs(name, edit.pair, start, out.numel())):
            first, count = wanted
            rows = torch.empty(count, dtype=out.dtype)
            self._read_into(name, first, rows)
            out.copy_(rows[start - first :][: out.numel()])
            return
        numbers = out if source.dtype(stored) == out.dtype else torch.empty(out.shape, dtype=source.dtype(stored))
        source.read_into(stored, start, numbers)
        if numbers is not out:
            out.copy_(numbers)
        if edit.pair:
            out += product_numbers(*edit.pair.read(self._file), start, out.numel())
            if edit.pair.magnitude:
                self._scale_outputs(edit.pair.magnitude, edit.pair.transposed, start, out.view(-1, self._shape(name)[1]))
        if edit.bias:
            out += self._file.read(edit.bias)[start : start + out.numel()].to(out.dtype) * edit.scaling
        if edit.rows:
            self._write_tokens(name, edit.rows, edit.tokens, start, out)

    def _whole_outputs(self, name: str, pair: Pair, start: int, count: int) -> tuple[int, int] | None:
        """The range of numbers that has a range's outputs whole, whose lengths DoRA sets; None where the range has."""
        numel, width = self._shape(name).numel(), self._shape(name)[1]
        first, end = (0, numel) if pair.transposed else (start // width * width, -(-(start + count) // width) * width)
        return None if (first, end) == (start, start + count) else (first, end - first)

    def _scale_outputs(self, magnitude: str, transposed: bool, start: int, sums: Tensor) -> None:
        """Gives the rows of sums [rows, n] from number ``start`` on, or all columns, the lengths of DoRA."""
        lengths = self._file.read(magnitude).to(sums.dtype)
        if transposed:
            sums *= lengths / sums.norm(dim=0)
        else:
            first = start // sums.shape[1]
            sums *= (lengths[first : first + sums.shape[0]] / sums.norm(dim=1))[:, None]

    def _write_tokens(self, name: str, rows: str, tokens: list[int], start: int, out: Tensor) -> None:
        """Puts the rows of the trained tokens over numbers ``start`` … of an embedding."""
        width, end = self._base.shape(name)[1], start + out.numel()
        for token, row in zip(tokens, self._file.read(rows), strict=True):
            first, last = max(start, token * width), min(end, (token + 1) * width)
            if first < last:
                out[first - start : last - start] = row[first - token * width : last - token * width]

    def _rows(self, name: str, rows: str, tokens: list[int]) -> tuple[Tensor, Tensor]:
        """The change of the trained tokens as the product of a choice of rows [V, k] and their differences [k, n]."""
        base, own = self._base.read(name), self._file.read(rows)
        wide = torch.promote_types(torch.promote_types(base.dtype, own.dtype), torch.float32)
        chosen = torch.zeros(base.shape[0], len(tokens), dtype=wide)
        chosen[tokens, range(len(tokens))] = 1
        return chosen, own.to(wide) - base[tokens].to(wide)


def _homeless(path: str | Path) -> CheckpointError:
    return CheckpointError(f"{path} is a PEFT adapter, and no model is named that it belongs to; name its base as base_model")
