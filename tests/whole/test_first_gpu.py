"""The script of `make first-gpu`, whose stages need a GPU: they fit nine minutes, and one that fails costs only itself."""

import os
import re
import subprocess

from helpers import ROOT

SCRIPT = ROOT / "benchmarks" / "first_gpu.sh"
STAGE = re.compile(r"^(?:stage|tests|bench) ([\w-]+) (\d+)", re.MULTILINE)


def test_stages_fit_nine_minutes():
    assert sum(int(seconds) for _, seconds in STAGE.findall(SCRIPT.read_text())) <= 9 * 60


def test_files_that_are_named_exist():
    text = SCRIPT.read_text()
    for path in re.findall(r"tests/[\w/]+\.py", text):
        assert (ROOT / path).is_file(), path
    for name in re.findall(r"bench_\w+\.py", text):
        assert (ROOT / "benchmarks" / name).is_file(), name


def test_a_stage_that_fails_costs_only_itself(tmp_path):
    sanitizer = tmp_path / "bin" / "compute-sanitizer"
    sanitizer.parent.mkdir()
    sanitizer.write_text("#!/bin/sh\necho it is broken\nexit 3\n")
    sanitizer.chmod(0o755)
    environment = os.environ | {"PATH": f"{sanitizer.parent}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"PYTHON": "true", "RESULTS": str(tmp_path)}
    done = subprocess.run(["sh", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True)
    (out,) = tmp_path.glob("first-gpu-*")
    found = dict(line.split(": ", 1) for line in (out / "summary.txt").read_text().splitlines())
    assert done.returncode == 1 and list(found) == [name for name, _ in STAGE.findall(SCRIPT.read_text())]
    assert found.pop("sanitizer").startswith("failed (3)") and (out / "sanitizer.log").read_text() == "it is broken\n"
    assert all(how.startswith("passed") for how in found.values()), found
