"""Every reader of files that others wrote, as a function of a file's bytes, with sound files to begin from. What must hold: the
file is read, or an error of a documented type names it, whatever it holds. For the property tests and for fuzz.py."""

import io
import json
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import coded
import torch
import torch.distributed.checkpoint as dcp
import yaml
from frames import (
    frame,
    join_header,
    join_json,
    join_packed,
    join_sealed,
    join_yaml,
    split_header,
    split_json,
    split_packed,
    split_sealed,
    split_yaml,
)
from safetensors.torch import save, save_file

import samerge_ext as sm
from samerge_ext.checkpoints.companions import Companions, chat_template
from samerge_ext.checkpoints.compatibility import check_models
from samerge_ext.checkpoints.folder import open_checkpoint
from samerge_ext.checkpoints.lora import open_expert
from samerge_ext.checkpoints.reading import explained
from samerge_ext.checkpoints.shards import plan_shards
from samerge_ext.checkpoints.sources import StateDictSource
from samerge_ext.checkpoints.vocabulary import Vocabulary
from samerge_ext.elementwise.record import held_record
from samerge_ext.models.gguf import folder_of_gguf
from samerge_ext.recipes.recipe import load_recipe
from samerge_ext.recipes.tokenizers import companions_of

LONGEST = 8000  # characters of a message


@dataclass(frozen=True)
class Reader:
    """file: where in a folder the bytes go. sound: bytes that are read without error. read: what is done with the file.

    split, join: between bytes and the JSON in them, where there is any. frame: a text in the place of a sound file's JSON, where
    a file is not JSON alone.
    """

    name: str
    file: str
    sound: Callable[[Path], list[bytes]]
    read: Callable[[Path], object]
    split: Callable[[bytes], tuple[object, bytes]] | None = None
    join: Callable[[object, bytes], bytes] | None = None
    frame: Callable[[bytes, bytes], bytes] | None = None

    def check(self, folder: Path, data: bytes) -> bool:
        """Whether the bytes were read. Raises AssertionError, or whatever a reader raises and does not say that it does."""
        path = folder / self.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        try:
            self.read(path)
        except (ValueError, OSError) as error:
            message = explained(error) if isinstance(error, OSError) else str(error)
            message = "\n".join([message, *getattr(error, "__notes__", ())])
            assert path.name in message or str(folder) in message, f"names no file: {message[:300]}"
            assert len(message) < LONGEST, f"a message of {len(message)} characters: {message[:300]}"
            return False
        return True


def tensors(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {"layers.0.weight": torch.randn(4, 6), "layers.0.bias": torch.randn(4), "layers.1.weight": torch.randn(3, 4)}


def _all_of(path: Path) -> list[torch.Tensor]:
    with open_checkpoint(path) as checkpoint:
        return [checkpoint.read(name) for name in checkpoint.names]


def _state_dicts(_: Path) -> list[bytes]:
    found = []
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        torch.save(tensors(0), file := io.BytesIO(), **options)
        found.append(file.getvalue())
    return found


def _dcp(_: Path) -> list[bytes]:
    """Checkpoints whose one tensor's part is what `_part` makes, by itself and beside an optimizer's."""
    found = []
    for state in ({"w": torch.ones(4, 6)}, {"model": {"w": torch.ones(4, 6)}, "optim": {"step": 3}}):
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            writer = dcp.FileSystemWriter(folder, single_file_per_rank=False)
            dcp.save(state, storage_writer=writer, no_dist=True)
            found.append(Path(folder, ".metadata").read_bytes())
    return found


def _part(_: Path) -> list[bytes]:
    torch.save(torch.ones(4, 6), file := io.BytesIO())
    return [file.getvalue()]


def _read_dcp(path: Path) -> object:
    (path.parent / "__0_0.distcp").write_bytes(*_part(path))
    return _all_of(path)


def _read_part(path: Path) -> object:
    (path.parent / ".metadata").write_bytes(_dcp(path)[0])
    return _all_of(path.parent)


def _read_index(path: Path) -> object:
    for i in (1, 2):
        if not (shard := path.parent / f"{i}.safetensors").exists():
            save_file({f"{name}.{i}": tensor for name, tensor in tensors(i).items()}, shard)
    return _all_of(path)


def _index(_: Path) -> list[bytes]:
    places = {f"{name}.{i}": f"{i}.safetensors" for i in (1, 2) for name in tensors(0)}
    return [json.dumps({"metadata": {"total_size": 1}, "weight_map": places}).encode()]


def _read_codes(path: Path) -> object:
    if not (config := path.parent / "config.json").exists():
        config.write_text(json.dumps(coded.SETTINGS))
    return _all_of(path)


def _read_settings_of_codes(path: Path) -> object:
    for number, tensors in enumerate(coded.KINDS):
        save_file(tensors, _made(path.parent / str(number)) / "model.safetensors")
        (path.parent / str(number) / "config.json").write_bytes(path.read_bytes())
        _all_of(path.parent / str(number))
    return None


def _factors() -> dict[str, torch.Tensor]:
    return {
        "base_model.model.layers.0.lora_A.weight": torch.ones(2, 6),
        "base_model.model.layers.0.lora_B.weight": torch.ones(4, 2),
        "base_model.model.layers.1.weight": torch.ones(3, 4),
    }


SETTINGS = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_rslora": False, "fan_in_fan_out": False, "target_modules": ["0"],
    "base_model_name_or_path": "base", "alpha_pattern": {"layers.0": 8}, "rank_pattern": {"layers.0": 2}, "bias": "none",
    "init_lora_weights": True, "trainable_token_indices": None, "modules_to_save": None, "task_type": "SEQ_CLS",
}  # fmt: skip


def _read_adapter(path: Path) -> object:
    config, weights = path.parent / "adapter_config.json", path.parent / "adapter_model.safetensors"
    if not config.exists():
        config.write_text(json.dumps(SETTINGS))
    if not weights.exists():
        save_file(_factors(), weights)
    with open_expert(path.parent, StateDictSource(tensors(0), "base"), "expert") as source:
        return [source.read(name) for name in source.names]


def _ggufs(folder: Path) -> list[bytes]:
    from tiny_gguf import files  # which needs the package gguf

    found = files(folder)
    folder_of_gguf(folder / "made.gguf", folder / "out")  # what transformers imports at first takes seconds
    return found


def _read_gguf(path: Path) -> object:
    return folder_of_gguf(path, path.parent / "out", overwrite=True)


def _packed(folder: Path) -> list[bytes]:
    for i, name in enumerate(("base", "a", "b")):
        save_file(tensors(i), _made(folder / f"packed-{name}") / "model.safetensors")
    base, experts = folder / "packed-base", {task: folder / f"packed-{task}" for task in "ab"}
    found = []
    for form in (None, "int4"):
        sm.PackedWeights.from_folders(base, experts, file=folder / "p", task_vector_dtype=form)
        found.append((folder / "p").read_bytes())
        (folder / "p").unlink()
    return found


def _read_packed(path: Path) -> object:
    packed = sm.PackedWeights.open(path)
    try:
        return packed.in_memory().state_dict(packed.in_memory().base)
    finally:
        packed.base.file.close()


def _read_record(path: Path) -> object:
    with held_record(path.parent, {"method": "linear"}) as record:
        return record.is_over(path.parent.parent / "out")


def _read_note(path: Path) -> object:
    data = path.read_bytes()
    (shard,) = plan_shards([("weight", torch.float32, torch.Size([3]))], 100)
    with held_record(path.parent.parent, {"method": "linear"}) as record:  # which discards another merge's
        path.write_bytes(data)
        return record.left([shard])


def _recipes(folder: Path) -> list[bytes]:
    for i, name in enumerate(("base", "a", "b")):
        save_file(tensors(i), _made(folder / name) / "model.safetensors")
    models = [{"model": str(folder / "a"), "parameters": {"weight": [0.3, 1]}}, str(folder / "b")]
    parameters = {"density": [{"filter": "0", "value": 0.5}, {"value": 1}], "lambda": 1.0, "weight": 1}
    files = {"a": str(folder / "recipe.yaml"), "b": "b.txt"}
    contents = [
        {"merge_method": "ties", "base_model": str(folder / "base"), "models": models, "parameters": parameters},
        {"merge_method": "linear", "models": models, "dtype": "bfloat16", "tokenizer_source": "union", "chat_template": "auto"},
        {
            "merge_method": "samerging", "base_model": str(folder / "base"), "models": [str(folder / "a"), str(folder / "b")],
            "parameters": {"steps": 3, "learning_rate": "1e-3"}, "calibration": {"files": files}, "heads": ["head.*"],
        },
        {
            "merge_method": "dare_linear", "base_model": str(folder / "base"), "random_seed": 4, "dtype": "torch.float32",
            "slices": [{"sources": [{"model": str(folder / name), "layer_range": [0, 2]} for name in "ab"]}],
        },
    ]  # fmt: skip
    return [yaml.safe_dump(content).encode() for content in contents]


CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_attention_heads": 4, "num_hidden_layers": 2,
    "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 1e4}, "id2label": {"0": "a", "1": "b"},
    "bos_token_id": [1, 2], "text_config": {"model_type": "llama", "head_dim": 2, "dtype": "float32"}, "hidden_act": "silu",
}  # fmt: skip


def _read_config(path: Path) -> object:
    if not (other := path.parent / "other/config.json").exists():
        _made(other.parent)
        other.write_text(json.dumps(CONFIG))
    check_models(path.parent / "other", [("task", path.parent)])
    return Companions(path.parent).check()


def _read_tokenizer(path: Path) -> object:
    check_models(path.parent, [("task", path.parent / "other")])
    return Vocabulary(path.parent).numbers(), chat_template(path.parent)


def _tokenizers(_: Path) -> list[bytes]:
    added = [{"id": 3, "content": "<s>"}]
    models = ({"type": "BPE", "vocab": {"a": 0, "b": 1}}, {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]})
    return [json.dumps({"model": model, "added_tokens": added}).encode() for model in models]


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


RECORD, NOTE = {"identity": {"method": "linear"}, "whole": [7, 8]}, {"checksum": "01234567", "trims": [[1, 2]]}
JSON, HEADER, SEALED = (split_json, join_json), (split_header, join_header, frame), (split_sealed, join_sealed)
READERS = {
    reader.name: reader
    for reader in (
        Reader("safetensors", "weights/model.safetensors", lambda _: [save(tensors(0), {"format": "pt"})], _all_of, *HEADER),
        Reader("codes", "coded/model.safetensors", lambda _: [save(kind) for kind in coded.KINDS], _read_codes, *HEADER),
        Reader(
            "settings of codes", "quantised/config.json", lambda _: [join_json(coded.SETTINGS)], _read_settings_of_codes, *JSON
        ),
        *([Reader("GGUF", "gguf/model.gguf", _ggufs, _read_gguf)] if find_spec("gguf") and find_spec("transformers") else []),
        Reader("state dict", "pickled/pytorch_model.bin", _state_dicts, _all_of),
        Reader("checkpoint's metadata", "dcp/.metadata", _dcp, _read_dcp),
        Reader("checkpoint's part", "dcp-part/__0_0.distcp", _part, _read_part),
        Reader("index", "sharded/model.safetensors.index.json", _index, _read_index, *JSON),
        Reader("adapter's settings", "adapter/adapter_config.json", lambda _: [join_json(SETTINGS)], _read_adapter, *JSON),
        Reader("adapter's factors", "factors/adapter_model.safetensors", lambda _: [save(_factors())], _read_adapter, *HEADER),
        Reader("packed file", "packed/weights.safetensors", _packed, _read_packed, split_packed, join_packed, frame),
        Reader("record", "out.state/merge.json", lambda _: [join_sealed(RECORD)], _read_record, *SEALED),
        Reader("note", "noted.state/notes/model.safetensors.json", lambda _: [join_sealed(NOTE)], _read_note, *SEALED),
        Reader("recipe", "recipe.yaml", _recipes, lambda path: companions_of(load_recipe(path, {})), split_yaml, join_yaml),
        Reader("config", "model/config.json", lambda _: [join_json(CONFIG)], _read_config, *JSON),
        Reader("tokenizer", "tokenized/tokenizer.json", _tokenizers, _read_tokenizer, *JSON),
        Reader("pieces", "pieces/tokenizer.model", lambda _: [b"\n\x05\n\x03abc\n\x05\n\x03def"], _read_tokenizer),
    )
}
