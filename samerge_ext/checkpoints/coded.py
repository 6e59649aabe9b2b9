"""Weights that folders store as codes, read as numbers: 8-bit floats and integers, bitsandbytes' 4 bits, GPTQ.

    float8, int8   w = code · scale, one scale for the tensor, a row, a group of a row's columns, or a block of rows and columns:
                   `weight_scale` of compressed-tensors and FBGEMM, `weight_scale_inv` of DeepSeek, which is a factor, too, and
                   `SCB` of bitsandbytes, a row's largest magnitude, whose code is 127
    nf4, fp4       w = quant_map[code] · absmax of `blocksize` numbers in a row; two codes a byte, the first in its upper half.
                   With double quantisation absmax = nested_quant_map[code] · nested_absmax of `nested_blocksize` + offset
    GPTQ           w = (code − zero) · scale of the group that `g_idx` tells of a column; 32 / bits codes an int32, the first in
                   its lowest bits, of a row's columns in `qweight`, of rows in `qzeros`, which are one less in the first format

Numbers are computed in fp32 when they are read, as many as are asked for. What belongs to codes of other kinds stays as it is
stored, and is refused where models are merged (`QUANTISED`).
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from samerge_ext.checkpoints.reading import CheckpointError, parse_json, read_json, shown

# Parts of a checkpoint whose numbers are codes of others: GPTQ, AWQ, bitsandbytes, compressed-tensors, fp8, HQQ, AQLM, QuIP,
# MXFP4.
QUANTISED = re.compile(
    r"\.(qweight|qzeros|g_idx|SCB|weight_format|weight\.(absmax|quant_map|quant_state.*|nested_absmax|nested_quant_map)"
    r"|weight_packed|weight_zero_point|weight_shape|input_scale|q_scale|q_perm|q_invperm|q_group\w*|W_q|Qidxs|codebooks)$"
    r"|(proj|weight)_(blocks|scales)$|weight_scale$|_scale_inv$"
)
QUANT_STATE = ".quant_state.bitsandbytes__"  # and nf4 or fp4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
OF_TYPES = {"weight_scale": (*FLOAT8, torch.int8), "weight_scale_inv": FLOAT8, "SCB": (torch.int8,)}  # scale -> types of codes


class Stored(Protocol):
    """The tensors of a folder or a file, path, as they are stored, by name."""

    path: Path
    names: tuple[str, ...]

    def shape(self, name: str) -> torch.Size: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def read(self, name: str) -> Tensor: ...
    def read_into(self, name: str, start: int, out: Tensor) -> None: ...


class Coded(ABC):
    """A weight that is stored as codes.

    shape: of the weight. dtype: that of the model which was quantised. parts: the stored tensors that make it, the codes first,
    and those that belong to it.
    """

    shape: torch.Size
    dtype: torch.dtype
    parts: tuple[str, ...]

    @abstractmethod
    def read_into(self, stored: Stored, start: int, out: Tensor) -> None:
        """Numbers ``start`` … of the weight, flattened, into ``out`` [n] fp32."""


class Scaled(Coded):
    """Codes [rows, columns] of a number each, times the scale of their block of rows and columns.

    unit: the code that stands for a scale. others: names that belong to the weight and are not needed.
    """

    def __init__(
        self, stored: Stored, name: str, scale: str, block: tuple[int, int], dtype: torch.dtype, others: list[str], unit: int = 1
    ):
        self.shape, self.dtype, self.parts = stored.shape(name), dtype, (name, scale, *others)
        self._block, self._unit = block, unit

    def read_into(self, stored: Stored, start: int, out: Tensor) -> None:
        name, scale, *_ = self.parts
        codes = torch.empty(out.shape, dtype=stored.dtype(name))
        stored.read_into(name, start, codes)
        out.copy_(codes)
        rows, columns = self.shape
        per_row, per_column = self._block
        scales = stored.read(scale).float().reshape(-(-rows // per_row), -(-columns // per_column)) / self._unit
        first, end = start // columns, -(-(start + out.numel()) // columns)  # rows that the range is in
        of_rows = scales[torch.arange(first, end) // per_row]  # [end - first, blocks of a row]
        of_numbers = of_rows.repeat_interleave(per_column, 1)[:, :columns].flatten()  # [(end - first) * columns]
        out.mul_(of_numbers[start - first * columns :][: out.numel()])


class FourBits(Coded):
    """bitsandbytes' nf4 and fp4. state: the JSON that it stores beside the codes."""

    def __init__(self, stored: Stored, name: str, state_name: str):
        state = self._state(stored, state_name)
        self.shape, self.dtype = torch.Size(state["shape"]), DTYPES[state["dtype"]]
        self._blocksize, self._nested = state["blocksize"], state.get("nested_blocksize")
        self._offset = state.get("nested_offset", 0.0)
        nested = ("nested_absmax", "nested_quant_map") if self._nested else ()
        self.parts = (name, *(f"{name}.{part}" for part in ("absmax", "quant_map", *nested)), state_name)
        numel, blocks = self.shape.numel(), -(-self.shape.numel() // self._blocksize)
        codes, numbers = torch.uint8, torch.float32
        expected = [(-(-numel // 2), codes), (blocks, codes if self._nested else numbers), (16, numbers)]
        if self._nested:
            expected += [(-(-blocks // self._nested), numbers), (256, numbers)]
        for part, kind in zip(self.parts, expected, strict=False):
            found = (stored.shape(part).numel(), stored.dtype(part)) if part in stored.names else None
            if found != kind:
                raise CheckpointError(
                    f"{stored.path}: '{part}' should be {kind[0]} of {kind[1]} for {list(self.shape)} in blocks of "
                    f"{self._blocksize}, and is {f'{found[0]} of {found[1]}' if found else 'missing'}; dequantise the model first"
                )

    @staticmethod
    def _state(stored: Stored, name: str) -> dict[str, Any]:
        try:
            state = parse_json(bytes(stored.read(name).flatten().tolist()))
            sizes = [*state["shape"], state["blocksize"], state.get("nested_blocksize", 1)]
            offset = state.get("nested_offset", None if "nested_blocksize" in state else 0.0)
            positive = all(isinstance(n, int) and 0 < n < 2**40 for n in sizes)
            if positive and state["dtype"] in DTYPES and isinstance(offset, float):
                return state
        except (ValueError, TypeError, KeyError, AttributeError):
            pass
        raise CheckpointError(
            f"{stored.path}: '{name}' does not say shape, dtype and blocksize as bitsandbytes writes them; dequantise the "
            "model first"
        )

    def read_into(self, stored: Stored, start: int, out: Tensor) -> None:
        end = start + out.numel()
        packed = torch.empty(-(-end // 2) - start // 2, dtype=torch.uint8)
        stored.read_into(self.parts[0], start // 2, packed)
        codes = torch.stack((packed >> 4, packed & 15), 1).flatten()[start % 2 :][: out.numel()]
        torch.index_select(stored.read(self.parts[2]).float(), 0, codes.int(), out=out)
        first, last = start // self._blocksize, -(-end // self._blocksize)
        absmax = self._absmax(stored, first, last).repeat_interleave(self._blocksize)
        out.mul_(absmax[start - first * self._blocksize :][: out.numel()])

    def _absmax(self, stored: Stored, first: int, last: int) -> Tensor:
        """The largest magnitudes of blocks ``first`` … ``last`` − 1."""
        absmax = torch.empty(last - first, dtype=stored.dtype(self.parts[1]))
        stored.read_into(self.parts[1], first, absmax)
        if not self._nested:
            return absmax.float()
        of_blocks = stored.read(self.parts[3]).float()[torch.arange(first, last) // self._nested]
        return stored.read(self.parts[4]).float()[absmax.int()] * of_blocks + self._offset


class GPTQ(Coded):
    """GPTQ's codes of 2, 4 or 8 bits, which are stored by column. below: how much less than a zero is stored."""

    def __init__(self, stored: Stored, stem: str, bits: int, below: int, dtype: torch.dtype):
        self.parts = tuple(f"{stem}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx"))
        self.dtype, self._bits, self._below = dtype, bits, below
        shapes = [tuple(stored.shape(part)) if part in stored.names else () for part in self.parts]
        try:
            (packed, rows), _, (groups, _), (columns,) = shapes
            self.shape, per = torch.Size((rows, columns)), 32 // bits
            fits = shapes == [(packed, rows), (groups, rows // per), (groups, rows), (columns,)] and columns == packed * per
            fits &= rows % per == 0 and all(stored.dtype(part) == torch.int32 for part in self.parts[:2])
            if fits and columns:
                of_columns = stored.read(self.parts[3])
                fits = int(of_columns.min()) >= 0 and int(of_columns.max()) < groups
        except ValueError:
            fits = False
        if not fits:
            raise CheckpointError(
                f"{stored.path}: '{self.parts[0]}' … are {list(map(list, shapes))}, which is no weight of {bits} bits as "
                "GPTQ stores it (qweight, qzeros, scales, g_idx); dequantise the model first"
            )

    def read_into(self, stored: Stored, start: int, out: Tensor) -> None:
        qweight, qzeros, scales, g_idx = map(stored.read, self.parts)
        columns = self.shape[1]
        rows = slice(start // columns, -(-(start + out.numel()) // columns))  # that the range is in
        codes = self._unpacked(qweight[:, rows], 0)  # [columns, rows]
        zeros = self._unpacked(qzeros, 1)[:, rows] + self._below  # [groups, rows]
        group = g_idx.long()
        numbers = (codes - zeros[group]) * scales[:, rows].float()[group]
        out.copy_(numbers.T.flatten()[start - rows.start * columns :][: out.numel()])

    def _unpacked(self, packed: Tensor, dim: int) -> Tensor:
        """[m, n] int32 -> codes [m · 32 / bits, n], or along the other dimension."""
        shifts = torch.arange(0, 32, self._bits, dtype=torch.int32)
        shifts = shifts[:, None] if dim == 0 else shifts
        return (packed.unsqueeze(dim + 1) >> shifts & 2**self._bits - 1).flatten(dim, dim + 1)


def coded_weights(stored: Stored, config_file: Path) -> dict[str, Coded]:
    """Name of a weight -> how it is read, for all whose codes are read here.

    config_file: the folder's config.json, where there is one. Raises CheckpointError for codes that their scales do not fit.
    """
    suspects = [name for name in stored.names if QUANTISED.search(name)]
    if not suspects:
        return {}
    config = read_json(config_file) if config_file.is_file() else {}
    gptq = _gptq(config)
    dtype = DTYPES.get(str(config.get("dtype", config.get("torch_dtype"))), torch.float32)
    found: dict[str, Coded] = {}
    for part in suspects:
        stem, _, kind = part.rpartition(".")
        weight = f"{stem}.weight"
        if QUANT_STATE in part:
            weight = part.partition(QUANT_STATE)[0]
            if weight in stored.names:
                found[weight] = FourBits(stored, weight, part)
        elif kind == "qweight" and gptq:
            found[weight] = GPTQ(stored, stem, *gptq, dtype)
        elif kind in OF_TYPES and _is_matrix_of(stored, weight, OF_TYPES[kind]):
            block = _block(stored, weight, part, _blocks(config))
            others = [name for name in (f"{stem}.input_scale", f"{stem}.weight_format") if name in stored.names]
            _check_order(stored, f"{stem}.weight_format")
            found[weight] = Scaled(stored, weight, part, block, dtype, others, unit=127 if kind == "SCB" else 1)
    return found


def _is_matrix_of(stored: Stored, weight: str, dtypes: Collection[torch.dtype]) -> bool:
    return weight in stored.names and len(stored.shape(weight)) == 2 and stored.dtype(weight) in dtypes


def _block(stored: Stored, weight: str, scale: str, blocks: list[tuple[int, int]]) -> tuple[int, int]:
    """Rows and columns that have a scale in common. blocks: of config.json."""
    (rows, columns), shape = stored.shape(weight), stored.shape(scale)
    if shape.numel() == 1:
        return max(rows, 1), max(columns, 1)
    for block in blocks:
        if shape == (-(-rows // block[0]), -(-columns // block[1])):
            return block
    if not scale.endswith("_inv"):  # whose blocks config.json always tells
        if shape in ((rows,), (rows, 1)):
            return 1, columns
        if len(shape) == 2 and shape[0] == rows and shape[1] and columns % shape[1] == 0:
            return 1, columns // shape[1]
    raise CheckpointError(
        f"{stored.path}: '{scale}' is {list(shape)}, which is no scale of '{weight}' {[rows, columns]}, in the blocks of "
        f"config.json ({', '.join(map(str, blocks)) or 'which tells none'}) or otherwise; dequantise the model first"
    )


def _blocks(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Rows and columns of a block, wherever config.json may tell them."""
    told = config.get("quantization_config")
    told = told if isinstance(told, dict) else {}
    groups = told.get("config_groups")
    weights = [group.get("weights") for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    found = [told.get("weight_block_size"), *(each.get("block_structure") for each in weights if isinstance(each, dict))]
    return [
        (block[0], block[1])
        for block in found
        if isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)
    ]


def _gptq(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Bits, and how much less than a zero is stored, of codes that GPTQ made. Of asymmetric ones only the second format tells all
    zeros apart."""
    match config.get("quantization_config"):
        case {"quant_method": "gptq", "bits": 2 | 4 | 8 as bits, "checkpoint_format": "gptq_v2"}:
            return bits, 0
        case {"quant_method": "gptq", "bits": 2 | 4 | 8 as bits, "sym": True, **others} if (
            others.get("checkpoint_format", "gptq") == "gptq"
        ):
            return bits, 1
    return None


def _check_order(stored: Stored, name: str) -> None:
    """bitsandbytes has stored codes in the orders of processors, too."""
    if name in stored.names and (found := stored.read(name).flatten().tolist()) != [0]:
        raise CheckpointError(
            f"{stored.path}: '{name}' is {shown(found)}: only codes in their rows' order, 0, are read; dequantise it first"
        )
