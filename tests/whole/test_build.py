import importlib.util
import os
import re
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import ROOT

NEEDED = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "samerge_ext", "kernels", "csrc")

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")


@pytest.fixture
def setup():
    spec = importlib.util.spec_from_file_location("samerge_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path):
    """A copy of what a build reads, without what one leaves behind."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in NEEDED:
        source, target = ROOT / name, tmp_path / "tree" / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=ignore)
        elif source.exists():
            target.parent.mkdir(exist_ok=True)
            shutil.copy(source, target)
    return tmp_path / "tree"


def build_wheel(tree: Path, **environment: str) -> tuple[subprocess.CompletedProcess, set[str]]:
    """The finished `pip wheel`, and the names in the wheel (none where it failed)."""
    command = [sys.executable, "-m", "pip", "wheel", ".", "-v", "--no-build-isolation", "--no-deps", "-w", "dist"]
    result = subprocess.run(command, cwd=tree, env={**os.environ, **environment}, capture_output=True, text=True)
    names = set()
    for wheel in tree.glob("dist/*.whl"):
        names.update(zipfile.ZipFile(wheel).namelist())
    return result, names


HASTY = """#!{python}
import subprocess, sys
command = ["c++"]
for argument in sys.argv[1:]:
    if argument.endswith(".cpp"):
        print(argument, file=open({notes!r}, "a"))
    command += ["-x", "c++", "/dev/null"] if argument.endswith(".cpp") else [argument]
sys.exit(subprocess.run(command).returncode)
"""


@pytest.fixture
def hasty(tmp_path):
    """A compiler that notes every source and takes it for empty, and its notes: the real one has compiled all of them, with the
    same setup.py, into the installation that is tested."""
    compiler, notes = tmp_path / "hasty", tmp_path / "notes"
    compiler.write_text(HASTY.format(python=sys.executable, notes=str(notes)))
    compiler.chmod(0o755)
    return compiler, notes


def test_a_wheel_holds_the_extension_and_the_kernels(tree, hasty):
    compiler, notes = hasty
    result, names = build_wheel(tree, CXX=str(compiler))
    assert result.returncode == 0, result.stdout[-4000:]
    compiled = {Path(line).relative_to(tree) for line in notes.read_text().splitlines()}
    units = {path for path in (ROOT / "csrc/cpu").glob("*.cpp") if not path.name.endswith("_cpu.cpp")}  # those: in wrappers.cpp
    assert {path.relative_to(ROOT) for path in {ROOT / "csrc/bindings.cpp", *units}} <= compiled
    assert any(name.startswith("samerge_ext/_C.") for name in names)
    pages = {path.name for path in (ROOT / "samerge_ext/reports/templates").glob("*.html")}
    assert pages and {f"samerge_ext/reports/templates/{page}" for page in pages} <= names
    assert {"samerge_ext/kernels/__init__.py", "samerge_ext/ops/weighted_sum.py", "samerge_ext/py.typed"} <= names
    assert not any(name.startswith(("tests/", "csrc/", "kernels/")) for name in names)


def test_without_a_compiler_the_package_installs_and_warns(tree, tmp_path):
    empty = tmp_path / "bin"
    empty.mkdir()
    environment = {"PATH": str(empty)}
    if "CXX" in os.environ:
        pytest.skip("CXX is set")
    result, names = build_wheel(tree, **environment)
    assert result.returncode == 0, result.stdout[-4000:]
    assert "no C++ compiler found" in result.stdout + result.stderr
    assert "samerge_ext/kernels/__init__.py" in names and not any("_C." in name for name in names)


def test_a_failing_compilation_fails_the_installation(tree):
    shutil.rmtree(tree / "csrc")
    (tree / "csrc").mkdir()
    (tree / "csrc" / "bindings.cpp").write_text("#error broken on purpose\n")
    result, names = build_wheel(tree)
    assert result.returncode and not names
    assert "broken on purpose" in result.stdout + result.stderr


def test_a_compiler_that_is_named_must_exist(setup, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit, match="CXX names 'no-such-compiler'"):
        setup.compiler()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    assert setup.compiler() is None


def test_without_torch_the_error_says_what_to_do(setup, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils", None)
    with pytest.raises(SystemExit, match="pip install . --no-build-isolation"):
        setup.import_cpp_extension()


@pytest.mark.parametrize("toolkit", (None, "/opt/cuda"))
@pytest.mark.parametrize("version", (None, "13.0"))
def test_cuda_needs_a_cuda_torch_and_its_toolkit(setup, monkeypatch, tmp_path, toolkit, version):
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    for name in ("weighted_sum.cu", "weighted_sum_cuda.cpp"):
        (tmp_path / "csrc" / "cuda" / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(setup, "compiler", lambda: "c++")
    monkeypatch.setattr(torch.version, "cuda", version)
    fake = types.SimpleNamespace(
        CUDA_HOME=toolkit,
        CppExtension=lambda name, sources, **_: ("cpp", sources),
        CUDAExtension=lambda name, sources, **_: ("cuda", sources),
    )
    ((kind, sources),) = setup.extensions(fake)
    with_cuda = bool(toolkit and version)
    assert kind == ("cuda" if with_cuda else "cpp")
    assert ("csrc/cuda/weighted_sum.cu" in sources) == ("csrc/cuda/weighted_sum_cuda.cpp" in sources) == with_cuda
    assert os.environ.pop("TORCH_CUDA_ARCH_LIST", None) == (setup.CUDA_ARCHITECTURES if with_cuda else None)


def test_only_the_bindings_include_headers_that_take_long():
    heavy = re.compile(r"#include <(torch/|ATen/(ops/|ATen\.h|Context\.h|Functions\.h))")  # 3 to 10 seconds a file
    files = [path for pattern in ("*.h", "cpu/*") for path in (ROOT / "csrc").glob(pattern)]
    assert len(files) > 30 and not [path.name for path in files if heavy.search(path.read_text())]


def test_every_wrapper_is_compiled():
    wrappers = re.findall(r'#include "(\w+\.cpp)"', (ROOT / "csrc" / "cpu" / "wrappers.cpp").read_text())
    assert wrappers == sorted(path.name for path in (ROOT / "csrc" / "cpu").glob("*_cpu.cpp"))
