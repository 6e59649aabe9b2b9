"""Reports: pages that hold whatever tasks are called, the hub's metadata, code that loads nothing else than it says."""

import json
import re
from html.parser import HTMLParser

import pytest
import yaml
from helpers import ROOT

from samerge_ext.checkpoints.reading import CheckpointError
from samerge_ext.reports import comparison, inputs
from samerge_ext.reports.card import model_card
from samerge_ext.reports.chart import MOST_POINTS, chart
from samerge_ext.reports.heat_map import LEGIBLE, heat_map, layer_groups
from samerge_ext.reports.loading import loading_code
from samerge_ext.reports.page import learning_charts
from samerge_ext.reports.report import Report, read_report
from samerge_ext.reports.writing import rewrite

HOSTILE = '<script src="https://example.org/x.js">alert(1)</script>'
TASKS = (HOSTILE, "a|b `c`", "plain")
LAYERS = [f"model.layers.{i // 12}.part.{i % 12}.weight" for i in range(300)]
VOID = {"meta", "link", "rect", "line"}  # written without an end


def report(tasks=TASKS, layers=LAYERS, shift=0.0, **keys):
    count = len(tasks)
    rows = [[1.0 - 0.1 * abs(i - j) for j in range(count)] for i in range(count)]
    history = [{"step": i, "loss": 2 / (i + 1), "losses": dict.fromkeys(tasks, 0.5), "gradient_norm": 0.1} for i in range(900)]
    models = [{"name": task, "role": "expert", "path": f"experts/{task}", "hub": None, "files": []} for task in tasks]
    known = {"name": "base", "role": "base", "path": "base", "hub": "owner/base", "files": []}
    known["files"] = [{"file": "model.safetensors", "bytes": 12, "fingerprint": "ab"}]
    return Report(
        "samerging",
        [known, *models],
        config={"rho": 0.07, "seed": 3, "note": HOSTILE},
        recipe={"merge_method": "samerging", "note": "```\n# no heading\n```"},
        versions={"samerge_ext": "1"},
        coefficients={t: {layer: shift + 0.3 - 0.002 * i for i, layer in enumerate(layers)} for t in tasks},
        history=history,
        merged={"tensors": 300, "numbers": 1200, "dtypes": ["float32"]},
        heads=list(tasks),
        run={"seconds": 1.5, "peak_bytes": 2 * 10**9, "planned_bytes": None, "device": "cpu"},
        similarity={
            "of": "task vectors", "models": list(tasks), "cosines": rows, "conflicts": rows,
            "layers": {"cosine": dict.fromkeys(layers, 0.1), "sign conflicts": dict.fromkeys(layers, 0.4)},
            "norms": {task: dict.fromkeys(layers, 2.0) for task in tasks},
        },
        scores={tasks[0]: {"file": "test.jsonl", "texts": 1234, "accuracy": 0.75}},
        loss_slice={"distances": [-0.1, 0.0, 0.1], "losses": [1.0, 0.9, 1.1], "gradient_norm": 0.2, "batches": 4},
        **keys,
    )  # fmt: skip


def folder(path, **keys):
    path.mkdir()
    (path / "report.json").write_text(report(**keys).to_json(), encoding="utf-8")
    (path / "model.safetensors").write_bytes(b"x" * 100)
    return path


class Page(HTMLParser):
    """What a page is made of. Raises AssertionError for tags that do not close each other."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.headings, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    root = tmp_path_factory.mktemp("pages")
    a, b = folder(root / "a"), folder(root / "b", shift=0.1)
    return {
        "report": rewrite(a, read_report(a)).read_text(encoding="utf-8"),
        "comparison": comparison.as_page(comparison.compared(a, b)),
    }


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_a_page_loads_and_runs_nothing_and_reads_in_order(pages, name):
    page = Page(pages[name])
    tags = [tag for tag, _ in page.tags]
    assert "script" not in tags and tags.count("h1") == 1 and tags.count("main") == 1
    assert all(below - above <= 1 for above, below in zip(page.headings, page.headings[1:])), page.headings
    assert HOSTILE in "".join(page.words), "it is text"
    for tag, attributes in page.tags:
        loads = [attributes.get(key) or "" for key in ("src", "href", "xlink:href", "action", "data")]
        assert all(value in ("", "data:,") for value in loads), (tag, attributes)
        assert not any(key.startswith("on") or key == "id" for key in attributes), (tag, attributes)
        if tag == "th":
            assert attributes.get("scope") in ("row", "col")
        if tag == "svg" or "tabindex" in attributes:
            assert attributes.get("aria-label"), (tag, attributes)
    assert not re.findall(r"url\(|@import", pages[name])
    assert 'content="light dark"' in pages[name] and "prefers-color-scheme: dark" in pages[name]


def test_every_section_is_there(pages):
    words = "".join(Page(pages["report"]).words)
    sections = ("Load it", "What was merged", "Coefficients", "Learning", "The loss around λ", "Sign conflicts", "Configuration")
    assert all(text in words for text in sections)
    assert "Time and memory" in words and "2 GB" in words and "planned" not in words, "what is not known has no row"
    assert words.count(LAYERS[7]) == 3, "once in the map of λ, of similarity and of norms"
    assert "What it scores" in words and "accuracy 75.00%" in words and "1234" in words


def luminance(colour):
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_contrast_in_light_and_dark():
    """WCAG 2: 4.5 for text, 3 for what is drawn."""
    style = (ROOT / "samerge_ext/reports/templates/frame.html").read_text(encoding="utf-8")
    schemes = [dict(re.findall(r"--([\w-]+): (#\w+)", block)) for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)]
    assert len(schemes) == 2
    for colours in schemes:

        def contrast(one, other, colours=colours):
            low, high = sorted((luminance(colours[one]), luminance(colours[other])))
            return (high + 0.05) / (low + 0.05)

        assert min(contrast(text, page) for text in ("text", "quiet") for page in ("page", "block")) >= 4.5
        assert min(contrast(drawn, "page") for drawn in ("more", "less", *(f"c{i}" for i in range(8)))) >= 3


def test_layers_are_grouped_by_block():
    names = [
        "embeddings.word_embeddings.weight", "embeddings.LayerNorm.bias", "encoder.layer.0.attention.self.query.weight",
        "encoder.layer.0.output.dense.bias", "encoder.layer.10.output.dense.bias", "pooler.dense.weight",
    ]  # fmt: skip
    assert layer_groups(names) == ([0, 2, 4, 5], ["embeddings", "layer 0", "layer 10", "pooler"])


def test_labels_of_a_map_do_not_lie_over_each_other():
    narrow = heat_map("λ", {"t": {f"layers.{i}.w": -0.5 for i in range(300)}})
    assert narrow.upright and all(b - a >= LEGIBLE for (a, _), (b, _) in zip(narrow.labels, narrow.labels[1:]))
    assert narrow.limit == 0.5 and narrow.columns[0][2] == [(0, True, 1.0)] and narrow.width == 300 * narrow.cell
    assert heat_map("λ", {"t": {"a.0.w": 0.0}}).limit == 0, "nothing is divided by it"


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [2e-9, 5e-9], [-3.0, 1e6], list(range(5000))])
def test_curves_lie_within_their_chart(values):
    drawn = chart("loss", {"a": list(enumerate(map(float, values)))})
    places = [tuple(map(float, point.split(","))) for point in drawn.curves[0][1].split()]
    assert 1 <= len(places) <= MOST_POINTS
    assert all(drawn.left <= x <= drawn.right and 0 <= y <= drawn.bottom for x, y in places)
    assert len({text for _, text in drawn.y_ticks}) == len(drawn.y_ticks) <= 8


def test_a_card_has_the_hubs_metadata_and_keeps_names_in_their_cells():
    card = model_card(report(), loading_code("merged", None), "transformers")
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata == {
        "base_model": ["owner/base"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "samerge_ext"],
    }
    assert r"a\|b \`c\`" in card and "<script" not in card.split("## Recipe")[0]
    assert "````yaml" in card, "a fence longer than the one inside"
    unknown = report()
    unknown.models[0]["hub"] = None
    assert yaml.safe_load(model_card(unknown, "").split("---\n")[1]) == {"tags": ["merge", "samerge_ext"]}


def test_the_hubs_name_is_that_of_its_cache(tmp_path):
    cache = tmp_path / "models--owner--some-model" / "snapshots" / "0a1b"
    assert inputs.hub_name(cache) == "owner/some-model"
    assert inputs.hub_name("models--gpt2/snapshots/1") == "gpt2"
    assert inputs.hub_name(tmp_path / "owner" / "model") is None


def test_fingerprints_tell_files_of_one_size_apart(tmp_path):
    (tmp_path / "a").write_bytes(bytes(200_000))
    (tmp_path / "b").write_bytes(bytes(199_999) + b"\1")
    (tmp_path / "c").write_bytes(bytes(200_000))
    a, b, c = (inputs.fingerprint(tmp_path / name) for name in "abc")
    assert a == c != b


@pytest.mark.parametrize("hostile", [["x; import os"], ["class"], [""], [3], 3, []])
def test_nothing_of_a_configuration_gets_into_code(hostile):
    code = loading_code('a"\nb', {"model_type": "bert", "architectures": hostile}, ["it's"])
    compile(code, "loading", "exec")
    assert "AutoModel.from_pretrained" in code and "import os" not in code


def test_a_report_that_is_none_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="holds no report.json"):
        read_report(tmp_path)
    for content in ({}, {"method": 3}, {"method": "ties", "more": 1}):
        (tmp_path / "report.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match="no report of this version"):
            read_report(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps({"method": "ties", "models": [{"name": "a"}]}))
    with pytest.raises(CheckpointError, match="no report of this version"):
        rewrite(tmp_path, read_report(tmp_path))


def test_a_card_that_is_there_stays(tmp_path):
    made = folder(tmp_path / "made")
    (made / "README.md").write_text("mine")
    rewrite(made, read_report(made))
    assert (made / "README.md").read_text() == "mine" and (made / "report.html").is_file()


def test_two_merges_side_by_side(tmp_path):
    a, b = folder(tmp_path / "a", tasks=("x", "y")), folder(tmp_path / "b", tasks=("y", "z"), shift=-0.25)
    found = comparison.compared(a, b)
    assert [row[0] for row in found.coefficients] == ["y"] and found.coefficients[0][3] == "0.25"
    text = comparison.as_text(found)
    assert "models.x.from" in text and "100 B" in text and "config.rho" not in text
    scores = [("x: accuracy", "75.00%", "–"), ("y: accuracy", "–", "75.00%")]
    assert [row for row in found.amounts if "accuracy" in row[0]] == scores
    same = comparison.as_text(comparison.compared(a, a))
    assert "are equal" in same and "differs" not in same


def test_a_history_is_drawn_as_far_as_it_goes():
    other = report()
    other.history = [{"step": 0, "loss": 2.0}, {"step": 1, "loss": 1.0, "held_back_loss": 3.0}]
    assert [(drawn.title, [name for name, _ in drawn.curves]) for drawn in learning_charts(other)] == [
        ("Loss", ["of the step", "of what is held back"])
    ]
