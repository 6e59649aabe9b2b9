"""The study of a convolutional network from end to end, on a tiny random one and made pictures, and what it draws and reads."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import assert_close
from PIL import Image
from rich.console import Console
from torch.nn.functional import conv2d, normalize, pad

from samerge_ext.demo import cells, efficientnet, pictures, studies, vision, vision_study
from samerge_ext.demo.corpora import MissingData
from samerge_ext.demo.pictures import Shown, corrupted, split_task
from samerge_ext.demo.studies import run_study

COUNTS = {"train": 24, "tuning": 6, "calibration": 8, "test": 10}
TINY = replace(vision.SMALL, tasks=("colours", "stripes"), side=32, pictures=COUNTS, steps=24, batch=8, learning_rate=1e-3)
REAL_STAGES, STAGES = efficientnet.STAGES, ((1, 3, 1, 1, 8), (2, 3, 2, 2, 12), (1, 5, 2, 2, 16))
REAL_READERS = pictures.READERS


def picture(kind, label, i):
    """16 × 16 of one colour of three, or of stripes in one of two directions, a little different each."""
    image = Image.new("RGB", (16, 16), (i % 40, 60 + i % 50, 90))
    for x in range(16):
        for y in range(16):
            if kind == "colours":
                image.putpixel((x, y), tuple(200 + i % 50 if channel == label else (x * i) % 60 for channel in range(3)))
            elif (x, y)[label] // 2 % 2:
                image.putpixel((x, y), (220 - i, 200, 180 + i % 70))
    return image


def made(kind):
    classes = {"colours": ("red", "green", "blue"), "stripes": ("upright", "level")}[kind]
    labels = [i % len(classes) for i in range(48)]
    return classes, [Shown(partial(picture, kind, label, i), label, str(i // 2)) for i, label in enumerate(labels)]


def tiny_network(with_classes=False):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return efficientnet.EfficientNet().eval()


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Runs the study; called again, it continues from the same cache."""
    root = tmp_path_factory.mktemp("vision")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studies, "SMALL_VISION", TINY)
        patch.setattr(efficientnet, "STAGES", STAGES)
        patch.setattr(vision, "load_efficientnet", tiny_network)
        patch.setattr(pictures, "READERS", {kind: partial(made, kind) for kind in TINY.tasks})
        patch.setattr(vision_study, "STEPS", 2)
        patch.setattr(cells, "SCALES", (0.3, 0.6))
        patch.setattr(vision_study, "CORRUPTIONS", {"noise": (0.2,), "blur": (1.0,)})

        def run(name="vision", seeds=1):
            options = {"full": False, "seeds": seeds, "out": root / "out", "cache": root / "cache", "progress": False}
            return run_study(name, console=Console(record=True, width=200), **options), root

        yield run


def test_every_row_is_in_the_table_and_corrupted_pictures_in_another(study):
    found, root = study()
    labels = [row.label for row in vision_study.vision_rows()]
    assert [cell.method for cell in found[: len(labels)]] == labels
    assert [set(cell.accuracies) for cell in found[: len(labels)]] == [set(TINY.tasks)] * len(labels)
    rest = [row.label for row in vision_study.corrupted_rows()]
    corrupted = found[len(labels) :]
    assert [cell.method for cell in corrupted] == rest
    assert all(set(cell.accuracies) == {"clean", "noise 0.2", "blur 1"} for cell in corrupted)
    table = (root / "out/vision-small.md").read_text()
    assert all(f"| {label} |" in table for label in labels)


def test_averaged_statistics_are_the_mean_of_the_experts_own(study):
    _, root = study()
    bench = vision.VisionBench(TINY, 0, root / "cache", progress=False)
    assert torch.equal(bench.packed.merged_buffers()["bn1.running_mean"], tiny_network().bn1.running_mean)
    bench = bench.with_own_statistics()
    base, *experts = (bench.load(folder).state_dict()["bn1.running_mean"] for folder in (bench.base, *bench.experts.values()))
    assert not torch.equal(experts[0], base) and not torch.equal(experts[0], experts[1])
    assert_close(bench.packed.merged_buffers()["bn1.running_mean"], (experts[0] + experts[1]) / 2)
    found, _ = study("vision-statistics")
    assert [cell.method for cell in found] == [row.label for row in vision_study.statistics_rows()]


def test_experts_learn_and_keep_the_pretrained_statistics(study):
    tasks = pictures.load_picture_tasks(TINY.tasks, TINY.side, TINY.pictures)
    drawn = torch.Generator().manual_seed(0)  # heads that the pretrained network knows nothing of
    heads = vision.Heads(
        {
            name: normalize(torch.randn(len(task.classes), efficientnet.FEATURES, generator=drawn), dim=-1)
            for name, task in tasks.items()
        }
    )
    judge = vision.PictureEvaluator({name: task.test for name, task in tasks.items()}, heads, "test pictures")
    before = judge.accuracies(tiny_network())
    protocol = replace(TINY, learning_rate=3e-3)
    for name, task in tasks.items():
        expert = vision.fine_tune(task, heads, protocol, seed=0)
        assert before[name] < 0.75 < judge.accuracy(expert, name)
        assert torch.equal(expert.bn1.running_mean, tiny_network().bn1.running_mean)


def test_the_base_is_the_pretrained_network(study):
    _, root = study()
    bench = vision.VisionBench(TINY, 0, root / "cache", progress=False)
    kept = bench.module().state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in tiny_network().state_dict().items())


def test_a_reestimated_row_is_the_merge_before_it_with_other_statistics(study):
    _, root = study()
    bench = vision.VisionBench(TINY, 0, root / "cache", progress=False)
    by_label = {row.label: row for row in vision_study.vision_rows()}
    plain = cells.merged_again(bench, by_label["SAMerging"])
    again = cells.merged(bench, by_label["SAMerging, BatchNorm re-estimated"])
    assert torch.equal(plain.merged, again.merged)
    assert not torch.equal(plain.module.bn1.running_mean, again.module.bn1.running_mean)
    learned = json.loads(cells.cell_path(bench, by_label["SAMerging"], "test").read_text())
    assert learned["steps"] == 2


def test_finished_cells_are_not_computed_again(study, monkeypatch):
    before, _ = study()
    monkeypatch.setattr(cells, "merged", lambda *_: pytest.fail("computed again"))
    monkeypatch.setattr(vision, "fine_tune", lambda *_: pytest.fail("computed again"))
    assert study()[0] == before


def test_rates_are_chosen_on_tuning_pictures(study):
    found, root = study("vision-tuning")
    assert len(found) == sum(map(len, vision_study.TRIED.values()))
    assert "accuracy on tuning pictures" in (root / "out/vision-tuning-small.md").read_text()
    assert all(rate in vision_study.TRIED[kind] for kind, rate in vision_study.RATES.items())


def test_the_study_has_no_full_variant(tmp_path):
    with pytest.raises(ValueError, match="leave out --full"):
        run_study("vision", full=True, seeds=1, out=tmp_path, cache=tmp_path, progress=False, console=Console())


def test_splits_share_nothing_that_is_shown_twice():
    classes, shown = made("colours")
    task = split_task("colours", classes, shown, 16, COUNTS | {"test": 7})  # 7 is in the middle of a pair
    held = {name: getattr(task, name).pictures for name in pictures.SPLITS}
    assert {name: len(found) for name, found in held.items()} == {"test": 6, "calibration": 8, "tuning": 6, "train": 24}
    group = {pictures.as_pixels(one.draw(), 16).numpy().tobytes(): one.group for one in shown}
    groups = [{group[picture.numpy().tobytes()] for picture in found} for found in held.values()]
    assert sum(map(len, groups)) == len(set().union(*groups))
    labels = {pictures.as_pixels(one.draw(), 16).numpy().tobytes(): one.label for one in shown}
    assert task.test.labels.tolist() == [labels[picture.numpy().tobytes()] for picture in task.test.pictures]


def test_too_few_pictures_are_named():
    classes, shown = made("colours")
    with pytest.raises(ValueError, match="'colours' has 48 pictures"):
        split_task("colours", classes, shown, 16, COUNTS | {"test": 48})


def test_corruptions_are_what_they_say():
    grey = torch.full((2, 3, 64, 64), 128, dtype=torch.uint8)
    assert corrupted(grey, "noise", 0.1).float().std().item() / 255 == pytest.approx(0.1, rel=0.02)
    assert torch.equal(corrupted(grey, "noise", 0.1), corrupted(grey, "noise", 0.1))
    assert torch.equal(corrupted(grey, "blur", 2.0), grey) and torch.equal(corrupted(grey, "contrast", 0.1), grey)
    halves = grey.clone()
    halves[..., :32], halves[..., 32:] = 28, 228
    assert corrupted(halves, "contrast", 0.5)[0, 0, 0].unique().tolist() == [78, 178]
    # Across an edge a Gaussian's distribution function: one deviation from it, at 1.5 pixels of 1.5, is 16 %.
    at = corrupted(halves, "blur", 1.5)[0, 0, 30, 33].item()
    assert at == pytest.approx(28 + 200 * (1 - 0.159), abs=3)
    with pytest.raises(ValueError, match="choose noise, blur or contrast"):
        corrupted(grey, "fog", 1.0)


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("side", [8, 16])
def test_a_strided_convolution_is_padded_as_tensorflow_does(kernel, side):
    layer = efficientnet.SameConv2d(2, 3, kernel, stride=2)
    inputs = torch.randn(1, 2, side, side, generator=torch.Generator().manual_seed(0))
    missing = (side // 2 - 1) * 2 + kernel - side
    around = (missing // 2, missing - missing // 2) * 2
    assert_close(layer(inputs), conv2d(pad(inputs, around), layer.weight, stride=2))


def test_the_network_has_the_tensors_of_the_package(monkeypatch):
    monkeypatch.setattr(efficientnet, "STAGES", REAL_STAGES)
    try:
        module = efficientnet.load_efficientnet(with_classes=True)  # strict
    except MissingData as error:
        pytest.skip(str(error))
    assert sum(parameter.numel() for parameter in module.parameters()) == 4_652_008
    with torch.no_grad():
        assert module(torch.zeros(1, 3, 64, 64)).shape == (1, efficientnet.FEATURES)


def test_what_is_missing_comes_with_the_command_that_fetches_it(tmp_path):
    with pytest.raises(MissingData, match="apt-get install no-such-package"):
        pictures.debian_file("no-such-package", "usr/share/no-such/*.gz", tmp_path)
    unpacked = tmp_path / "debian/usr/share/some"
    unpacked.mkdir(parents=True)
    (unpacked / "file.gz").touch()
    assert pictures.debian_file("some-package", "usr/share/so*/file.gz", tmp_path) == unpacked / "file.gz"


@pytest.mark.parametrize("name", REAL_READERS)
def test_real_pictures_are_read(name):
    try:
        classes, shown = REAL_READERS[name]()
    except MissingData as error:
        pytest.skip(str(error))
    assert {one.label for one in shown} == set(range(len(classes)))
    assert pictures.as_pixels(shown[0].draw(), 32).float().std() > 0
