"""Where it is noticed that folders do not fit together, and how it is shown."""

import sys
import warnings

import pytest
import torch
from configured_folders import LLAMA3, write
from safetensors.torch import save_file

import samerge_ext as sm
from samerge_ext.checkpoints.compatibility import CompatibilityWarning
from samerge_ext.cli.main import main
from samerge_ext.cli.messages import warnings_as_lines


@pytest.fixture
def make(tmp_path):
    """Writes a folder by its name."""
    return lambda name, config=None, **files: write(tmp_path / name, config, **files)


@pytest.fixture
def models(make):
    torch.manual_seed(0)
    for name in ("base", "a", "b"):
        save_file({"w": torch.randn(4, 4)}, make(name, LLAMA3) / "model.safetensors")
    return make


def test_packing_and_describing_notice_before_weights_are_opened(models):
    folders = models("base"), {"a": models("a", {**LLAMA3, "num_attention_heads": 64}), "b": models("b")}
    (folders[0] / "model.safetensors").write_bytes(b"")  # which is not what the message is about
    for pack in (sm.PackedWeights.from_folders, sm.PackedWeights.describe):
        with pytest.raises(ValueError, match="num_attention_heads is 64"):
            pack(*folders)


def test_a_warning_points_to_the_callers_line(models):
    with pytest.warns(CompatibilityWarning, match="rope_theta") as caught:
        sm.PackedWeights.from_folders(models("base"), {"a": models("a", {**LLAMA3, "rope_theta": 1e6})})
    assert [one.filename for one in caught] == [__file__]


@pytest.fixture
def samerge(monkeypatch, capsys):
    """The command as the shell calls it: exit code and lines on stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["samerge", *map(str, arguments)])
        with warnings.catch_warnings(), pytest.raises(SystemExit) as end:
            warnings.simplefilter("ignore")
            main()
        return end.value.code, capsys.readouterr().err.splitlines()

    return run


def test_the_command_line_shows_each_warning_as_one_line(models, samerge, tmp_path):
    models("a", {**LLAMA3, "rope_theta": 1e6, "rms_norm_eps": 1e-6})
    models("b", {**LLAMA3, "rope_theta": 1e6})
    names = "".join(f"- {{model: {tmp_path / name}, parameters: {{weight: 0.5}}}}\n" for name in ("a", "b"))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"merge_method: task_arithmetic\nbase_model: {tmp_path / 'base'}\nmodels:\n{names}")
    code, lines = samerge("merge", recipe, tmp_path / "out")
    assert code == 0 and len(lines) == 3, lines
    assert all(line.startswith("warning: expert '") and "(/" in line for line in lines), lines
    models("b", {**LLAMA3, "num_attention_heads": 64})
    code, lines = samerge("merge", recipe, tmp_path / "out2")
    assert code == 1 and lines[0].startswith("error: expert 'b'") and not (tmp_path / "out2").exists()


def test_what_was_shown_is_not_shown_again(capsys):
    with warnings.catch_warnings(record=True) as others:
        warnings.simplefilter("always")
        with warnings_as_lines():
            for _ in range(2):
                for category in (CompatibilityWarning, UserWarning):
                    warnings.warn("[twice]", category, stacklevel=1)
    assert capsys.readouterr().err == "warning: [twice]\n"
    assert [one.category for one in others] == [UserWarning, UserWarning]
