"""The examples on tiny models, in the folders that they would download."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from PIL import Image

transformers = pytest.importorskip("transformers")
from clips import TEMPLATES, clip, tower  # noqa: E402
from families import SPECIAL, WORDS, move, save_pictures, save_tokenizer  # noqa: E402

TA8 = ROOT / "examples" / "ta8"
pytestmark = pytest.mark.skipif(not TA8.exists(), reason="needs the source tree")


@pytest.fixture
def ta8():
    spec = importlib.util.spec_from_file_location("ta8", TA8 / "ta8.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def classes_of(task):
    return ["good rain", "sun", "vote", "goal"][: 2 + len(task) % 3]


@pytest.fixture
def folder(tmp_path, ta8):
    """All that is downloaded: of every task a model, texts, and pictures of random colours, in the test split by their labels."""
    base = clip(dtype=torch.float32)
    base.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    assert len(SPECIAL) + len(WORDS) <= base.config.text_config.vocab_size
    save_pictures(tmp_path / "unused", count=1).save_pretrained(tmp_path / "base")
    for seed, task in enumerate(ta8.DATA, 1):
        expert = clip(dtype=torch.float32)
        move(expert.vision_model, seed)
        tower(expert).save_pretrained(tmp_path / task)
        for place, texts in (("classes", classes_of(task)), ("templates", TEMPLATES)):
            (tmp_path / place).mkdir(exist_ok=True)
            (tmp_path / place / f"{task}.txt").write_text("\n".join(texts) + "\n")
        torch.manual_seed(seed)
        for number in range(6):
            label = str(number % len(classes_of(task)))
            for path in (tmp_path / "calibration" / task, tmp_path / "test" / task / label):
                path.mkdir(parents=True, exist_ok=True)
                Image.fromarray(torch.randint(256, (8, 8, 3), dtype=torch.uint8).numpy()).save(path / f"{number}.png")
    return tmp_path


def literal_accuracy(model, folder, task):
    """By transformers' own embeddings of the pictures and of the texts, which are averaged here."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
    processor = transformers.AutoImageProcessor.from_pretrained(folder / "base")
    paths, names = sorted((folder / "test" / task).rglob("*.png")), classes_of(task)
    texts = [template.replace("{}", name) for name in names for template in TEMPLATES]
    tokens = tokenizer(texts, padding=True, return_token_type_ids=False, return_tensors="pt")
    with torch.no_grad():
        out = model(**tokens, **processor(images=[Image.open(path) for path in paths], return_tensors="pt"))
    means = out.text_embeds.view(len(names), len(TEMPLATES), -1).mean(1)
    found = (out.image_embeds @ (means / means.norm(dim=1, keepdim=True)).T).argmax(1)
    return (found == torch.tensor([int(path.parent.name) for path in paths])).float().mean().item()


def test_ta8_merges_and_judges_its_folders(ta8, folder, tmp_path_factory):
    recipes = []
    for path in ta8.RECIPES:
        recipes.append(tmp_path_factory.mktemp("recipes") / path.name)
        recipes[-1].write_text(re.sub(r"steps: \d+", "steps: 2, progress: false", path.read_text()))
    rows = ta8.accuracies(folder, recipes)
    assert list(rows) == ["pretrained", "samerging", "task_arithmetic", "wudi", "experts"]
    for name in ("pretrained", "samerging", "task_arithmetic", "wudi"):
        place = folder / ("base" if name == "pretrained" else f"merged/{name}")
        model = transformers.CLIPModel.from_pretrained(place).eval()
        assert rows[name] == pytest.approx({task: literal_accuracy(model, folder, task) for task in ta8.DATA}), name
    for seed, task in enumerate(ta8.DATA, 1):
        expert = clip(dtype=torch.float32)
        move(expert.vision_model, seed)
        assert rows["experts"][task] == pytest.approx(literal_accuracy(expert, folder, task)), task
    assert len({tuple(of_task.values()) for of_task in rows.values()}) > 2, "all rows are alike"
    lines = ta8.table(rows).splitlines()
    assert lines[0].startswith("| | sun397 | stanford-cars |") and len(lines) == 2 + len(rows)
    assert lines[2].startswith(f"| pretrained | {100 * rows['pretrained']['sun397']:.1f} |")
    assert {line.count("|") for line in lines} == {11}


def test_recipes_of_ta8_are_of_the_tasks_that_are_downloaded(ta8, folder, monkeypatch):
    from samerge_ext.recipes.recipe import load_recipe

    monkeypatch.chdir(folder)
    for path in ta8.RECIPES:
        recipe = load_recipe(path, {})
        assert recipe.tasks == list(ta8.DATA) and recipe.base_model == Path("base")
        assert recipe.calibration is None or [*recipe.calibration.classes] == list(ta8.DATA)
