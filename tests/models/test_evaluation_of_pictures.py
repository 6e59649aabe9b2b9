"""`samerge eval` on folders of pictures, against transformers one picture at a time, and what is refused."""

import json

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import samerge_ext as sm
from samerge_ext.cli.commands import app
from samerge_ext.models.evaluation import evaluate
from samerge_ext.models.pictures import load_image_processor

transformers = pytest.importorskip("transformers")
from clips import CLASSES, TEMPLATES, save_clips, save_tasks  # noqa: E402
from families import make, move, save_pictures  # noqa: E402


def pictures(folder, names, count=6, seed=0):
    """`count` pictures of each class."""
    torch.manual_seed(seed)
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            shade = torch.randint(256, (1, 1, 3)) + torch.randint(-40, 40, (9, 11, 3))
            Image.fromarray(shade.clamp(0, 255).to(torch.uint8).numpy()).save(folder / name / f"{i}.png")
    return folder


def eval_(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def share(answer, processor, folder, numbers):
    """Of pictures in subfolders whose largest logit is of the number of their subfolder."""
    right = []
    with torch.no_grad():
        for name, number in numbers.items():
            for path in (folder / name).iterdir():
                pixels = processor(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"]
                right.append(answer(pixels).argmax().item() == number)
    assert 0 < sum(right) < len(right)
    return sum(right) / len(right)


@pytest.fixture
def classifier(tmp_path):
    """A folder of an image classifier whose three classes have names."""
    model = move(make("vit"), 1, by=0.5)
    model.config.id2label = {0: "sea gull", 1: "owl", 2: "7"}
    model.config.label2id = {name: number for number, name in model.config.id2label.items()}
    model.eval().save_pretrained(tmp_path / "model")
    save_pictures(tmp_path / "unused").save_pretrained(tmp_path / "model")
    return tmp_path, model


@pytest.mark.parametrize(
    "numbers",
    [{"sea_gull": 0, "owl": 1, "7": 2}, {"owl": 1, "7": 2}, {"2": 2, "0": 0}, {"ant": 0, "bee": 1, "cow": 2}],
    ids=["by name", "some", "by number", "in the order of names"],
)
def test_accuracy_of_a_classifier_is_that_of_transformers(classifier, numbers):
    root, model = classifier
    folder = pictures(root / "birds", numbers)
    expected = share(lambda pixels: model(pixels).logits, load_image_processor([root / "model"]), folder, numbers)
    found = evaluate(root / "model", {"birds": folder}, batch_size=5)["birds"]
    assert found.accuracy == pytest.approx(expected) and found.pictures == 6 * len(numbers) and found.texts is None
    assert evaluate(root / "model", {"birds": folder}, limit=len(numbers))["birds"].pictures == len(numbers)


def test_what_the_command_prints_and_refuses(classifier):
    root, _ = classifier
    folder = pictures(root / "birds", ["owl", "sea gull"])
    done = eval_(root / "model", folder)
    assert done.exit_code == 0 and done.output.startswith("birds: accuracy ") and done.output.endswith(" of 12 pictures\n")
    assert json.loads(eval_(root / "model", f"x={folder}", "--json").output)["x"]["pictures"] == 12
    pictures(folder, ["owlet"], 1)
    refused = eval_(root / "model", folder)
    assert refused.exit_code == 1 and "'owlet' is none of the 3 classes, sea gull, owl, 7" in " ".join(refused.output.split())
    Image.new("RGB", (9, 9)).save(folder / "alone.png")
    refused = eval_(root / "model", folder)
    assert refused.exit_code == 1 and "lies in no subfolder, whose name would say its class" in " ".join(refused.output.split())
    refused = eval_(root / "model", folder, "--classes", f"birds={root / 'model' / 'config.json'}")
    assert refused.exit_code == 1 and "classes and templates are CLIP's" in refused.output


def test_a_tasks_own_head_counts_its_own_classes(classifier):
    root, _ = classifier
    for seed, task in enumerate(("a", "b"), 2):
        move(make("vit"), seed, by=0.5).save_pretrained(root / task)
    packed = sm.PackedWeights.from_folders(root / "model", {t: root / t for t in "ab"}, heads="classifier.*")
    sm.average(packed).save_pretrained(root / "merged")
    folder = pictures(root / "kinds", ["owl", "sea gull", "toad"])  # of which the base calls two otherwise
    model = transformers.AutoModelForImageClassification.from_pretrained(root / "a")
    model.load_state_dict(
        {**transformers.AutoModelForImageClassification.from_pretrained(root / "merged").state_dict(), **packed.heads["a"]}
    )
    numbers = {"owl": 0, "sea gull": 1, "toad": 2}
    expected = share(lambda pixels: model.eval()(pixels).logits, load_image_processor([root / "model"]), folder, numbers)
    assert evaluate(root / "merged", {"a": folder})["a"].accuracy == pytest.approx(expected)


def test_clip_by_files_of_class_names_and_by_subfolders(tmp_path):
    save_clips(tmp_path, torch.float32)
    save_tasks(tmp_path)
    numbers = {"goal": 0, "vote": 1, "bad_goal": 2}
    folder = pictures(tmp_path / "sport", numbers, 8)
    (tmp_path / "templates.txt").write_text("\n".join(TEMPLATES))
    model = transformers.CLIPModel.from_pretrained(tmp_path / "base").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    processor = load_image_processor([tmp_path / "base"])

    def expected(names, templates):
        head = sm.models.zero_shot_head(model, tokenizer, names, templates)
        logits = sm.models.zero_shot_classification({"": head})
        counted = {name: names.index(name.replace("_", " ")) for name in numbers}
        return share(lambda pixels: logits(model, pixels, ""), processor, folder, counted)

    given = {"classes": {"sport": tmp_path / "b.txt"}, "templates": {"sport": tmp_path / "templates.txt"}}
    found = evaluate(tmp_path / "base", {"sport": folder}, **given)["sport"].accuracy
    assert found == pytest.approx(expected(CLASSES["b"], TEMPLATES))
    found = evaluate(tmp_path / "base", {"sport": folder})["sport"].accuracy
    assert found == pytest.approx(expected(["bad goal", "goal", "vote"], ["a photo of a {}."]))
    done = eval_(tmp_path / "base", folder, "--classes", f"sport={tmp_path / 'b.txt'}")
    assert done.exit_code == 0 and "of 24 pictures" in done.output
    refused = eval_(tmp_path / "base", folder, "--classes", f"spot={tmp_path / 'b.txt'}")
    assert refused.exit_code == 1 and "given of ['spot'], pictures of ['sport']" in " ".join(refused.output.split())
    refused = eval_(tmp_path / "base", folder, "--classes", f"sport={tmp_path / 'a.txt'}")
    assert refused.exit_code == 1 and "is none of the 2 classes, good rain, sun" in " ".join(refused.output.split())
