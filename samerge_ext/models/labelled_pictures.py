"""Pictures whose subfolders say their classes, class/picture.png, and how many of them a model knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from samerge_ext.checkpoints.reading import shown
from samerge_ext.learning.passes import Logits
from samerge_ext.models.pictures import find_pictures

Reader = Callable[[Sequence[Path], int], list[dict[str, torch.Tensor]]]


def class_folders(folder: Path) -> list[str]:
    """The subfolders that hold pictures, in the order of names. Raises ValueError where pictures lie in none."""
    found = {path.relative_to(folder).parts for path in find_pictures(folder)}
    for parts in found:
        if len(parts) == 1:
            raise ValueError(
                f"{folder / parts[0]} lies in no subfolder, whose name would say its class; put the pictures of each class in one"
            )
    return sorted({parts[0] for parts in found})


def numbers_of_folders(folder: Path, names: Sequence[str], classes: int) -> dict[str, int]:
    """Subfolder -> the number of its class.

    names: of the classes, in the order of their numbers, which subfolders are called by, "_" for a space; or else by the numbers.
    Where no subfolder is called by either and there are as many as classes, they are the classes in the order of their own names,
    as in torchvision's ImageFolder.
    Raises ValueError for a subfolder that is none of the classes.
    """
    plain = [spoken(name) for name in names]
    by_name = {name: number for number, name in enumerate(plain) if plain.count(name) == 1}
    folders = class_folders(folder)
    found = {name: by_name.get(spoken(name), int(name) if name.isdecimal() else -1) for name in folders}
    if all(number == -1 for number in found.values()) and len(folders) == classes:
        return {name: number for number, name in enumerate(folders)}
    for name, number in found.items():
        if not 0 <= number < classes:
            raise ValueError(
                f"{folder / name}: {shown(name)} is none of the {classes} classes, {', '.join(list(names)[:8])}; call the "
                "subfolders by their names or numbers"
            )
    return found


def accuracy(
    logits: Logits, module: Any, folder: Path, task: str, names: Sequence[str], read: Reader, batch_size: int, limit: int | None
) -> tuple[float, int]:
    """The share of pictures whose largest logit is their class's, and how many there are.

    logits, task: as of `samerging`. names: of the classes, as of `numbers_of_folders`. read: makes batches of pictures, of which
    no more than one is in memory.
    """
    pictures = find_pictures(folder, limit)
    numbers: dict[str, int] = {}
    like, right = next(module.parameters()), 0
    with torch.no_grad():
        for start in range(0, len(pictures), batch_size):
            chunk = pictures[start : start + batch_size]
            batch = {name: tensor.to(like) for name, tensor in read(chunk, len(chunk))[0].items()}
            answers = logits(module, batch, task)  # [B, classes]
            numbers = numbers or numbers_of_folders(folder, names, answers.shape[1])
            labels = torch.tensor([numbers[path.relative_to(folder).parts[0]] for path in chunk])
            right += int((answers.argmax(1).cpu() == labels).sum())
    return right / len(pictures), len(pictures)


def spoken(name: str) -> str:
    """A subfolder's name as that of a class."""
    return name.replace("_", " ").strip()
