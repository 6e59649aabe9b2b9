"""Calibration texts in the forms that datasets have them in, against the same texts written out."""

import json

import pytest
import torch
from vocabularies import write_tokenizer

from samerge_ext.models import read_records, read_texts, text_batches
from samerge_ext.models.texts import load_tokenizer

WORDS = ["?", "<user>", "<model>", "a", "b", "c", "d"]
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
CHATS = [
    [{"role": "user", "content": "a b"}, {"role": "model", "content": "c"}],
    [{"role": "user", "content": "d"}, {"role": "model", "content": "a a"}],
]
WRITTEN = ["<user> a b <model> c", "<user> d <model> a a"]


@pytest.fixture
def folder(tmp_path):
    write_tokenizer(tmp_path / "model", WORDS, template=TEMPLATE)
    config = tmp_path / "model/tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token": "?"}))
    return tmp_path / "model"


def ids(texts, folder):
    return [batch["input_ids"].tolist() for batch in text_batches(texts, folder, 2, 16)]


FORMS = {
    "text": ([{"text": "a b", "label": 1}, {"text": "c"}], ["a b", "c"]),
    "prompt and completion": ([{"prompt": "a ", "completion": "b"}, {"prompt": "c d", "completion": " a"}], ["a b", "c d a"]),
    "messages": ([{"messages": chat, "id": 3} for chat in CHATS], WRITTEN),
    "messages in two parts": ([{"prompt": chat[:1], "completion": chat[1:]} for chat in CHATS], WRITTEN),
}


@pytest.mark.parametrize("form", FORMS)
def test_records_are_the_texts_that_they_hold(form, folder, tmp_path):
    records, texts = FORMS[form]
    assert ids(records, folder) == ids(texts, folder) == ids(iter(records), folder)
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert ids(read_records(tmp_path / "x.jsonl"), folder) == ids(texts, folder)
    assert len(read_records(tmp_path / "x.jsonl", 1)) == 1
    if form != "text":
        with pytest.raises(ValueError, match='x.jsonl, line 1: expected a JSON object with a text as its field "text"'):
            read_texts(tmp_path / "x.jsonl")


def test_a_dataset_is_taken_as_it_is(folder):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: records are those of lists here")
    records, texts = FORMS["messages"]
    assert ids(datasets.Dataset.from_list(records), folder) == ids(texts, folder)
    assert ids(datasets.Dataset.from_dict({"line": texts})["line"], folder) == ids(texts, folder)


def test_a_template_adds_special_tokens_by_itself(folder):
    """Which the tokenizer adds to texts."""
    tokenizer = load_tokenizer([folder])
    from tokenizers.processors import TemplateProcessing

    tokenizer._tokenizer.post_processor = TemplateProcessing(single="? $A", special_tokens=[("?", 0)])
    (chats,) = text_batches([{"messages": chat} for chat in CHATS], tokenizer, 2, 16)
    (texts,) = text_batches(WRITTEN, tokenizer, 2, 16)
    assert torch.equal(chats["input_ids"], texts["input_ids"][:, 1:]) and set(texts["input_ids"][:, 0].tolist()) == {0}


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"question": "a", "answer": "b"}], "a record has the fields 'question', 'answer'; expected \"text\""),
        ([{"prompt": "a", "completion": CHATS[0]}], "a record has the fields 'prompt', 'completion'"),
        ([{"text": "a"}, {"messages": CHATS[0]}], "some records are chats and some are texts"),
        ([{"messages": [{"role": "user"}, 5]}], "a chat cannot be written by its tokenizer's template"),
    ],
)
def test_records_of_no_known_form_are_refused(records, message, folder):
    with pytest.raises(ValueError, match=message):
        text_batches(records, folder, 2, 16)


def test_a_tokenizer_without_a_template_is_named(tmp_path):
    write_tokenizer(tmp_path / "model", WORDS)
    with pytest.raises(ValueError, match="model: a chat cannot be written by its tokenizer's template"):
        text_batches([{"messages": CHATS[0]}], tmp_path / "model", 2, 16)
