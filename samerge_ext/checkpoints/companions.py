"""What stands beside a model's weights and makes them a model: configuration, tokenizer, processors, remote code."""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path

import torch

from samerge_ext.checkpoints.places import folder_of
from samerge_ext.checkpoints.reading import CheckpointError, parse_json, read_bytes, read_json, read_text
from samerge_ext.checkpoints.tokenizers import MergedTokenizer

# Everything goes along but the following; names are compared without case.
WEIGHTS = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data*", "*.gguf", "*.ggml",
    "*.tflite", "*.distcp", "*.ot", "*.mlmodel", "*.pb", "weights*.npz", "*.data-?????-of-?????", "*.ckpt.index", "*.ckpt.meta",
    "*.safetensors.index*.json", "*.bin.index*.json",
)  # fmt: skip
OTHERS = (  # of a training run, of the hub, of an adapter, of an earlier merge; data
    "trainer_state.json", "training_args*", "*_results.json", "events.out.tfevents*", "random_states*.pkl", "zero_to_fp32.py",
    "latest", "*.log", "nohup.out", "*.tmp", "*.lock", "readme*", ".*", "adapter_*", "mergekit_config.y*ml", "coefficients.json",
    "report.json", "report.html",
    "*.parquet", "*.arrow", "*.zip", "*.tar", "*.tar.*", "*.tgz",
)  # fmt: skip
FOLDERS = (
    ".*", "__pycache__", "checkpoint-*", "checkpoint_*", "global_step*", "runs", "logs", "wandb", "mlruns", "tensorboard", "eval",
    "heads", "learner", "onnx", "openvino*", "coreml", "gguf", "original", "*.mlpackage", "*.state", "venv", "node_modules",
)  # fmt: skip
MAX_BYTES = 100 << 20  # of a file or a subfolder: the largest tokenizers have a third of it
MAX_FILES = 1000  # of a subfolder

# Of these, what the tokenizer is made of, so that another model's can be taken whole.
TOKENIZER = (
    "tokenizer*", "tokenization_*.py", "vocab*", "merges.txt", "added_tokens.json", "special_tokens_map.json", "spiece.model",
    "sentencepiece*.model", "*.spm", "*.tiktoken", "tekken.json", "bpe.codes", "dict.txt", "chat_template*", "*.jinja",
)  # fmt: skip
TEMPLATE = "chat_template.jinja"
QUANTISATION = ("quantization_config", "compression_config", "quantization")  # keys of config.json


@dataclass(frozen=True)
class Companions:
    """What goes along with merged weights.

    folder: whose files. tokenizer: another model's, or one to which tokens are added; it and its chat template take the place of
    the folder's. chat_template: a template, in the place of the tokenizer's.
    """

    folder: Path
    tokenizer: MergedTokenizer | None = None
    chat_template: str | None = None

    def check(self) -> None:
        """Raises CheckpointError or OSError where `copy` will meet a file that cannot be read. For use before long work."""
        for folder in {self.folder, self.tokenizer.folder if self.tokenizer else self.folder}:
            for path in sorted(folder.iterdir()) if folder.is_dir() else ():
                if path.is_file() and _goes_along(path) and not os.access(path, os.R_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
                if path.name in ("config.json", "tokenizer_config.json") and path.is_file():
                    read_json(path)

    def copy(self, out_folder: str | Path) -> tuple[str, ...]:
        """Writes them into a folder that exists; returns their names, relative to it."""
        out = Path(out_folder)
        if self.tokenizer is None:
            names = _copied(self.folder, out, companion_files(self.folder))
        else:
            own = [name for name in companion_files(self.folder) if not _is_tokenizers(name)]
            others = [name for name in companion_files(self.tokenizer.folder) if _is_tokenizers(name)]
            names = (*_copied(self.folder, out, own), *_copied(self.tokenizer.folder, out, others))
            names = (*names, *self.tokenizer.add_to(out))
        if self.chat_template is not None:
            names = (*(name for name in names if name != TEMPLATE), *self._write_template(out))
        return tuple(sorted(set(names)))

    def configuration(self, content: dict) -> dict:
        """A config.json with as many tokens as the tokenizer has rows."""
        return content if self.tokenizer is None else self.tokenizer.configuration(content)

    def _write_template(self, out: Path) -> list[str]:
        """The template as a file of its own, and in the tokenizer's configuration, where older versions look for it."""
        assert self.chat_template is not None
        (out / TEMPLATE).write_text(self.chat_template, encoding="utf-8")
        (out / "chat_template.json").unlink(missing_ok=True)
        config = out / "tokenizer_config.json"
        if config.is_file():
            content = read_json(config)
            config.write_text(json.dumps({**content, "chat_template": self.chat_template}, indent=2), encoding="utf-8")
        return [TEMPLATE]


def copy_companions(source: str | Path, out_folder: str | Path) -> tuple[str, ...]:
    """Copies all that stands beside a model's weights, but no weights, no training state, no adapter and no model card.

    source: a model folder or a weight file in one. out_folder: exists.
    Returns the copied names, relative to the folder.
    """
    return Companions(folder_of(source)).copy(out_folder)


def companion_files(source: str | Path) -> list[str]:
    """The names of what goes along from a model folder, relative to it and sorted.

    A subfolder goes along where it holds no weights (they are the model in another form, or of a training run), or where
    modules.json names it as a part of the model: then with its weights.
    """
    folder = folder_of(source)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: no configuration or tokenizer to copy")
    modules = _modules(folder)
    names = []
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            if path.name in modules or not _matches(path.name, FOLDERS):
                names += _of_subfolder(folder, path, is_module=path.name in modules)
        elif path.is_file() and _goes_along(path):
            if path.stat().st_size > MAX_BYTES:
                _left_out(path)
            else:
                names.append(path.name)
    return names


def chat_template(folder: str | Path) -> str | None:
    """The chat template of a model folder; of several, the default one."""
    folder = folder_of(folder)
    if (folder / TEMPLATE).is_file():
        return read_text(folder / TEMPLATE)
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = _json(folder / name).get("chat_template")
        if isinstance(found, list):  # of {"name": …, "template": …}
            found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        if isinstance(found, dict):
            found = found.get("default")
        if isinstance(found, str) and found:
            return found
    return None


def with_dtype(configuration: dict, dtype: torch.dtype) -> dict:
    """A configuration that says that the weights are of ``dtype``, its nested ones (text_config …) too, where they say a type."""
    changed = {
        key: with_dtype(value, dtype)
        if isinstance(value, dict) and key.endswith("_config") and key not in QUANTISATION
        else value
        for key, value in configuration.items()
    }
    keys = [key for key in ("dtype", "torch_dtype") if key in changed]  # torch_dtype: the older name of the same key
    for key in keys[1:]:
        del changed[key]
    for key in keys[:1]:
        changed[key] = str(dtype).removeprefix("torch.")
    return changed


def without_quantisation(configuration: dict) -> dict:
    """A configuration without what it says of quantised weights, since merged ones are not: trainers leave it there when they
    put an adapter into a dequantised model, and transformers would quantise the weights or look for codes."""
    if found := [key for key in QUANTISATION if configuration.get(key)]:
        warnings.warn(f"config.json: {', '.join(found)} is left out, since the merged weights are not quantised", stacklevel=3)
    return {
        key: without_quantisation(value) if isinstance(value, dict) and key.endswith("_config") else value
        for key, value in configuration.items()
        if key not in QUANTISATION
    }


def _of_subfolder(folder: Path, subfolder: Path, *, is_module: bool) -> list[str]:
    files = list(islice(_walk(subfolder), MAX_FILES + 1))
    if not is_module and any(_matches(path.name, WEIGHTS) for path in files):
        return []
    kept = [path for path in files if _goes_along(path) or (is_module and _matches(path.name, WEIGHTS))]
    if not is_module and (len(files) > MAX_FILES or sum(path.stat().st_size for path in kept) > MAX_BYTES):
        _left_out(subfolder)
        return []
    return [path.relative_to(folder).as_posix() for path in kept]


def _left_out(path: Path) -> None:
    warnings.warn(f"{path} is too large for a part of the model and does not go along; copy it if it is one", stacklevel=5)


def _walk(folder: Path) -> Iterator[Path]:
    """The files below a folder, sorted; links to folders are not followed, since they may lead in a circle."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            if not path.is_symlink() and not _matches(path.name, FOLDERS):
                yield from _walk(path)
        elif path.is_file():
            yield path


def _modules(folder: Path) -> set[str]:
    """The subfolders that a sentence-transformers model is made of."""
    try:
        content = parse_json(read_bytes(folder / "modules.json"))
    except (OSError, ValueError):
        return set()
    entries = content if isinstance(content, list) else []
    return {str(entry.get("path", "")).split("/")[0] for entry in entries if isinstance(entry, dict)} - {""}


def _goes_along(path: Path) -> bool:
    return _is_megatrons(path) or not _matches(path.name, WEIGHTS + OTHERS)


def _is_megatrons(path: Path) -> bool:
    """What Megatron-LM keeps beside its checkpoints of torch.distributed, its configuration among it, and loads none without."""
    return path.name == "common.pt" and "sharded_backend" in _json(path.with_name("metadata.json"))


def _is_tokenizers(name: str) -> bool:
    return _matches(name, TOKENIZER) or name.startswith("additional_chat_templates/")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name.lower(), pattern) for pattern in patterns)


def _json(path: Path) -> dict:
    """The object in a JSON file, an empty one where there is none."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}


def _copied(source: Path, out: Path, names: list[str]) -> tuple[str, ...]:
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, out / name)  # what a link leads to, not the link
    return tuple(names)
