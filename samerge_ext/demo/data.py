"""English classification tasks, split the same way on every machine.

    tasks = load_tasks(SMALL_TASKS)         # {"r8": Task, "election": ..., "icd": ..., "tweets": ...}
    tasks = load_tasks(FULL_TASKS)          # eight
    tasks = load_tasks(MANY_TASKS)          # all thirteen
    task.name, task.classes                 # "r8", 8
    task.descriptions                       # one short English text per class, for the task's head
    task.train, task.tuning, task.test      # Split: .texts, .labels, len()
    calibration_texts(task, 64, seed=0)     # 64 unlabelled texts drawn from task.train
    tuning_texts(task, 128)                 # Split of 128 labelled texts, for choosing hyper-parameters

Experts are trained on ``train`` only; ``tuning`` was cut off the corpus's training part, so that a choice made on it is
about texts no expert has seen. The three splits share no text (compared without case and white space) and no group (the
reviews of one film, the codes of one disease category). A split depends on nothing but the corpus and ``SPLIT_SEED``;
``test`` has at most ``TEST_CAP`` texts. Where a data package is missing, ``MissingData`` names the command to run.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from samerge_ext.demo.corpora import CORPORA, DataDir, Example, MissingData, stable_order

__all__ = [
    "FULL_TASKS",
    "MANY_TASKS",
    "SMALL_TASKS",
    "MissingData",
    "Split",
    "Task",
    "calibration_texts",
    "load_tasks",
    "tuning_texts",
]

SPLIT_SEED = 0
TEST_SHARE = 0.25  # where the corpus has no test part of its own
TEST_CAP = 1000  # texts per task, so that an evaluation takes seconds
TUNING_SHARE = 0.15  # of what is not for testing; more than the cap needs, so that it is drawn from many groups
TUNING_CAP = 256  # texts per task

SMALL_TASKS = ("r8", "election", "icd", "tweets")
FULL_TASKS = ("ng20", "r8", "election", "rt", "icd", "tweets", "amazon", "debates")
MANY_TASKS = (*FULL_TASKS, "editorials", "conventions", "friends", "books", "thesaurus")


@dataclass(frozen=True)
class Split:
    """n texts and their n class indices in [0, classes)."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Task:
    """A classification task.

    name: one of ``MANY_TASKS``.
    descriptions: a short English text per class; their embeddings are the task's head.
    train, tuning, test: disjoint splits.
    """

    name: str
    descriptions: tuple[str, ...]
    train: Split
    tuning: Split
    test: Split

    @property
    def classes(self) -> int:
        return len(self.descriptions)


def load_tasks(names: Iterable[str] = FULL_TASKS, data_dir: DataDir = None) -> dict[str, Task]:
    """Reads tasks by name, in the order given.

    data_dir: where vaderSentiment's source distribution lies; default ``$SAMERGE_DEMO_DATA``, else ``.cache-demo``.
    Raises MissingData, before any file is read, if one is not there; ValueError for a name that is not in ``MANY_TASKS``.
    """
    names = list(names)
    for name in names:
        if name not in CORPORA:
            raise ValueError(f"there is no task {name!r}; there are {', '.join(MANY_TASKS)}")
    paths = {name: CORPORA[name].locate(data_dir) for name in names}
    return {name: load_task(name, *paths[name]) for name in names}


def load_task(name: str, training_file: Path, test_file: Path | None = None) -> Task:
    """Reads one task; without a test file, ``TEST_SHARE`` of the training file is for testing."""
    corpus = CORPORA[name]
    classes = {key: index for index, key in enumerate(corpus.descriptions)}
    training = corpus.read(training_file, classes)
    if test_file is not None:
        test = corpus.read(test_file, classes)
        taken = {normalised(example.text) for example in test}
        training = [example for example in without_repeats(training) if normalised(example.text) not in taken]
        test = without_repeats(test)
    else:
        training, test = divide(without_repeats(training), TEST_SHARE, f"{SPLIT_SEED}/{name}/test")
    train, tuning = divide(training, TUNING_SHARE, f"{SPLIT_SEED}/{name}/tuning")
    descriptions = tuple(corpus.descriptions.values())
    return Task(name, descriptions, shuffled(train), shuffled(tuning, TUNING_CAP), shuffled(test, TEST_CAP))


def calibration_texts(task: Task, n: int, seed: int) -> list[str]:
    """n different texts of ``task.train``, drawn by ``seed``. No label leaves this function."""
    if not 0 < n <= len(task.train):
        raise ValueError(f"{task.name} has {len(task.train)} training texts, {n} were asked for")
    return random.Random(f"calibration/{task.name}/{seed}").sample(task.train.texts, n)


def tuning_texts(task: Task, n: int = TUNING_CAP) -> Split:
    """The first n texts of ``task.tuning`` (all, where it has fewer) with their labels; classes come mixed."""
    return Split(task.tuning.texts[:n], task.tuning.labels[:n])


def normalised(text: str) -> str:
    return " ".join(text.lower().split())


def without_repeats(examples: Sequence[Example]) -> list[Example]:
    """The first example of each text."""
    return list({normalised(example.text): example for example in reversed(examples)}.values())[::-1]


def divide(examples: Sequence[Example], share: float, seed: str) -> tuple[list[Example], list[Example]]:
    """Two parts, the second with about ``share`` of the examples; a group is never cut."""
    groups = defaultdict(list)
    for example in examples:
        groups[example.group].append(example)
    first: list[Example] = []
    second: list[Example] = []
    for name in sorted(groups, key=lambda group: stable_order(f"{seed}/{group}")):
        (second if len(second) < share * len(examples) else first).extend(groups[name])
    return first, second


def shuffled(examples: Sequence[Example], cap: int | None = None) -> Split:
    """At most ``cap`` examples in an order that depends on the texts alone."""
    chosen = sorted(examples, key=lambda example: stable_order(f"{SPLIT_SEED}/{example.text}"))[:cap]
    return Split(tuple(e.text for e in chosen), tuple(e.label for e in chosen))
