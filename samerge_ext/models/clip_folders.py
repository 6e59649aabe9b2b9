"""CLIP in model folders, of transformers and of open_clip: heads of files of class names, and open_clip's own modules."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from samerge_ext.checkpoints.advice import some
from samerge_ext.checkpoints.architecture import bounded_by_tensors
from samerge_ext.checkpoints.converted import Conversion
from samerge_ext.checkpoints.folder import open_checkpoint
from samerge_ext.checkpoints.places import OPEN_CLIP_WEIGHTS, find_weights, folder_of
from samerge_ext.checkpoints.reading import CheckpointError, cut, read_json
from samerge_ext.checkpoints.sources import CheckpointSource
from samerge_ext.models.on_meta import fill
from samerge_ext.models.texts import load_tokenizer, read_texts
from samerge_ext.models.zero_shot import TEMPLATES, zero_shot_head
from samerge_ext.packing.packed_weights import PackedWeights

OPEN_CLIP = "open_clip_config.json"
IMAGE_TOWER = ("vision_model.", "visual_projection.", "visual.")  # as transformers and open_clip call it; all else makes heads


def zero_shot_heads(
    module: Any, base: Path, conversion: Conversion, classes: Mapping[str, Path], templates: Mapping[str, Path]
) -> dict[str, Tensor]:
    """Task -> the head [classes, width] that the base's text tower makes of a file of class names, one a line, and of one of
    templates, texts with {} in the name's place (`zero_shot.TEMPLATES` for tasks without).

    module: on `meta`, where it stays; the text tower is read and let go again.
    Raises ValueError, naming the file, for texts that make no head, and for a model that is built otherwise than CLIP.
    """
    towers = [prefix[:-1] for prefix in IMAGE_TOWER if hasattr(module, prefix[:-1])]
    if not towers or not hasattr(module, "logit_scale"):
        raise ValueError(
            f"{type(module).__name__} is built otherwise than CLIP, without logit_scale or an image tower "
            f"({', '.join(IMAGE_TOWER)}): merge it in Python, with your own logits function"
        )
    names = {task: read_texts(path) for task, path in classes.items()}
    patterns = {task: read_texts(path) for task, path in templates.items()}
    model = deepcopy(module).eval()
    for name in towers:
        setattr(model, name, None)
    with open_checkpoint(base) as checkpoint:
        source = conversion.base(CheckpointSource(checkpoint, "base"))
        lacking = fill(model, ((n, source.read(n)) for n in source.names if not n.startswith(IMAGE_TOWER)), torch.float32)
    if lacking:
        raise ValueError(f"{base} lacks {some(lacking)}, without which no heads are made of class names")
    tokenizer = clip_tokenizer(base, module)
    heads = {}
    for task, of_task in names.items():
        try:
            heads[task] = zero_shot_head(model, tokenizer, of_task, patterns.get(task, TEMPLATES))
        except ValueError as error:
            also = f" and {templates[task]}" if task in templates else ""
            raise ValueError(f"{classes[task]}{also}: {error}") from error
    return heads


def check_text_tower(packed: PackedWeights) -> None:
    """Raises ValueError where an expert's text tower is not the base's, of which the heads are made."""
    moved = [n for n in packed.layout.names if n not in packed.unchanged and not n.startswith(IMAGE_TOWER)]
    if moved:
        raise ValueError(
            f"experts change the base's {some(moved)}, and heads are made by the base's text tower: save the experts' image "
            "towers alone (CLIPVisionModel, or open_clip's visual.*) and keep the rest, or merge in Python with heads of "
            "zero_shot_head(expert, …)"
        )


def is_open_clip(path: Path) -> bool:
    """Whether a model's folder, or file in one, is open_clip's; one that is transformers' too is so where a file of open_clip's
    is named."""
    folder = folder_of(path)
    if not (folder / OPEN_CLIP).is_file():
        return False
    return not (folder / "config.json").is_file() or find_weights(path).name in OPEN_CLIP_WEIGHTS


def empty_open_clip(base: Path) -> Any:
    """open_clip's model of a folder's configuration, its parameters on `meta` and its buffers there.

    Raises ValueError where open_clip is missing, where it cannot make the model, and for a text tower that it would load from the
    hub.
    """
    folder = folder_of(base)
    if find_spec("open_clip") is None:
        raise ValueError(f"{folder} is a model of open_clip, which is missing; install it: pip install open_clip_torch")
    parts = {key: value for key, value in _content(folder).items() if isinstance(value, dict)}
    if "hf_model_name" in parts.get("text_cfg", {}):
        raise ValueError(f"{folder / OPEN_CLIP}: its text tower is of the hub, which nothing is loaded from; merge in Python")
    settings = {f"{part}.{key}": value for part, content in parts.items() for key, value in content.items()}
    with bounded_by_tensors(base, OPEN_CLIP, settings), _quiet():
        import open_clip

        try:
            model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
        except CheckpointError:
            raise
        except Exception as error:  # of any type: its configuration may hold anything
            raise ValueError(f"open_clip makes no model of {folder / OPEN_CLIP}: {cut(str(error), 500)}") from error
    for part in model.modules():
        for leaf, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
    return model.eval()


def open_clips_transform(model: Any) -> Any:
    """What makes a tensor [3, H, W] of a picture, as the model's folder says."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    return image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)


def clip_tokenizer(base: Path, module: Any) -> Any:
    """The tokenizer of a folder of either library, whose model ``module`` is."""
    if not is_open_clip(base):
        return load_tokenizer([base], module.config)
    import open_clip

    return open_clip.get_tokenizer(f"local-dir:{folder_of(base)}")


def _content(folder: Path) -> dict:
    content = read_json(folder / OPEN_CLIP)
    if not isinstance(content.get("model_cfg"), dict):
        raise CheckpointError(f"{folder / OPEN_CLIP} has no model_cfg, which describes the model; download it again")
    return content["model_cfg"]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without open_clip's warning that a model has no weights, which it has not been given."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
