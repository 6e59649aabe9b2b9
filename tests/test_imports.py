import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytest.importorskip("importlinter")


@pytest.fixture
def tree(tmp_path):
    """A copy of the package's modules, and of the contracts."""
    shutil.copytree(ROOT / "samerge_ext", tmp_path / "samerge_ext", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint(tree):
    command = "from importlinter.cli import lint_imports_command as lint; lint()"
    return subprocess.run([sys.executable, "-c", command, "--no-cache"], cwd=tree, capture_output=True, text=True)


def test_imports_go_downward(tree):
    result = lint(tree)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    "module, imports",
    [
        ("memory", "samerge_ext.cli"),  # upward
        ("learning/config", "samerge_ext.elementwise.magnitudes"),  # sideways
        ("packing/layout", "samerge_ext.packing.stores"),  # in a circle
    ],
)
def test_a_broken_contract_is_found(tree, module, imports):
    with open(tree / f"samerge_ext/{module}.py", "a") as file:
        file.write(f"\nimport {imports}\n")
    result = lint(tree)
    assert result.returncode == 1, result.stdout
    assert "BROKEN" in result.stdout and imports.split(".")[1] in result.stdout.split("BROKEN", 1)[1]


def test_no_helper_of_the_tests_has_the_name_of_a_benchmark():
    """Both folders are on the path of some tests, and processes that these start would import the other one."""
    helpers = {path.stem for path in (ROOT / "tests" / "support").glob("*.py")}
    assert not helpers & {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
