"""Calibration pictures: found in a folder, made into tensors by a model folder's image processor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samerge_ext.checkpoints.places import folder_of

Batch = dict[str, Tensor]

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".tif", ".tiff", ".webp")
PROCESSORS = ("preprocessor_config.json", "processor_config.json")


def find_pictures(folder: str | Path, limit: int | None = None) -> list[Path]:
    """The picture files in a folder and its subfolders (a class each, say): one of each subfolder in turn, in the order of names.

    Raises ValueError for what is no folder, or has no pictures.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; the calibration of a vision model is a folder of unlabelled pictures")
    by_folder = defaultdict(list)
    for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).parts):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in SUFFIXES and path.is_file() and not hidden:
            by_folder[path.parent].append(path)
    found = [path for path in chain.from_iterable(zip_longest(*by_folder.values())) if path is not None]
    if not found:
        raise ValueError(f"{folder} holds no pictures ({', '.join(SUFFIXES)}), in subfolders neither")
    return found[:limit]


def load_image_processor(folders: Iterable[str | Path]) -> Any:
    """The image processor of the first folder that has one (preprocessor_config.json), in its form that needs Pillow only.

    Raises ValueError where Pillow is missing, where no folder has one, and where it cannot be loaded.
    """
    import transformers

    if find_spec("PIL") is None:
        raise ValueError("pictures are read with Pillow, which is missing; install it: pip install pillow")
    places = list(dict.fromkeys(folder_of(folder) for folder in folders))
    for folder in places:
        if any((folder / name).is_file() for name in PROCESSORS):
            newer = int(transformers.__version__.split(".")[0]) >= 5
            options: dict[str, Any] = {"backend": "pil"} if newer else {"use_fast": False}
            options.update(local_files_only=True, trust_remote_code=False)
            try:
                return transformers.AutoImageProcessor.from_pretrained(folder, **options)
            except (ImportError, KeyError, OSError, TypeError, ValueError) as error:
                raise ValueError(f"{folder} has an image processor that transformers cannot load: {error}") from error
    raise ValueError(
        f"none of {', '.join(map(str, places))} has a {PROCESSORS[0]}; copy that of the model that the experts were fine-tuned "
        "from into the base's folder"
    )


def picture_batches(pictures: Sequence[str | Path], processor: Any, batch_size: int, channels: int = 3) -> list[Batch]:
    """Batches {pixel_values: [B, channels, H, W]}.

    processor: of transformers, or a model folder that has one; or a function of a picture -> tensor [channels, H, W], as the
        transforms of open_clip, timm and torchvision are.
    Raises ValueError, naming the file, for what is no picture and for sizes that the processor leaves apart.
    """
    if isinstance(processor, str | Path):
        processor = load_image_processor([processor])
    batches = []
    for start in range(0, len(pictures), batch_size):
        chunk = pictures[start : start + batch_size]
        opened = [_opened(Path(path), channels) for path in chunk]
        try:
            batches.append({"pixel_values": _processed(opened, processor)})
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{chunk[0]} …: the image processor makes no batch of these pictures: {error}") from error
    return batches


def _processed(pictures: Sequence[Any], processor: Any) -> Tensor:
    """Pictures in memory as [B, channels, H, W]."""
    if hasattr(processor, "model_input_names"):  # of transformers
        return processor(images=pictures, return_tensors="pt")["pixel_values"]
    return torch.stack([processor(picture) for picture in pictures])


def _opened(path: Path, channels: int) -> Any:
    """A picture in memory, with three channels or one."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return picture.convert("L" if channels == 1 else "RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a picture ({error}); remove it or save it again") from error
