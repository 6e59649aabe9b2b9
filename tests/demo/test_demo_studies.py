"""The demo from end to end, on one block of the encoder and a few steps: table, cells, merged model."""

import functools
import json
import re
import shutil
from dataclasses import replace
from difflib import SequenceMatcher
from random import Random
from string import ascii_lowercase

import pytest
import torch
from helpers import assert_close
from rich.console import Console
from safetensors.torch import load_file, save_file

import samerge_ext as sm
from samerge_ext.demo import cells, estimate, experts, guest, heterogeneous, many, robustness, rows, studies, unseen, workbench
from samerge_ext.demo.convolution import Convolution, hashed
from samerge_ext.demo.corpora import MissingData
from samerge_ext.demo.data import Split, load_tasks
from samerge_ext.demo.experts import SMALL, backbone_folder, encode

TINY = replace(SMALL, tasks=("election", "tweets"), layers=1, max_tokens=8, steps=3, warmup=1, batch=8)


@functools.cache
def few_texts(names):
    """The tasks with enough texts to tell models apart, read once."""

    def cut(split):
        return Split(split.texts[:200], split.labels[:200])

    return {name: replace(task, tuning=cut(task.tuning), test=cut(task.test)) for name, task in load_tasks(names).items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a study; called again, continues from the same cache."""
    try:
        backbone_folder()
        few_texts(TINY.tasks)
    except MissingData as error:
        pytest.skip(str(error))
    root = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studies, "SMALL", TINY)
        patch.setattr(workbench, "load_tasks", few_texts)
        for module, name in ((cells, "STEPS"), (rows, "TUNED_STEPS"), (rows, "QUICK_STEPS")):
            patch.setattr(module, name, 2)

        def run(out="out", study="main"):
            console = Console(record=True, width=200)
            options = {"full": False, "seeds": 1, "out": root / out, "cache": root / "cache", "progress": False}
            return studies.run_study(study, console=console, **options), console.export_text(), root / out

        yield run


@pytest.fixture(scope="module")
def main(run):
    """Cells of the main study, what it prints, and where its table is."""
    return run()


def by_method(found):
    return {cell.method: cell for cell in found}


def test_the_table_has_every_method_with_its_cost(main):
    found, printed, out = main
    labels = [row.label for row in rows.main_rows(full=False)]
    assert [cell.method for cell in found] == labels
    assert all(set(cell.accuracies) == set(TINY.tasks) for cell in found)
    assert all(cell.seconds > 0 and cell.peak_bytes is not None for cell in found if "Merging" in cell.method)
    table = (out / "main-small.md").read_text()
    for label in labels:
        assert label in printed and f"| {label} |" in table


def test_the_merged_folder_is_a_model_that_transformers_loads(main):
    from transformers import AutoModel, AutoTokenizer

    _, _, out = main
    folder = out / "merged"
    module = AutoModel.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    plots = ("coefficients.png", "accuracies.png", "singular_values.png")
    for name in ("README.md", "coefficients.json", *plots, "heads/tweets.safetensors"):
        assert (folder / name).stat().st_size > 0, name
    summary = json.loads((folder / "coefficients.json").read_text())
    assert summary["method"] == "samerging" and summary["steps"] == 2
    base = experts.load_folder(workbench.base_folder(TINY, out.parent / "cache")).state_dict()
    moved = [name for name, tensor in module.state_dict().items() if not torch.equal(tensor, base[name])]
    assert moved and not any(name.startswith("embeddings") for name in moved)


def test_finished_cells_are_not_computed_again(run, main, monkeypatch):
    before, _, _ = main

    def fail(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr(cells, "KINDS", dict.fromkeys(cells.KINDS, fail))
    after, _, _ = run()
    assert after == before
    with pytest.raises(AssertionError, match="computed again"):
        run(study="tuning")


def test_an_unknown_study_is_refused(run):
    with pytest.raises(ValueError, match="no study 'mian'"):
        run(study="mian")


def test_tasks_that_were_not_merged_get_a_table_of_their_own(run, main, monkeypatch):
    labels = ["pretrained", "Task Arithmetic, λ = 0.3", "StatsMerging", "experts"]
    few = [row for row in rows.main_rows(full=False) if row.label in labels]
    monkeypatch.setattr(unseen, "LEFT_OUT", (("election",), ("tweets",)))
    monkeypatch.setattr(unseen, "transfer_rows", lambda full: few)
    found, _, out = run(study="unseen")
    assert [cell.method for cell in found] == labels * 4
    assert [set(cell.accuracies) for cell in found[:: len(labels)]] == [{"election"}, {"tweets"}, {"tweets"}, {"election"}]
    experts = by_method(found[: len(labels)])["experts"]
    assert experts.accuracies == {"election": by_method(main[0])["experts"].accuracies["election"]}
    assert "election, whose experts were not merged" in (out / "unseen-small.md").read_text()


def test_more_tasks_have_a_table_for_each_number_and_one_of_means(run, monkeypatch):
    labels = ["Task Arithmetic, λ = 0.3", "WUDI", "experts"]
    few = [row for row in rows.many_rows(full=False) if row.label in labels]
    monkeypatch.setattr(many, "many_rows", lambda full: few)
    monkeypatch.setattr(many, "ORDER", TINY.tasks)
    monkeypatch.setattr(many, "COUNTS", (1, 2))
    found, _, out = run(study="many")
    assert [cell.method for cell in found] == labels * 3
    one, two, means = found[:3], found[3:6], found[6:]
    assert [set(cell.accuracies) for cell in (*one, *two)] == [set(TINY.tasks[:1])] * 3 + [set(TINY.tasks)] * 3
    assert [cell.accuracies for cell in means] == [
        {"1 tasks": first.mean, "2 tasks": second.mean} for first, second in zip(one, two, strict=True)
    ]
    assert "mean accuracy by number of tasks" in (out / "many-small.md").read_text()


def test_an_expert_of_others_is_merged_with_ours(run, main, monkeypatch, tmp_path):
    """Its folder has a card, and a tensor that ours have not."""
    _, _, out = main
    bench = workbench.Workbench(TINY, 0, out.parent / "cache", progress=False)
    folder = tmp_path / "guest"
    shutil.copytree(bench.expert("tweets"), folder)
    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.startswith("encoder"):  # far enough from ours
            tensor += 0.5 * tensor.std() * torch.randn(tensor.shape, generator=generator)
    save_file({**tensors, "embeddings.position_ids": torch.arange(512)[None]}, folder / "model.safetensors")
    (folder / "README.md").write_text(
        "---\nwidget:\n- source_sentence: disk full\n  sentences: [no space left, a pod restarts]\n"
        "- source_sentence: pod\n  sentences: [disk full, a container]\n---\n# Guest\n"
    )
    monkeypatch.setattr(guest, "package_file", lambda *_: folder / "config.json")
    with pytest.raises(ValueError, match="add --full"):
        run(study="guest")
    monkeypatch.setattr(workbench.Workbench, "full", True)
    found, _, _ = run(study="guest")
    accuracies, alike = found[: len(found) // 2], {cell.method: cell.mean for cell in found[len(found) // 2 :]}
    assert [cell.method for cell in accuracies] == list(alike) and len(alike) == 6
    assert alike["the guest"] == pytest.approx(1)
    with_guest, without = (alike[f"Task Arithmetic, λ = 0.3, {who} the guest"] for who in ("with", "without"))
    assert alike["pretrained"] < with_guest and without < with_guest


def test_ranks_of_similarities_are_spearmans():
    first = torch.tensor([0.1, 0.4, 0.2, 0.9])
    assert guest.rank_correlation(first, first**3) == pytest.approx(1)
    assert guest.rank_correlation(first, torch.tensor([0.1, 0.2, 0.4, 0.9])) == pytest.approx(0.8)


def test_quantised_rows_say_what_their_task_vectors_take(run, main):
    found, _, _ = run(study="quantised")
    sizes = {cell.method.split(", ")[1]: float(cell.method.split(", ")[2].removesuffix(" MiB")) for cell in found}
    assert list(sizes) == ["fp32", "int8", "int4", "int4-residual"]
    assert sizes["int4"] < sizes["int8"] < sizes["fp32"] / 3.9 and sizes["int4"] < sizes["int4-residual"]
    assert by_method(main[0])["SAMerging"].accuracies == found[0].accuracies


def test_methods_that_learn_nothing_have_a_table_of_their_own(run):
    found, _, _ = run(study="methods")
    assert [cell.method for cell in found] == [row.label for row in rows.methods_rows(full=False)]
    assert all(set(cell.accuracies) == set(TINY.tasks) for cell in found)


def test_trained_heads_are_judged_with_the_encoder(main):
    """Those of one task are such that its first class is always taken."""
    _, _, out = main
    bench = workbench.Workbench(TINY, 0, out.parent / "cache", progress=False)
    module, (first, *others) = bench.module(), TINY.tasks
    before = bench.test.accuracies(module)
    prototypes = bench.heads.prototypes[first]
    assert bench.test.accuracies(module, {first: prototypes.clone()}) == before
    after = bench.test.accuracies(module, {first: torch.zeros_like(prototypes)})
    labels = bench.tasks[first].test.labels
    assert after[first] == labels.count(0) / len(labels) != before[first]
    assert all(after[task] == before[task] for task in others)


def test_models_are_merged_again_for_texts_with_errors(run, main, monkeypatch):
    monkeypatch.setattr(robustness, "LEVELS", (0.0, 0.3))
    monkeypatch.setattr(robustness, "transfer_rows", rows.main_rows)
    main = by_method(main[0])

    def fail(*_):
        raise AssertionError("learned again")

    monkeypatch.setattr(cells, "KINDS", dict.fromkeys(cells.KINDS, fail))
    found, _, _ = run(study="robustness")
    untouched = [cell for cell in found if set(cell.accuracies) == set(TINY.tasks)][: len(main)]
    assert {cell.method: cell.accuracies for cell in untouched} == {name: cell.accuracies for name, cell in main.items()}
    assert by_method(found[: len(main)])["SAMerging"].accuracies["0 %"] == pytest.approx(main["SAMerging"].mean)


def test_a_cell_from_before_coefficients_were_kept_is_computed_again(main):
    _, _, out = main
    bench = workbench.Workbench(TINY, 0, out.parent / "cache", progress=False)
    row = next(row for row in rows.main_rows(full=False) if row.label == "AdaMerging")
    path = cells.cell_path(bench, row, "test")
    cell = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in cell.items() if key != "coefficients"}))
    assert cells.elsewhere(bench, row, {"same-texts": bench.test}) == {"same-texts": cell["accuracies"]}
    assert json.loads(path.read_text())["coefficients"] == cell["coefficients"]


def test_a_model_with_refitted_heads_is_made_once_for_all_other_texts(main, monkeypatch):
    _, _, out = main
    bench = workbench.Workbench(TINY, 0, out.parent / "cache", progress=False)
    row = next(row for row in rows.transfer_rows(full=False) if row.label == "WUDI, heads refitted")
    accuracies = cells.run_cell(bench, row)["accuracies"]
    made = []
    refit = cells.KINDS[row.kind]
    monkeypatch.setitem(cells.KINDS, row.kind, lambda *arguments: made.append(row) or refit(*arguments))
    again = cells.elsewhere(bench, row, {"once": bench.test, "twice": bench.test})
    assert again == {"once": accuracies, "twice": accuracies} and len(made) == 1


def test_typing_errors_are_as_many_as_asked_for_and_always_the_same():
    text = "".join(Random(0).choices(ascii_lowercase, k=2000))
    assert robustness.typed(text, 0.0) == text
    written = robustness.typed(text, 0.1)
    assert written == robustness.typed(text, 0.1)
    same = sum(block.size for block in SequenceMatcher(None, text, written, autojunk=False).get_matching_blocks())
    assert 0.85 < same / len(text) < 0.96


def test_experts_distilled_from_another_architecture_are_merged_with_the_rest(run, main, monkeypatch):
    few = [row for row in rows.main_rows(full=False) if row.label in ("Task Arithmetic, λ = 0.3", "StatsMerging", "experts")]
    small = Convolution(buckets=256, width=8, filters=8, epochs=1)
    monkeypatch.setattr(heterogeneous, "CONVOLUTION", small)
    monkeypatch.setattr(heterogeneous, "main_rows", lambda full: few)
    found, _, out = run(study="heterogeneous")
    labels = ["teachers", "experts, two of them distilled", "Task Arithmetic, λ = 0.3", "StatsMerging"]
    assert [cell.method for cell in found] == labels
    experts = by_method(main[0])["experts"]
    for cell in found[:2]:
        assert cell.accuracies["tweets"] == experts.accuracies["tweets"]
        assert cell.accuracies["election"] != experts.accuracies["election"]

    def fail(*_, **__):
        raise AssertionError("made again")

    monkeypatch.setattr(heterogeneous.sm, "distill_expert", fail)
    monkeypatch.setattr("samerge_ext.demo.convolution.train", fail)
    assert run(study="heterogeneous")[0] == found


def test_words_are_hashed_into_buckets_that_are_not_padding():
    settings = Convolution(buckets=8, max_words=5)
    words = hashed(["one two, two", "", "a b c d e f g"], settings)
    assert words.shape == (3, 5)
    assert (words[0, :4] > 0).all() and words[0, 4] == 0 and words[0, 1] == words[0, 3]
    assert (words[1] == 0).all() and (words[2] > 0).all() and words.max() < 8


def test_the_start_says_what_is_left_and_how_long_it_takes(run, tmp_path):
    bench = workbench.Workbench(TINY, 0, tmp_path, progress=False)
    every = rows.main_rows(full=False)
    text = estimate.announcement(bench, 2, every, "test")
    work = f"4 experts, then {2 * len(every)} rows of the table"
    assert re.fullmatch(rf"{work}: about (a minute|\d+ (minutes|hours)) on \d+ threads?", text)
    _, printed, _ = run()
    again, printed_again, _ = run()
    assert "the cache has all of it" in printed_again and len(again) == len(every)


@pytest.mark.parametrize("label", ["Task Arithmetic, best λ", "StatsMerging", "SAMerging"])
def test_a_row_passes_the_tokens_through_the_encoder_that_are_expected_of_it(run, monkeypatch, label):
    _, _, out = run()
    bench = workbench.Workbench(TINY, 0, out.parent / "cache", progress=False)
    row = next(row for row in rows.main_rows(full=False) if row.label == label)
    passed = 0

    def counting(module, batch):
        nonlocal passed
        passed += batch["input_ids"].numel()
        return encode(module, batch)

    monkeypatch.setattr(estimate, "FORWARD_AND_BACKWARD", 1)
    expected = estimate.row_tokens(bench, row, "test")
    for holder in (workbench.Workbench, experts.Evaluator):
        monkeypatch.setattr(holder, "encode", staticmethod(counting))
    cells.run_cell(bench, row, again=True)
    assert passed == pytest.approx(expected, rel=0.02)


def test_an_estimate_is_told_as_precisely_as_it_is_known():
    assert [estimate.duration(seconds) for seconds in (5, 80, 200, 5000, 7000)] == [
        "a minute", "a minute", "3 minutes", "83 minutes", "2 hours",
    ]  # fmt: skip


def test_a_bench_at_another_seed_shares_texts_and_not_experts(run):
    _, _, out = run()
    bench = workbench.Workbench(TINY, 0, out.parent / "cache", progress=False)
    assert bench.packed.tasks == TINY.tasks
    other = bench.at_seed(1)
    assert other.tasks is bench.tasks and other.heads is bench.heads
    assert {"packed", "experts"}.isdisjoint(vars(other)) and other.expert_path("tweets") != bench.expert_path("tweets")


def test_the_small_table_has_the_full_ones_rows_with_fewer_and_larger_steps(monkeypatch):
    monkeypatch.setattr(rows, "TUNED_STEPS", 300)
    monkeypatch.setattr(rows, "QUICK_STEPS", 60)
    small, full = rows.main_rows(full=False), rows.main_rows(full=True)
    assert [row.label for row in small] == [row.label for row in full]
    for quick, long in zip(small, full, strict=True):
        if "learning_rate" in long.settings:
            assert quick.settings.pop("steps") == 60 and "steps" not in long.settings
            assert quick.settings.pop("learning_rate") == pytest.approx(5 * long.settings.pop("learning_rate"))
        assert quick == long


def test_lambda_without_a_network_is_learned_from_the_experts_most_likely_classes():
    """The row is one of SAMerging's, whose loss is the cross-entropy where the teacher is cold enough."""
    (row,) = (row for row in rows.learner_rows(full=False) if row.kind == "samerging")
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(64, 10, generator=generator, dtype=torch.float64)
    teacher = torch.rand(64, 10, generator=generator).argsort(-1).double()  # no two classes alike
    of_student, of_teacher = row.settings["temperature"], row.settings["teacher_temperature"]
    loss = sm.softmax_kl(student, teacher, student_temperature=of_student, teacher_temperature=of_teacher)
    assert_close(loss, torch.nn.functional.cross_entropy(student, teacher.argmax(-1)))
