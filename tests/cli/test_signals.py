"""Ctrl-C, SIGTERM and SIGKILL sent to real processes: one line, an exit code, and a merge that goes on where it was."""

import io
import os
import signal
import sys
import time

import classifiers
import processes
import pytest
import torch
from classifiers import LABELS
from folders import assert_same, read_all

from samerge_ext.checkpoints.sealed import read_sealed
from samerge_ext.recipes.recipe import Recipe
from samerge_ext.recipes.run import run_recipe

SWALLOWS = """
try:
    time.sleep(60)
except BaseException:
    time.sleep(60)
"""
STOPS = pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return classifiers.write(tmp_path_factory.mktemp("models"))


def recipe(models, method, **keys):
    common = {"base_model": models / "base", "models": [{"model": models / task} for task in LABELS], "heads": ["classifier.*"]}
    return Recipe(merge_method=method, **common, **keys)


def learned(models, steps, **parameters):
    files = {"mood": models / "mood.txt", "topic": models / "topic.jsonl"}
    parameters = {"steps": steps, "learning_rate": 0.01, "progress": False, **parameters}
    return recipe(models, "samerging", calibration={"files": files, "batch_size": 2}, parameters=parameters)


def started(folder, function, *arguments):
    """The process, which calls the function with the sending end of a pipe, and the receiving end."""
    heard, told = processes.context.Pipe(duplex=False)
    return processes.start(_printing, folder, function, told, *arguments), heard


def _printing(folder, function, told, *arguments):
    processes.print_to(folder / "stdout", folder / "stderr")
    function(told, *arguments)


def ended(process, folder):
    """Its exit code and what it printed."""
    process.join(60)
    return process.exitcode, (folder / "stdout").read_text(), (folder / "stderr").read_text()


def command(told, file, out, hooked=None):
    """`samerge merge FILE OUT`, with a hook on what it does."""
    from samerge_ext.cli.main import main

    if hooked is not None:
        hooked(told)
    sys.argv = ["samerge", "merge", str(file), str(out)]
    main()


def tell_of_steps(told):
    from samerge_ext.learning.run_state import RunState

    finished = RunState.finished

    def telling(self, steps, *arguments):
        finished(self, steps, *arguments)
        told.send(steps)

    RunState.finished = telling


def tell_of_shards_and_wait(told):
    from samerge_ext.elementwise import file_merge

    finish = file_merge._Run.finish

    def waiting(self, *arguments):
        told.send("shards")
        time.sleep(60)
        finish(self, *arguments)

    file_merge._Run.finish = waiting


def assert_one_line(printed, number):
    name = signal.Signals(number).name
    line = f"samerge: stopped by {name}; what a merge had finished is kept, the same command goes on from there\n"
    assert printed == ("", line)


def test_a_learned_run_keeps_its_last_finished_step(models, tmp_path):
    """No checkpoint was due; the state has every step, and the same command goes on from there."""
    file = tmp_path / "recipe.yaml"
    file.write_text(learned(models, 100_000, checkpoint_every=100_000).model_dump_json(exclude_defaults=True))
    process, heard = started(tmp_path, command, file, tmp_path / "out", tell_of_steps)
    while heard.recv() < 5:
        pass
    os.kill(process.pid, signal.SIGTERM)
    found, *printed = ended(process, tmp_path)
    assert found == 143, printed
    assert_one_line(tuple(printed), signal.SIGTERM)
    assert sorted(path.name for path in (tmp_path / "out.state").iterdir()) == ["state.pt"] and not (tmp_path / "out").exists()
    history = torch.load(io.BytesIO(read_sealed(tmp_path / "out.state/state.pt")))["history"]
    assert len(history) >= 5
    goes_on = run_recipe(learned(models, len(history) + 2), tmp_path / "out")
    assert goes_on.history[:-2] == history
    assert not (tmp_path / "out.state").exists()


@STOPS
def test_a_merge_from_file_to_file_keeps_its_shards(models, tmp_path, number, code):
    asked = recipe(models, "task_arithmetic")
    (tmp_path / "recipe.yaml").write_text(asked.model_dump_json(exclude_defaults=True))
    process, heard = started(tmp_path, command, tmp_path / "recipe.yaml", tmp_path / "out", tell_of_shards_and_wait)
    heard.recv()
    os.kill(process.pid, number)
    found, *printed = ended(process, tmp_path)
    assert found == code, printed
    assert_one_line(tuple(printed), number)
    assert sorted(path.name for path in (tmp_path / "out.state").iterdir()) == ["merge.json", "merged", "notes"]
    for out in ("out", "whole"):
        run_recipe(asked, tmp_path / out)
    assert_same(read_all(tmp_path / "out"), read_all(tmp_path / "whole"))


def importing(told, folder):
    from samerge_ext.cli.signals import one_line_for_signals

    sys.path.insert(0, str(folder))
    with one_line_for_signals():
        told.send("soon")
        import takes_long  # noqa: F401


@STOPS
def test_while_a_module_is_imported(tmp_path, number, code):
    """One that swallows what is raised in it, as libraries do."""
    body = f"import time\nopen({str(tmp_path / 'begun')!r}, 'w')\n{SWALLOWS}"
    (tmp_path / "takes_long.py").write_text(body)
    process, heard = started(tmp_path, importing, tmp_path)
    heard.recv()
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    os.kill(process.pid, number)
    found, *printed = ended(process, tmp_path)
    assert found == code, printed
    assert_one_line(tuple(printed), number)


def saving_slowly(told):
    from samerge_ext.cli.signals import one_line_for_signals

    with one_line_for_signals():
        try:
            told.send("ready")
            time.sleep(60)
        except KeyboardInterrupt:
            told.send("saving")
            time.sleep(0.3)
            told.send("saved")
            time.sleep(60)


class SlowToGo:
    def __init__(self, told, seconds):
        self.told, self.seconds = told, seconds

    def __del__(self):
        self.told.send("goes")
        time.sleep(self.seconds)


def finalising(told, seconds):
    from samerge_ext.cli.signals import one_line_for_signals

    with one_line_for_signals():
        SlowToGo(told, seconds)
        time.sleep(60)


@pytest.mark.parametrize("seconds", [0.3, 60])
def test_a_signal_in_a_finaliser_is_heeded_after_it_or_a_second(tmp_path, seconds):
    """What is raised in there Python prints and forgets."""
    process, heard = started(tmp_path, finalising, seconds)
    assert heard.recv() == "goes"
    os.kill(process.pid, signal.SIGTERM)
    found, *printed = ended(process, tmp_path)
    assert found == 143, printed
    assert_one_line(tuple(printed), signal.SIGTERM)


def test_signals_that_come_together_are_one_and_a_later_one_ends_at_once(tmp_path):
    """`timeout` sends its signal to the command and to its group."""
    process, heard = started(tmp_path, saving_slowly)
    assert heard.recv() == "ready"
    os.kill(process.pid, signal.SIGTERM)
    assert heard.recv() == "saving"
    os.kill(process.pid, signal.SIGTERM)
    assert heard.recv() == "saved"
    time.sleep(1)
    os.kill(process.pid, signal.SIGINT)
    found, *printed = ended(process, tmp_path)
    assert found == 143, printed
    assert_one_line(tuple(printed), signal.SIGTERM)


def ignoring(told):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from samerge_ext.cli.signals import one_line_for_signals

    with one_line_for_signals():
        told.send("ready")
        time.sleep(0.3)
        print("done")


def test_a_signal_that_was_ignored_still_is(tmp_path):
    """As with nohup, and in a shell's background."""
    process, heard = started(tmp_path, ignoring)
    heard.recv()
    os.kill(process.pid, signal.SIGINT)
    assert ended(process, tmp_path) == (0, "done\n", "")
