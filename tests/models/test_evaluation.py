"""`samerge eval`: perplexity and accuracy of folders, against transformers in fp64; and what it refuses."""

import json
import math
import re

import pytest
import torch
from classifiers import WORDS as KNOWN
from classifiers import write as write_classifiers
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner
from vocabularies import write_model

import samerge_ext as sm
from samerge_ext.cli import commands
from samerge_ext.models import evaluation
from samerge_ext.models.evaluation import evaluate
from samerge_ext.reports.report import read_report

transformers = pytest.importorskip("transformers")
WORDS = ["?", "a", "b", "c", "d"]
VOCABULARY = 7  # rows of the embeddings
TEXTS = ["a b c d a", "b", "c c a b d d a c", "d a"]


def samerge(*arguments):
    return CliRunner().invoke(commands.app, ["eval", *map(str, arguments)])


@pytest.fixture
def language_model(tmp_path):
    write_model(tmp_path / "model", WORDS, VOCABULARY)
    (tmp_path / "news.txt").write_text("\n".join(TEXTS))
    return tmp_path


@pytest.mark.parametrize("batch_size", [1, 3])
def test_perplexity_is_that_of_transformers_loss(language_model, batch_size):
    """Padded or not, a text of one token among them; the loss in fp64, every token weighed alike."""
    model = transformers.AutoModelForCausalLM.from_pretrained(language_model / "model", dtype=torch.float64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(language_model / "model")
    total = tokens = 0
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        if ids.shape[1] > 1:
            with torch.no_grad():
                total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
    files = {"news": language_model / "news.txt"}
    score = evaluate(language_model / "model", files, batch_size=batch_size, dtype=torch.float64)["news"]
    assert score.tokens == tokens == 12 and score.texts == 4
    assert score.perplexity == pytest.approx(math.exp(total / tokens))


def test_logits_exist_for_as_many_rows_as_fit(language_model, monkeypatch):
    files, folder = {"news": language_model / "news.txt"}, language_model / "model"
    expected = evaluate(folder, files, dtype=torch.float64)["news"].perplexity
    linear, rows = torch.nn.functional.linear, []

    def watched(x, weight, bias=None):
        if len(weight) == VOCABULARY:
            rows.append(x.shape[:-1].numel())
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    monkeypatch.setattr(evaluation, "workspace_for", lambda *_: 2 * 3 * 4 * VOCABULARY)
    assert evaluate(folder, files, dtype=torch.float64)["news"].perplexity == pytest.approx(expected, rel=1e-14)
    assert rows == [2] * 6  # of the 12 tokens that are predicted


def test_what_the_command_prints(language_model):
    file = language_model / "news.txt"
    lines = samerge(language_model / "model", file, "--limit", 1)
    assert lines.exit_code == 0 and lines.output.startswith("news: perplexity ") and "of 4 tokens in 1 texts" in lines.output
    content = json.loads(samerge(language_model / "model", f"here={file}", "--json", "--max-length", 3).output)
    assert content["here"]["tokens"] == 5 and content["here"]["perplexity"] > 1 and "accuracy" not in content["here"]


def test_scores_are_added_to_a_report(language_model):
    file, recipe = language_model / "news.txt", language_model / "recipe.yaml"
    recipe.write_text(f"{{merge_method: linear, models: [{{model: '{language_model}/model', parameters: {{weight: 1}}}}]}}")
    merged = language_model / "merged"
    refused = samerge(language_model / "model", file, "--report")
    assert refused.exit_code == 1 and "holds no report.json" in refused.output
    assert CliRunner().invoke(commands.app, ["merge", str(recipe), str(merged)]).exit_code == 0
    printed = samerge(merged, f"here={file}", "--report", "--json")
    assert printed.exit_code == 0, printed.output
    assert read_report(merged).scores == json.loads(printed.output)
    samerge(merged, f"there={file}", "--report", "--limit", 1)
    assert list(read_report(merged).scores) == ["here", "there"]
    perplexity = json.loads(printed.output)["here"]["perplexity"]
    assert f"perplexity {perplexity:.4f} of 12 tokens" in (merged / "report.html").read_text()


@pytest.fixture
def classifiers(tmp_path):
    """Folders of classifiers, of two and of three classes, and labelled texts."""
    write_classifiers(tmp_path)
    texts = [f"{one} {other}" for one in KNOWN for other in KNOWN[:3]]
    records = [{"text": text, "label": number % 3} for number, text in enumerate(texts)]
    (tmp_path / "topic-test.jsonl").write_text("\n".join(map(json.dumps, records)))
    return tmp_path


def share(folder, file, head=None):
    """The accuracy by transformers, one text at a time."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    if head:
        model.classifier = torch.nn.Linear(16, 3)
        model.load_state_dict(load_file(head), strict=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    records = [json.loads(line) for line in file.read_text().split("\n")]
    with torch.no_grad():
        found = [model(**tokenizer(one["text"], return_tensors="pt")).logits.argmax().item() == one["label"] for one in records]
    assert 0 < sum(found) < len(found)
    return sum(found) / len(found)


def test_accuracy_is_that_of_transformers(classifiers):
    file = classifiers / "topic-test.jsonl"
    expected = share(classifiers / "topic", file)
    assert evaluate(classifiers / "topic", {"x": file}, batch_size=5)["x"].accuracy == pytest.approx(expected)
    result = samerge(classifiers / "topic", file)
    assert result.output == f"topic-test: accuracy {expected:.2%} of 18 texts\n"


def test_a_tasks_own_head_is_put_in(classifiers):
    """A merged folder has no classifier of its own; names of labels are those of config.json."""
    packed = sm.PackedWeights.from_folders(
        classifiers / "base", {name: classifiers / name for name in ("mood", "topic")}, heads="classifier.*"
    )
    sm.average(packed).save_pretrained(classifiers / "out")
    file = classifiers / "topic-test.jsonl"
    expected = share(classifiers / "out", file, classifiers / "out/heads/topic.safetensors")
    assert evaluate(classifiers / "out", {"topic": file})["topic"].accuracy == pytest.approx(expected)
    refused = samerge(classifiers / "out", file)
    assert refused.exit_code == 1 and "lacks 'classifier.weight', 'classifier.bias'" in refused.output
    assert "give the file of a task with a head of its own as TASK=FILE" in refused.output


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"text": "good", "label": 3}], "the label 3 is none of the model's 3 classes"),
        ([{"text": "good", "label": "sport"}], "'sport' is none of the labels in config.json, LABEL_0, LABEL_1, LABEL_2"),
        ([{"text": "good", "label": -1}], "-1 is no label"),
        ([{"text": "good", "label": True}], "True is no label"),
        ([{"text": "good"}], 'line 1: expected a JSON object with a text as its field "text", and "label"'),
    ],
)
def test_labels_that_are_none(classifiers, records, message):
    (classifiers / "wrong.jsonl").write_text("\n".join(map(json.dumps, records)))
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate(classifiers / "topic", {"x": classifiers / "wrong.jsonl"})


def test_names_of_labels_are_those_of_the_configuration(classifiers):
    (classifiers / "named.jsonl").write_text('{"text": "good rain", "label": "LABEL_1"}\n{"text": "good rain", "label": 1}')
    assert evaluate(classifiers / "topic", {"x": classifiers / "named.jsonl"})["x"].accuracy in (0.0, 1.0)


def test_what_cannot_be_evaluated(language_model, classifiers):
    (language_model / "short.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match="no text has a token after its first"):
        evaluate(language_model / "model", {"x": language_model / "short.txt"})
    with pytest.raises(ValueError, match='labelled texts are a .jsonl file, of objects with the fields "text" and "label"'):
        evaluate(classifiers / "topic", {"x": language_model / "short.txt"})
    for arguments, message in (
        (("none", "short.txt"), "none: No such file"),
        (("model", "none.txt"), "none.txt: No such file"),
        (("model", "short.txt", "--dtype", "int3"), "dtype 'int3'; choose one of float32"),
    ):
        folder, file, *options = arguments
        result = samerge(language_model / folder, language_model / file, *options)
        assert result.exit_code == 1 and message in result.output
    config = json.loads((language_model / "model/config.json").read_text()) | {"architectures": ["LlamaForTokenClassification"]}
    (language_model / "model/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is for token classification; causal language models and sequence classifiers are"):
        evaluate(language_model / "model", {"x": language_model / "short.txt"})


def test_tensors_that_are_missing_are_named(language_model):
    file = language_model / "model/model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file)
    with pytest.raises(ValueError, match="lacks 'model.norm.weight', and there is no heads/news.safetensors"):
        evaluate(language_model / "model", {"news": language_model / "news.txt"})
