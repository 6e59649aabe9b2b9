"""mergekit's YAML by the command: paths, notes, messages."""

import pytest
from mergekit_recipes import load, recipe, write_models
from typer.testing import CliRunner

from samerge_ext.cli import commands
from samerge_ext.cli.common import tasks_and_folders


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The working directory, with the folders base, a and b."""
    monkeypatch.chdir(tmp_path)
    return write_models(tmp_path)


def command(*arguments):
    return CliRunner().invoke(commands.app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("out", ["merged[ties]", "sub[/v2]", "out [v2] ö", "x" * 90])
def test_the_path_that_is_reported_is_the_path(root, out):
    load(root, recipe())
    run = command("merge", root / "recipe.yaml", root / out)
    assert run.exit_code == 0 and f"written to {root / out}\n" in run.output and (root / out / "model.safetensors").exists()


def test_notes_are_lines(root):
    load(root, recipe(allow_crimes=True))
    run = command("merge", root / "recipe.yaml", root / "out")
    assert run.exit_code == 0 and "note: allow_crimes: mergekit's options; they change nothing here\n" in run.output


def test_folders_that_cannot_be_written_or_read_end_in_a_message(root, monkeypatch):
    (root / "file").write_text("x")
    load(root, recipe())
    run = command("merge", root / "recipe.yaml", root / "file/out")
    assert run.exit_code == 1 and f"error: {root / 'file/out.state'}: Not a directory" in run.output
    run = command("merge", root / "recipe.yaml", root / ("x" * 253))
    assert run.exit_code == 1 and "File name too long" in run.output
    run = command("merge", root / "recipe.yaml", root / "out", "--parameter", "weight={")
    assert run.exit_code == 2 and "not valid YAML" in run.output

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied", "a/model.safetensors")

    monkeypatch.setattr("samerge_ext.elementwise.opening.open_checkpoint", denied)
    run = command("merge", root / "recipe.yaml", root / "out")
    assert run.exit_code == 1 and "error: a/model.safetensors: Permission denied" in run.output


def test_inputs_are_never_written_over(root):
    before = {path: path.read_bytes() for path in root.rglob("*.*") if path.is_file()}
    for out in ("base", "a", "a/inside", "."):
        load(root, recipe())
        run = command("merge", root / "recipe.yaml", root / out, "--overwrite")
        assert run.exit_code == 1 and "which is merged; write to" in run.output, run.output
    assert {path: path.read_bytes() for path in before} == before and not list(root.glob("*.state"))


def test_tasks_and_folders_of_the_command_line(root):
    (root / "lr=1e-4/last").mkdir(parents=True)
    (root / "x=y").mkdir()
    found = tasks_and_folders(["news=a", "lr=1e-4/last", "t=lr=1e-4/last", "x=y", "b/", "gone/lr=1/x"])
    assert [(task, str(path)) for task, path in found] == [
        ("news", "a"), ("last", "lr=1e-4/last"), ("t", "lr=1e-4/last"), ("x=y", "x=y"), ("b", "b"), ("x", "gone/lr=1/x"),
    ]  # fmt: skip
