"""What needs no tensor answers without waiting for torch."""

import subprocess
import sys

import pytest
import yaml

HEAVY = {"torch", "numpy", "transformers", "rich"}
COMMAND = f"""
import atexit, sys
atexit.register(lambda: print("imported:", *({HEAVY} & sys.modules.keys())))
sys.argv[0] = "samerge"
from samerge_ext.cli.main import main
main()
"""


def samerge(*arguments):
    """The exit code of a command, all that it printed, and which heavy packages it imported."""
    run = subprocess.run([sys.executable, "-c", COMMAND, *map(str, arguments)], capture_output=True, text=True)
    output, _, imported = run.stdout.rpartition("imported:")
    assert "Traceback" not in run.stderr, run.stderr
    return run.returncode, output + run.stderr, imported.split()


def test_importing_the_package_imports_no_torch():
    code = f"import sys, samerge_ext; dir(samerge_ext); print(*({HEAVY} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "\n"


@pytest.mark.parametrize("line", ["--help", "merge --help", "merge none.yaml out", "plan none.yaml"])
def test_help_and_usage_import_no_torch(line):
    code, output, imported = samerge(*line.split())
    assert "Usage: samerge" in output and code == (2 if "none.yaml" in line else 0)
    assert not imported


RECIPE = {"merge_method": "ties", "base_model": "base", "models": ["expert"], "parameters": {"weight": 1.0}}
LEARNED = {**RECIPE, "merge_method": "samerging", "calibration": {"files": {"expert": "no.txt"}}}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("models: [", "is not valid YAML"),
        ({**RECIPE, "merge_methud": "ties"}, "no key 'merge_methud'"),
        ({**RECIPE, "merge_method": "slurp"}, "'slurp' is not a method here"),
        ({**RECIPE, "parameters": {"trim": "row"}}, "choose tensor or vector"),
        ({**RECIPE, "models": ["a", "expert"]}, "a is neither a folder nor a file"),
        ({**RECIPE, "models": [{"model": "expert", "adapter": "a"}]}, "a holds no PEFT adapter"),
        ({**RECIPE, "base_model": "b"}, "b is neither a folder nor a file"),
        ({**RECIPE, "base_model": "."}, "pass one of the models in it: base, expert"),
        ({**LEARNED, "parameters": {}}, "no.txt: No such file"),
        ({**LEARNED, "parameters": {"rho": -1}}, "rho=-1"),
    ],
)
def test_a_refused_recipe_imports_no_torch(tmp_path, monkeypatch, recipe, message):
    monkeypatch.chdir(tmp_path)
    for name in ("base", "expert"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    (tmp_path / "recipe.yaml").write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe))
    code, output, imported = samerge("merge", "recipe.yaml", "out")
    assert code == 1 and message in output
    assert not imported
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "expert", "recipe.yaml"]


def test_two_merges_are_compared_without_torch(tmp_path):
    for name, method in (("a", "ties"), ("b", "wudi")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(f'{{"method": "{method}"}}')
    code, output, imported = samerge("compare", tmp_path / "a", tmp_path / "b")
    assert code == 0 and "ties" in output and "wudi" in output
    assert not imported
