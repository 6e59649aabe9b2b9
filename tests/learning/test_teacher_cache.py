"""Teachers whose answers are kept in files: what they are read again for, and what makes them answer anew."""

from pathlib import Path

import pytest
import tiny
import torch

import samerge_ext as sm

BATCHES = 3


class Counted:
    """A logits function that counts, of every task, the batches that are run without gradients: a teacher's."""

    def __init__(self, heads):
        self.heads, self.taught = heads, dict.fromkeys(tiny.TASKS, 0)

    def __call__(self, module, batch, task):
        self.taught[task] += not torch.is_grad_enabled()
        return module(batch) @ self.heads[task]


@pytest.fixture
def run(tmp_path):
    base, experts, packed, heads, _ = tiny.make_problem()
    usual = tiny.make_batches(count=BATCHES)

    def run(packed=packed, batches=usual, heads=heads, cached=True, method=sm.samerging, config=sm.SAMergingConfig, **settings):
        logits = Counted(heads)
        where = tmp_path / "teachers" if cached else None
        settings = {"steps": 4, "progress": False, "teacher_cache": where, **settings}
        result = method(tiny.make(1), packed, batches, logits, config=config(**settings))
        return result.coefficients, logits.taught

    run.folder, run.packed, run.batches, run.heads = tmp_path / "teachers", packed, usual, heads
    return run


def all_of(count):
    return dict.fromkeys(tiny.TASKS, count)


@pytest.mark.parametrize("settings", [{}, {"teacher_top_k": 2}, {"sam": "off", "temperature": 3.0}, {"samples": 4}])
def test_a_second_run_reads_all_but_the_first_answers(run, settings):
    expected, _ = run(cached=False, **settings)
    first, taught = run(**settings)
    again, later = run(**settings, learning_rate=1e-3, checkpoint_every=7)
    assert torch.equal(first, expected) and torch.equal(again, expected)
    assert taught == all_of(BATCHES) and later == all_of(1)
    assert sorted(path.name.split("-")[0] for path in run.folder.iterdir()) == sorted(tiny.TASKS)


def test_answers_of_another_kind_have_files_of_their_own(run):
    run()
    assert run(teacher_top_k=2)[1] == all_of(BATCHES)
    assert run(teacher_top_k=3)[1] == all_of(BATCHES)
    assert run(method=sm.statsmerging, config=sm.StatsMergingConfig)[1] == all_of(1)
    assert run()[1] == run(teacher_top_k=2)[1] == all_of(1)


def test_other_batches_experts_or_functions_are_answered_anew(run):
    before, _ = run()
    other = {**run.batches, "red": [batch + 1 for batch in run.batches["red"]]}
    assert run(batches=other)[1] == {"red": BATCHES, "green": 1, "blue": 1}
    heads = {**run.heads, "blue": 2 * run.heads["blue"]}
    changed, taught = run(heads=heads)
    assert taught == {"red": 1, "green": 1, "blue": BATCHES}
    assert torch.equal(changed, run(heads=heads, cached=False)[0]) and not torch.equal(changed, before)
    base, experts = tiny.make(1), tiny.make_experts(tiny.make(1), scale=0.4)
    packed = sm.PackedWeights.from_modules(base, experts, dtype=torch.float64)
    assert run(packed=packed, heads=heads)[1] == all_of(BATCHES)
    assert torch.equal(run(packed=packed, heads=heads)[0], run(packed=packed, heads=heads, cached=False)[0])


DAMAGE = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "other numbers at its end": lambda data: data[:-200] + bytes(200),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_made_again(run, damage):
    expected, _ = run()
    for path in run.folder.iterdir():
        path.write_bytes(damage(path.read_bytes()))
    found, _ = run()
    assert torch.equal(found, expected)
    assert run()[1] == all_of(1)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc tells what is mapped here")
def test_answers_are_mapped_and_not_held(run, monkeypatch):
    from samerge_ext.methods import samerging

    mapped = []
    learn = samerging.learn
    maps = Path("/proc/self/maps")
    monkeypatch.setattr(samerging, "learn", lambda *given, **more: mapped.append(maps.read_text()) or learn(*given, **more))
    run()
    assert all(str(path) in mapped[0] for path in run.folder.iterdir())


def test_batches_that_cannot_be_told_apart_are_refused(run):
    class Text:
        def __init__(self, tensor):
            self.tensor = tensor

    batches = {task: [(batch, Text(batch)) for batch in held] for task, held in run.batches.items()}
    with pytest.raises(ValueError, match="batches of task 'red' hold objects that cannot be told apart"):
        sm.samerging(
            tiny.make(1),
            run.packed,
            batches,
            lambda module, batch, task: module(batch[0]) @ run.heads[task],
            config=sm.SAMergingConfig(steps=1, progress=False, teacher_cache=run.folder),
        )
    assert not run.folder.exists()
