"""One rank on a GPU, which NCCL joins with nobody: it learns what one process learns. On the CPU the same by gloo."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
import yaml
from helpers import PATH_TOLERANCE, ROOT
from processes import in_a_process
from safetensors.torch import save_file

import samerge_ext as sm
from samerge_ext.budget.plan import Plan
from samerge_ext.packing.ranks import Ranks

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
WAYS = {
    "resident": {},
    "streamed": {"streamed": True},
    "from a file": {"streamed": True},
    "within a budget": {"memory_budget": "100GB"},
}


def joined(device):
    """A group of this process alone."""
    store = dist.FileStore(str(Path(tempfile.mkdtemp()) / "store"), 1)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=0, world_size=1)


def in_a_file(base, experts, folder, device):
    paths = {}
    for name, module in {"base": base, **experts}.items():
        paths[name] = folder / f"{name}.safetensors"
        save_file({n: t.clone() for n, t in module.state_dict().items() if n != "tied.weight"}, paths[name])
    options = {"dtype": torch.float64, "device": device, "file": folder / "packed"}
    return sm.PackedWeights.from_folders(paths.pop("base"), paths, **options)


def learned(device):
    """λ of every way, of one rank and of one process, as lists and with layers in one order."""
    joined(device)
    base = tiny.make(0)
    experts, heads = tiny.make_experts(base), {task: head.to(device) for task, head in tiny.make_heads().items()}
    batches = {task: [batch.to(device) for batch in held] for task, held in tiny.make_batches().items()}
    packed = sm.PackedWeights.from_modules(base, experts, dtype=torch.float64, device=device)
    file = in_a_file(base, experts, Path(tempfile.mkdtemp()), device)

    def coefficients(weights, **settings):
        config = sm.SAMergingConfig(steps=4, progress=False, device=device, **settings)
        result = sm.samerging(tiny.make(1), weights, batches, tiny.plain(heads), config=config)
        assert result.coefficients.device.type == device
        assert all(torch.isfinite(tensor).all() for tensor in result.state_dict().values() if tensor.is_floating_point())
        return result.coefficients[:, [weights.layout.names.index(name) for name in packed.layout.names]].tolist()

    found = {}
    for name, settings in WAYS.items():
        found[name] = coefficients((file if "file" in name else packed).shard(), **settings)
    if device == "cuda":
        Plan.choose = lambda self, *_: next(way for way in self.ways if way.store == "host")
        found["from the host"] = coefficients(file.shard(), memory_budget="100GB")
    return found, coefficients(packed)


@pytest.mark.parametrize("device", DEVICES)
def test_one_rank_learns_what_one_process_learns(device):
    found, truth = in_a_process(learned, device)
    truth = torch.tensor(truth, dtype=torch.float64)
    assert (truth - 0.3).abs().max() > 1e-3
    for name, coefficients in found.items():
        assert (torch.tensor(coefficients, dtype=torch.float64) - truth).norm() <= PATH_TOLERANCE[torch.float64] * truth.norm(), (
            name
        )


def sent(device):
    """What comes back of every collective, with one rank."""
    joined(device)
    ranks = Ranks.of(None, torch.device(device))
    part = torch.arange(5.0, device=device)
    ranks.wait()
    ranks.require_equal(7, "numbers", part.device)
    found = [ranks.gather(part)()[0], ranks.exchange(part[None])()[0], ranks.scatter_sum(part[None]), ranks.sum(part.clone())]
    return ranks.group is not None, [each.tolist() for each in found]


@pytest.mark.parametrize("device", DEVICES)
def test_what_one_rank_sends_comes_back(device):
    has_group, found = in_a_process(sent, device)
    assert has_group and found == 4 * [[0.0, 1.0, 2.0, 3.0, 4.0]]


def merged_by_command(folder, device):
    """λ of a recipe, merged by torchrun's one process."""
    import classifiers

    models = classifiers.write(folder)
    files = {"mood": str(models / "mood.txt"), "topic": str(models / "topic.jsonl")}
    said = {
        "merge_method": "samerging",
        "base_model": str(models / "base"),
        "models": [{"model": str(models / task)} for task in classifiers.LABELS],
        "heads": ["classifier.*"],
        "calibration": {"files": files, "batch_size": 2},
        "parameters": {"steps": 3, "learning_rate": 0.01, "streamed": True, "progress": False, "device": device},
    }
    (folder / "merge.yaml").write_text(yaml.safe_dump(said))
    found = []
    for launcher in (["torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m"], []):
        out = folder / f"out {len(found)}"
        command = [sys.executable, "-m", *launcher, "samerge_ext", "merge", str(folder / "merge.yaml"), str(out)]
        run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert run.returncode == 0, run.stderr
        rows = json.loads((out / "coefficients.json").read_text())["coefficients"]
        found.append(torch.tensor([list(row.values()) for row in rows.values()], dtype=torch.float64))
    return found


@pytest.mark.gpu
def test_the_command_merges_by_one_rank_of_torchrun(tmp_path):
    found, truth = merged_by_command(tmp_path, "cuda")
    assert (found - truth).norm() <= PATH_TOLERANCE[torch.float32] * truth.norm()
