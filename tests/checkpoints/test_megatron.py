"""Checkpoints that Megatron-Core wrote are merged, and a merge is loaded by it: make test-megatron."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

import samerge_ext as sm
from samerge_ext.elementwise.file_merge import FileMerge, merge_files
from samerge_ext.elementwise.piecewise import Combination

MEGATRON = os.environ.get("MEGATRON")
pytestmark = pytest.mark.skipif(MEGATRON is None, reason="needs megatron-core in a folder of its own: make test-megatron")


def run(world, meeting, *arguments):
    environment = {**os.environ, "PYTHONPATH": MEGATRON, "OMP_NUM_THREADS": "1", "MEGATRON_WORLD": str(world)}
    environment["MEGATRON_MEETING"] = f"file://{meeting}"
    script = [sys.executable, ROOT / "tests/support/megatron_models.py", *map(str, arguments)]
    start = lambda rank: subprocess.Popen(
        script, env={**environment, "MEGATRON_RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for process in [start(rank) for rank in range(world)]:
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said[-4000:]


@pytest.mark.parametrize("world", [1, 2])
def test_there_and_back(tmp_path, world):
    """By ranks that each have a part of every matrix, with the form of Megatron's distributed checkpoints."""
    base, a, b, merged, again = (tmp_path / name for name in ("base", "a", "b", "merged", "again"))
    run(world, tmp_path / "saving", "save", base, 0, a, 1, b, 2)
    merge_files(FileMerge([("a", a), ("b", b)], lambda *_: Combination([0.5, 0.25]), base, base), merged)
    sm.save_dcp(merged, again, key=None)
    folders = {"base": base, "a": a, "b": b, "again": again}
    run(world, tmp_path / "loading", "load", *(part for name, folder in folders.items() for part in (folder, tmp_path / name)))
    for rank in range(world):
        found = {name: torch.load(f"{tmp_path / name}.{rank}") for name in folders}
        for name, tensor in found["again"].items():
            start, *experts = (found[of][name] for of in ("base", "a", "b"))
            expected = start + 0.5 * (experts[0] - start) + 0.25 * (experts[1] - start)
            torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
        assert len(found["again"]) > 10 and not torch.equal(found["a"][name], found["b"][name])
