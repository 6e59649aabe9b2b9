"""The arithmetic of docs/distributed.md: its table is what the script prints, by the formulas of the page."""

import importlib
import subprocess
import sys

import pytest
from helpers import ROOT

SCRIPT = ROOT / "benchmarks" / "ranks_on_paper.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="needs the source tree")


def test_the_page_has_what_the_script_prints():
    printed = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=True).stdout
    assert printed in (ROOT / "docs" / "distributed.md").read_text()


def test_bytes_are_those_of_the_page(monkeypatch):
    """3 ⌈T / W⌉ N b (W − 1) / W in a pass where streamed, 2 N b (W − 1) / W resident, twice a step."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    paper = importlib.import_module("ranks_on_paper")
    case = paper.Case("", 1e9, 10, experts=5, gpus=4)
    assert paper.cost(case, streamed=True).received == pytest.approx(2 * 3 * 2 * 1e9 * 2 * 3 / 4)
    assert paper.cost(case, streamed=False).received == pytest.approx(2 * 2 * 1e9 * 2 * 3 / 4)
    assert paper.cost(case, streamed=True).memory == pytest.approx(6e9 * 2 / 4 + 5 * 2e9 / 10)
