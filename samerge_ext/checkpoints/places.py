"""Where models lie: which file of a folder is a model's weights, and which are an adapter's. Goes by names, and reads none."""

from __future__ import annotations

import re
from pathlib import Path

from samerge_ext.checkpoints.reading import CheckpointError

METADATA = ".metadata"  # of a checkpoint of torch.distributed.checkpoint
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
# What a folder's weights are called; where it holds several, the first counts, as in transformers. Those of open_clip may lie
# beside the same model as transformers has it.
WEIGHTS = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json", *OPEN_CLIP_WEIGHTS,
    METADATA,
)  # fmt: skip
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
SHARD = re.compile(r"-\d{5}-of-(\d{5})\.(\w+)$")
OTHER_FORMATS = (".h5", ".msgpack", ".onnx", ".npz", ".ot", ".tflite", ".index")
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def folder_of(path: str | Path) -> Path:
    """The model folder that a path, a folder or a file in one, stands for."""
    path = Path(path)
    return path.parent if path.is_file() else path


def holds_model(folder: Path) -> bool:
    """Whether a folder holds the weights of a full model, whatever else."""
    return any((folder / name).is_file() for name in WEIGHTS)


def find_weights(path: Path, *, beside_adapter: bool = False) -> Path:
    """The weight file or index that a path stands for.

    beside_adapter: also where an adapter lies in its folder. Raises CheckpointError, naming what the path has and what to pass.
    """
    if path.is_file():
        if path.name.startswith("adapter_model."):
            raise _adapter(path)
        if (shard := SHARD.search(path.name)) and int(shard[1]) > 1:
            raise CheckpointError(f"{path} is one of {int(shard[1])} shards; pass its folder, or the index beside it")
        return path
    if not path.is_dir():
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise CheckpointError(f"{path} is neither a folder nor a file{where}; download the model first and pass its folder")
    if (path / ADAPTER_CONFIG).exists():
        if not holds_model(path):
            raise _adapter(path)
        if any((path / name).is_file() for name in ADAPTER_WEIGHTS) and not beside_adapter:
            raise CheckpointError(
                f"{path} holds a model and a PEFT adapter, which transformers puts on top of it: merge the two, or move the "
                "files of one to a folder of its own"
            )
    for name in WEIGHTS:
        if (path / name).is_file():
            return path / name
    if adapters := sorted(file.parent.name for file in path.glob("*/adapter_config.json")):  # where PEFT saves those with a name
        raise CheckpointError(f"{path} holds PEFT adapters in folders of their own; pass one of them: {', '.join(adapters)}")
    raise CheckpointError(f"{path} holds none of {', '.join(WEIGHTS)}; {_instead(path)}")


def _instead(folder: Path) -> str:
    """What to do about a folder that does not hold a model's weights: by what it holds."""
    names = sorted(file.name for file in folder.iterdir() if file.suffix in SUFFIXES)
    if shards := [name for name in names if SHARD.search(name)]:
        index = SHARD.sub(r".\2.index.json", shards[0])
        return f"it has shards ({shards[0]} …) without their index: download {index}"
    if names:
        return f"pass one of its files by name: {', '.join(names)}"
    if models := sorted(place.name for place in folder.iterdir() if place.is_dir() and holds_model(place)):
        return f"pass one of the models in it: {', '.join(models)}"
    if list(folder.glob("global_step*")):
        return "it is a checkpoint of DeepSpeed: make a model of it with its zero_to_fp32.py"
    if list(folder.glob("**/*.distcp")):
        return "it is a checkpoint of torch.distributed.checkpoint without its .metadata: copy that too"
    if files := sorted(file.name for file in folder.glob("*.gguf")):
        return f"make a model of {files[0]} with `samerge from-gguf`"
    if others := sorted(file.name for file in folder.iterdir() if file.suffix in OTHER_FORMATS):
        return f"{others[0]} is of another format: download the model's weights as safetensors, or save them so with transformers"
    return "download the model's weights"


def _adapter(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is a PEFT adapter (adapter_config.json), not a model: pass its folder as an expert of its base, or load it "
        "with peft, call merge_and_unload() and save the model that it returns"
    )


def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds a PEFT adapter of a base that lies elsewhere."""
    return (Path(path) / ADAPTER_CONFIG).is_file() and not holds_model(Path(path))
