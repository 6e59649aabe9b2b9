"""Which examples are learned from, and how much each counts, against the equations."""

import literal
import pytest
import tiny
import torch

import samerge_ext as sm
from samerge_ext.learning.calibration import Calibration
from samerge_ext.learning.config import TaughtConfig
from samerge_ext.learning.teaching import by_difficulty


@pytest.fixture
def problem():
    return tiny.make_problem()


def run(packed, batches, logits, **settings):
    config = sm.SAMergingConfig(**{"steps": 8, "progress": False, **settings})
    return sm.samerging(tiny.make(1), packed, batches, logits, config=config)


def row_entropy(values):
    return -(values.softmax(1) * values.log_softmax(1)).sum(1)


def literal_weights(experts, heads, batches):
    """1 − H(p_t) / Σ_k H(p_k) of every row."""
    found = {}
    for task in experts:
        found[task] = []
        for batch in batches[task]:
            with torch.no_grad():
                entropies = {k: row_entropy(expert(batch) @ heads[k]) for k, expert in experts.items()}
            found[task].append(1 - entropies[task] / sum(entropies.values()))
    return found


@pytest.mark.parametrize("adapter", [tiny.plain, tiny.shared_encoder])
def test_confidence_weighs_rows_as_the_literal_loop_does(problem, adapter):
    base, experts, packed, heads, batches = problem
    weights = literal_weights(experts, heads, batches)
    assert min(w.min() for of_task in weights.values() for w in of_task) < 0.6 < 0.8 < max(w.max() for w in weights["blue"])
    expected = literal.learn(base, experts, heads, batches, steps=8, row_weights=weights)[-1]
    found = run(packed, batches, adapter(heads), confidence_weights=True).coefficients
    assert (found - expected).norm() < 1e-9 * expected.norm()
    without = literal.learn(base, experts, heads, batches, steps=8)[-1]
    assert (found - without).norm() > 1e-6 * expected.norm()


def test_rows_that_no_expert_doubts_count_alike(problem):
    """Zero entropies everywhere are no NaN: 1 − 1/T of the loss."""
    base, experts, packed, heads, batches = problem
    certain = {task: 1e12 * head for task, head in heads.items()}
    losses = [
        run(packed, batches, tiny.plain(certain), confidence_weights=weighted, steps=1).history[0]["loss"]
        for weighted in (False, True)
    ]
    assert losses[1] == pytest.approx(losses[0] * 2 / 3, rel=1e-12)


@pytest.mark.parametrize("loss", ["cross_entropy", "kl"])
def test_statsmerging_weighs_rows_too(problem, loss):
    _, experts, packed, heads, batches = problem
    config = sm.StatsMergingConfig(steps=1, progress=False, loss=loss, confidence_weights=True)
    found = sm.statsmerging(tiny.make(1), packed, batches, tiny.plain(heads), config=config).history[0]["losses"]
    model = sm.MergedModel(tiny.make(1), packed, 0.3)
    for task, weights in literal_weights(experts, heads, batches).items():
        student, teacher = (m(batches[task][0]).detach() @ heads[task] for m in (model.module, experts[task]))
        rows = torch.nn.functional.cross_entropy(student, teacher.argmax(1), reduction="none")
        expected = (weights[0] * rows).mean() if loss == "cross_entropy" else literal.kl(student, teacher, 2.0, weights[0])
        assert found[task] == pytest.approx(expected.item(), rel=1e-9)


def chosen_by_hand(experts, heads, batches, count):
    """The rows of every task in the middles of so many strata of 1 − max p, in the order given."""
    found = {}
    for task, expert in experts.items():
        rows = torch.cat(batches[task])
        with torch.no_grad():
            difficulty = 1 - (expert(rows) @ heads[task]).softmax(1).amax(1)
        order = sorted(range(len(rows)), key=lambda i: difficulty[i].item())
        size = len(rows) / count
        found[task] = rows[sorted(order[int((place + 0.5) * size)] for place in range(count))]
    return found


def test_samples_are_learned_from_as_if_they_were_all(problem):
    _, experts, packed, heads, batches = problem
    by_hand = {task: list(rows.split(6)) for task, rows in chosen_by_hand(experts, heads, batches, 9).items()}
    assert [len(batch) for batch in by_hand["red"]] == [6, 3]
    expected = run(packed, by_hand, tiny.plain(heads))
    found = run(packed, batches, tiny.plain(heads), samples=9)
    assert (found.coefficients - expected.coefficients).norm() < 1e-9 * expected.coefficients.norm()
    weighed = run(packed, by_hand, tiny.plain(heads), confidence_weights=True)
    found = run(packed, batches, tiny.plain(heads), confidence_weights=True, samples=9)
    assert (found.coefficients - weighed.coefficients).norm() < 1e-9 * weighed.coefficients.norm()


def test_more_samples_than_there_are_are_all_of_them(problem):
    packed, heads, batches = problem[2:]
    found = run(packed, batches, tiny.plain(heads), samples=1000)
    assert torch.equal(found.coefficients, run(packed, batches, tiny.plain(heads)).coefficients)


def test_every_stratum_has_its_example():
    """Of a hundred examples, certain of their class by degrees, five: the 10th, 30th … from the easiest."""
    p = torch.linspace(0.5, 0.99, 100, dtype=torch.float64)[torch.randperm(100, generator=torch.Generator().manual_seed(3))]
    batches = {"a": [part[:, None] for part in p.split(7)]}
    teachers = {"a": [torch.cat([part, 1 - part], 1).log() for part in batches["a"]]}
    config = TaughtConfig(samples=5)
    found, kept = by_difficulty(torch.nn.Identity(), Calibration(batches, ("a",)), teachers, lambda *_: None, config)
    chosen = torch.cat(found.batches["a"])[:, 0]
    assert torch.equal(chosen.sort(descending=True).values, p.sort(descending=True).values[10::20])
    assert torch.equal(torch.cat(kept["a"]).exp()[:, :1], torch.cat(found.batches["a"]))


def test_texts_of_several_lengths_are_padded_with_the_models_token():
    tokens = [{"input_ids": torch.full((2, n), n), "attention_mask": torch.ones(2, n, dtype=torch.long)} for n in (2, 4)]
    teachers = {"a": [torch.tensor([[0.0, 1.0], [0.0, 2.0]]), torch.tensor([[0.0, 3.0], [0.0, 4.0]])]}
    module = torch.nn.Identity()
    module.config = type("Config", (), {"pad_token_id": 9})
    found, _ = by_difficulty(module, Calibration({"a": tokens}, ("a",)), teachers, lambda *_: None, TaughtConfig(samples=4))
    joined = [batch["input_ids"].tolist() for batch in found.batches["a"]]
    assert joined == [[[2, 2], [2, 2]], [[4] * 4, [4] * 4]]
    found, _ = by_difficulty(module, Calibration({"a": tokens}, ("a",)), teachers, lambda *_: None, TaughtConfig(samples=2))
    assert found.batches["a"][0]["input_ids"].tolist() == [[2, 2, 9, 9], [4] * 4]
    assert found.batches["a"][0]["attention_mask"].tolist() == [[1, 1, 0, 0], [1] * 4]


def test_what_cannot_be_weighed_or_chosen_is_refused(problem):
    base, experts, packed, heads, batches = problem
    alone = sm.PackedWeights.from_modules(base, {"red": experts["red"]}, dtype=torch.float64)
    with pytest.raises(ValueError, match="confidence_weights compares experts, and there is one"):
        run(alone, {"red": batches["red"]}, tiny.plain(heads), confidence_weights=True)
    with pytest.raises(ValueError, match="samples=4 chooses among the 18 examples of task 'red', and its logits have 36 rows"):
        run(packed, batches, lambda m, x, t: (m(x) @ heads[t]).repeat(2, 1), samples=4)
    with pytest.raises(ValueError, match=r"a batch of task 'red' has 6 examples and a tensor \[8\]"):
        pairs = {task: [(batch, torch.zeros(8)) for batch in held] for task, held in batches.items()}
        run(packed, pairs, lambda m, x, t: m(x[0]) @ heads[t], samples=4)
    with pytest.raises(ValueError, match="'red' gives 6 rows of logits for batch 0 of task 'green', whose own expert gives 3"):
        run(packed, batches, lambda m, x, t: (m(x) @ heads[t])[: 3 if t == "green" else 6], confidence_weights=True)
    with pytest.raises(ValueError, match="samples=0; expected a number ≥ 1"):
        sm.SAMergingConfig(samples=0)
    with pytest.raises(ValueError, match="samples=2: examples of any lengths are joined anew, which cuda_graph=True refuses"):
        sm.SAMergingConfig(samples=2, cuda_graph=True)


def test_a_batch_that_another_expert_refuses_is_told(problem):
    packed, heads, batches = problem[2:]
    marked = {task: [(task, batch) for batch in held] for task, held in batches.items()}

    def logits(module, batch, task):
        if batch[0] != task:
            raise KeyError(batch[0])
        return module(batch[1]) @ heads[task]

    with pytest.raises(KeyError) as error:
        run(packed, marked, logits, confidence_weights=True)
    assert "confidence_weights gives the batches of task 'green' to expert 'red' too" in error.value.__notes__
