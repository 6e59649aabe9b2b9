"""GGUF files as model folders: dequantised once, one tensor at a time, under the names that transformers has for them.

What a GGUF file is made of is read by the package `gguf`; which of its tensors is which of transformers', and how its rows are
ordered (llama.cpp permutes those of queries and keys), is transformers' own knowledge, `modeling_gguf_pytorch_utils`.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from samerge_ext.checkpoints.reading import CheckpointError, cut, shown
from samerge_ext.checkpoints.saving import require_space, require_target, save_checkpoint

ROWS_BYTES = 64 << 20  # of numbers that are dequantised at once
LIKE = "pass the folder of the original model's config.json and tokenizer as like (--like)"
# Factors of rotary frequencies, which transformers computes from config.json: the file tells them, but not how they came about.
ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def folder_of_gguf(
    path: str | Path,
    out_folder: str | Path,
    *,
    like: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> Path:
    """Writes the decoder in a GGUF file as a model folder: its weights as safetensors, config.json and tokenizer.

    like: a folder of the original model, whose configuration and tokenizer are taken in place of what the file tells of them.
        It is needed where that is not all: scaled rotary positions (Llama 3.1), a tokenizer that transformers cannot make of it.
    dtype: of what is written; float32 keeps what the codes say.

    Memory: one shard and one tensor. Returns the folder. Raises ModuleNotFoundError without `gguf` and transformers; before
    anything is dequantised, CheckpointError for a damaged or split file, an architecture or a type of codes that is not known,
    and tensors that do not make the model.
    """
    gguf = _package("gguf")
    _package("transformers")
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, load_gguf_checkpoint

    path = Path(path)
    require_target(Path(out_folder), overwrite=overwrite)
    reader = _reader(path, gguf)
    architecture = _field(path, reader, "general.architecture")
    try:
        told = load_gguf_checkpoint(str(path))["config"]
        told.pop("_model_name_or_path", None)  # a name of the model, which would be taken for a folder
        config = AutoConfig.for_model(**told) if like is None else AutoConfig.from_pretrained(like, local_files_only=True)
        _check_layers(path, reader, config)
        with torch.device("meta"):
            module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except CheckpointError:
        raise
    except Exception as error:  # of any type: metadata may hold anything
        raise CheckpointError(
            f"{path}: transformers makes no decoder of its architecture {shown(architecture)} ({cut(str(error), 300)}); convert "
            "the original model instead"
        ) from error
    _check_positions(path, reader, architecture, like)
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=told)
    names = _names(path, reader, module, processor)
    _check_codes(path, reader, gguf)
    require_space(out_folder, sum(int(tensor.n_elements) for tensor in reader.tensors) * dtype.itemsize)
    config.architectures, config.dtype = [type(module).__name__], dtype
    files = {"config.json": config.to_json_string()} | ({} if like is not None else _tokenizer_files(path))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        expected = module.state_dict()
        for tensor in reader.tensors:
            if tensor.name in names:
                numbers = processor.process(_dequantised(tensor, gguf), tensor.name).weights
                yield names[tensor.name], _shaped(path, names[tensor.name], numbers, expected, dtype)

    return save_checkpoint(
        out_folder, tensors(), companions_from=like, extra_files=files, shard_size=shard_size, overwrite=overwrite
    )


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        error.msg += '; GGUF files are read with it: pip install "samerge_ext[gguf]"'
        raise


def _reader(path: Path, gguf: Any) -> Any:
    """The file's `gguf.GGUFReader`: metadata, and tensors as they are mapped."""
    if not path.is_file():
        raise CheckpointError(f"{path} is no file; pass the .gguf file itself")
    try:
        reader = _bounded(gguf.GGUFReader)(path)
    except Exception as error:  # of any type: the file is not checked before it is read
        raise CheckpointError(f"{path} is no GGUF file, or is damaged ({cut(str(error), 200)}); download it again") from error
    if isinstance(count := _field(path, reader, "split.count"), int) and count > 1:
        raise CheckpointError(f"{path} is one of {count} parts; join them with `llama-gguf-split --merge`")
    return reader


def _bounded(reader: Any) -> Any:
    """The class, which does not go on reading behind the end of a file, where a number of values without any has no bound."""

    class Bounded(reader):
        def _get(self, offset: Any, dtype: Any, count: Any = 1, *others: Any, **named: Any) -> Any:
            if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError(f"it counts {int(count)} more of {np.dtype(dtype)} at byte {int(offset)} of {len(self.data)}")
            return super()._get(offset, dtype, count, *others, **named)

    return Bounded


def _field(path: Path, reader: Any, key: str) -> Any:
    field = reader.fields.get(key)
    try:
        return None if field is None else field.contents()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: {key} cannot be read ({error}); download it again") from error


def _check_layers(path: Path, reader: Any, config: Any) -> None:
    """A module is made only where the file has tensors for its layers."""
    layers = config.get_text_config().num_hidden_layers
    if not isinstance(layers, int) or layers > len(reader.tensors):
        raise CheckpointError(f"{path} counts {shown(layers)} layers and has {len(reader.tensors)} tensors; download it again")


def _check_positions(path: Path, reader: Any, architecture: str, like: str | Path | None) -> None:
    """transformers leaves out what a file says of scaled rotary positions."""
    kind = _field(path, reader, f"{architecture}.rope.scaling.type")
    factors = [tensor.name for tensor in reader.tensors if tensor.name in ROPE_FACTORS]
    if like is None and (factors or kind not in (None, "none")):
        raise CheckpointError(
            f"{path} has scaled rotary positions ({factors[0] if factors else kind}), which are not read from it: {LIKE}"
        )


def _names(path: Path, reader: Any, module: nn.Module, processor: Any) -> dict[str, str]:
    """Name in the file -> in the module, of all but factors of rotary frequencies; each of the module's parameters once."""
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    known = get_gguf_hf_weights_map(module, processor)
    names = {tensor.name: known.get(tensor.name) for tensor in reader.tensors if tensor.name not in ROPE_FACTORS}
    kind = type(module).__name__
    if unknown := [name for name, found in names.items() if found is None]:
        raise CheckpointError(
            f"{path}: {shown(unknown[0])}{_more(unknown)} is no tensor of {kind} by itself (experts of a mixture are stored as "
            "one): load the file with transformers' from_pretrained(gguf_file=…), save it with save_pretrained, and merge that"
        )
    found = {name for name in names.values() if name is not None}
    state = {name: tensor for name, tensor in module.state_dict().items() if name in dict(module.named_parameters())}
    if missing := [name for name in state if name not in found]:
        raise CheckpointError(f"{path} lacks '{missing[0]}'{_more(missing)} of {kind}; download it again")
    for tensor in reader.tensors:
        name = names.get(tensor.name)
        if name is not None and math.prod(module.state_dict()[name].shape) != int(tensor.n_elements):
            raise CheckpointError(
                f"{path}: '{tensor.name}' is {[int(n) for n in reversed(tensor.shape)]}, and '{name}' of {kind} is "
                f"{list(module.state_dict()[name].shape)}; the file's metadata, or the config.json beside it, is of another model"
            )
    return {name: there for name, there in names.items() if there is not None}


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _check_codes(path: Path, reader: Any, gguf: Any) -> None:
    """Of each type of codes one row is dequantised, so that none that is not known is found in the middle of the work."""
    for tensor in {tensor.tensor_type: tensor for tensor in reader.tensors}.values():
        try:
            gguf.dequantize(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], tensor.tensor_type)
        except NotImplementedError as error:
            kind = tensor.tensor_type.name
            raise CheckpointError(
                f"{path}: '{tensor.name}' is of type {kind}, which the package gguf does not dequantise; use another file"
            ) from error


def _dequantised(tensor: Any, gguf: Any) -> np.ndarray:
    """A tensor's numbers in fp32 and in its shape, some rows at a time."""
    shape = tuple(int(n) for n in reversed(tensor.shape))
    out = np.empty((math.prod(shape[:-1]), shape[-1]), np.float32)
    codes = tensor.data.reshape(len(out), -1)
    step = max(1, ROWS_BYTES // (4 * shape[-1]))
    for start in range(0, len(out), step):
        out[start : start + step] = gguf.dequantize(codes[start : start + step], tensor.tensor_type)
    return out.reshape(shape)


def _shaped(path: Path, name: str, numbers: np.ndarray, expected: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(numbers)).to(dtype)
    if tensor.shape != expected[name].shape:
        wanted = list(expected[name].shape)
        raise CheckpointError(f"{path}: '{name}' is {list(tensor.shape)} in place of {wanted}; download it again")
    return tensor


def _tokenizer_files(path: Path) -> dict[str, bytes]:
    """The files of the tokenizer that transformers makes of the metadata."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        try:
            AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True).save_pretrained(folder)
        except Exception as error:  # of any type, as tokenizers' libraries raise
            raise CheckpointError(f"{path}: transformers makes no tokenizer of it ({cut(str(error), 300)}): {LIKE}") from error
        return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}
