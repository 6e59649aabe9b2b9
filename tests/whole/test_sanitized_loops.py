"""The CPU loops without torch, built and run under AddressSanitizer and UndefinedBehaviorSanitizer: tests/cpp."""

import os
import shutil
import subprocess

import pytest
from helpers import ROOT

COMPILER = os.environ.get("CXX", "g++")  # as make chooses it

pytestmark = [
    pytest.mark.skipif(not (ROOT / "Makefile").exists(), reason="needs the source tree"),
    pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed"),
    pytest.mark.skipif(shutil.which(COMPILER.split()[0]) is None, reason=f"{COMPILER} is not installed"),
]


def test_the_loops_pass_the_sanitizers(tmp_path):
    probe = [*COMPILER.split(), "-fsanitize=address,undefined", "-x", "c++", "-", "-o", tmp_path / "probe"]
    if subprocess.run(probe, input="int main() {}", capture_output=True, text=True).returncode:
        pytest.skip(f"{COMPILER} has no libasan or libubsan to link with")
    command = ["make", "sanitize", f"SANITIZED={tmp_path}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert "portable:" in result.stdout and "agree" in result.stdout
