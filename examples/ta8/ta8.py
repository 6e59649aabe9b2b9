"""Eight image towers of CLIP ViT-B/32 merged by every recipe beside this file, and judged on their tasks' test pictures.

    pip install ".[cli,hf]" huggingface_hub datasets fusion-bench
    python examples/ta8/ta8.py FOLDER

downloads what FOLDER lacks (models of openai and tanganke, the data sets that these were fine-tuned on, class names and templates
as FusionBench has them), merges, and prints a table of accuracies. FOLDER then holds

    base, sun397, …                     models: the base is the whole CLIP, the experts are image towers
    classes/sun397.txt, templates/…     the task's class names in the order of its labels, and texts with {} in their place
    calibration/sun397/…                unlabelled pictures of the training split
    test/sun397/0/…, test/sun397/1/…    test pictures, in a folder for each label
    merged/samerging, …                 what each recipe made
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import chdir
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, CLIPVisionModel

from samerge_ext.models import find_pictures, picture_batches, read_texts, zero_shot_classification, zero_shot_head
from samerge_ext.recipes.recipe import load_recipe
from samerge_ext.recipes.run import run_recipe

BASE = "openai/clip-vit-base-patch32"
EXPERT = "tanganke/clip-vit-base-patch32_{}"
DATA = {  # task -> data set of the hub, and its configuration where it has several
    "sun397": ("tanganke/sun397",),
    "stanford-cars": ("tanganke/stanford_cars",),
    "resisc45": ("tanganke/resisc45",),
    "eurosat": ("tanganke/eurosat",),
    "svhn": ("ufldl-stanford/svhn", "cropped_digits"),
    "gtsrb": ("tanganke/gtsrb",),
    "mnist": ("ylecun/mnist",),
    "dtd": ("tanganke/dtd",),
}
CALIBRATION = 64  # pictures of each task
BATCH = 64
RECIPES = sorted(Path(__file__).parent.glob("*.yaml"))


def download(folder: Path) -> None:
    """Whatever of the models, texts and pictures the folder lacks."""
    from huggingface_hub import snapshot_download

    for name, source in {"base": BASE, **{task: EXPERT.format(task) for task in DATA}}.items():
        if not (folder / name / "config.json").exists():
            snapshot_download(source, local_dir=folder / name, ignore_patterns=["*.h5", "*.msgpack"])
    for task in DATA:
        if not (folder / "templates" / f"{task}.txt").exists():
            _save_texts(folder, task)
        for place, split in (("calibration", "train"), ("test", "test")):
            if not (folder / place / task).exists():
                _save_pictures(folder / place / task, task, split)


def merge(folder: Path, recipes: list[Path]) -> dict[str, Path]:
    """Recipe's name -> the folder that it was merged to; what is there already is not merged again."""
    made = {recipe.stem: folder / "merged" / recipe.stem for recipe in recipes}
    for recipe in recipes:
        path = recipe.resolve()
        with chdir(folder):  # a recipe's paths are relative to where it is run
            if not (out := Path("merged") / recipe.stem).exists():
                run_recipe(load_recipe(path, {}), out)
    return made


def accuracies(folder: Path, recipes: list[Path]) -> dict[str, dict[str, float]]:
    """Row -> task -> the share of test pictures whose highest logit is their label's."""
    base = CLIPModel.from_pretrained(folder / "base").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    heads = {
        task: zero_shot_head(
            base, tokenizer, read_texts(folder / "classes" / f"{task}.txt"), read_texts(folder / "templates" / f"{task}.txt")
        )
        for task in DATA
    }
    rows = {"pretrained": {task: _accuracy(base, heads, folder, task) for task in DATA}}
    for name, path in merge(folder, recipes).items():
        merged = CLIPModel.from_pretrained(path).eval()
        rows[name] = {task: _accuracy(merged, heads, folder, task) for task in DATA}
    rows["experts"] = {}
    for task in DATA:
        tower = CLIPVisionModel.from_pretrained(folder / task).state_dict()
        base.vision_model.load_state_dict({name.removeprefix("vision_model."): tensor for name, tensor in tower.items()})
        rows["experts"][task] = _accuracy(base, heads, folder, task)
    return rows


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """In per cent, with each row's mean, as Markdown."""
    lines = [f"| | {' | '.join([*DATA, 'mean'])} |", "|---" * (len(DATA) + 2) + "|"]
    for name, of_task in rows.items():
        numbers = [of_task[task] for task in DATA]
        lines.append(f"| {name} | {' | '.join(f'{100 * n:.1f}' for n in [*numbers, sum(numbers) / len(numbers)])} |")
    return "\n".join(lines)


def _save_texts(folder: Path, task: str) -> None:
    from fusion_bench.tasks.clip_classification import get_classnames_and_templates

    classes, templates = get_classnames_and_templates(task)
    for place, texts in (("classes", classes), ("templates", [template("{}") for template in templates])):
        (folder / place).mkdir(parents=True, exist_ok=True)
        (folder / place / f"{task}.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")


def _save_pictures(folder: Path, task: str, split: str) -> None:
    from datasets import load_dataset

    data = load_dataset(*DATA[task], split=split)
    if split == "train":
        data = data.shuffle(seed=0).select(range(CALIBRATION))
    partial = folder.with_name(f"{folder.name}.partial")
    for number, example in enumerate(data):
        place = partial if split == "train" else partial / str(example["label"])
        place.mkdir(parents=True, exist_ok=True)
        example["image"].convert("RGB").save(place / f"{number}.png")
    partial.rename(folder)


@torch.inference_mode()
def _accuracy(model: CLIPModel, heads: Mapping[str, torch.Tensor], folder: Path, task: str) -> float:
    logits, right, total = zero_shot_classification(heads), 0, 0
    for labels, batch in _test_batches(folder, task):
        right += int((logits(model, batch, task).argmax(1) == labels).sum())
        total += len(labels)
    return right / total


def _test_batches(folder: Path, task: str) -> Iterator[tuple[torch.Tensor, Any]]:
    """Labels and pictures, a batch at a time."""
    processor, paths = AutoImageProcessor.from_pretrained(folder / "base"), find_pictures(folder / "test" / task)
    for start in range(0, len(paths), BATCH):
        chunk = paths[start : start + BATCH]
        yield torch.tensor([int(path.parent.name) for path in chunk]), picture_batches(chunk, processor, BATCH)[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    chosen = parser.parse_args().folder
    chosen.mkdir(parents=True, exist_ok=True)
    download(chosen)
    print(table(accuracies(chosen, RECIPES)))
