"""A learned merge by torchrun across two hosts (`hosts`): one is killed, or its card goes down; the job ends, and goes on.

python tests/support/two_hosts.py            # make test-hosts
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import classifiers
import hosts
import torch
import yaml
from classifiers import LABELS
from helpers import PATH_TOLERANCE, ROOT

from samerge_ext.recipes.recipe import load_recipe
from samerge_ext.recipes.run import run_recipe

STEPS = 60
TIMEOUT = 15  # seconds that ranks wait for each other
LONG = 900  # for what takes seconds on a machine that does nothing else
SLACK = 120  # in which torchrun ends what is left


def write_recipe(folder: Path) -> Path:
    models = classifiers.write(folder)
    said = {
        "merge_method": "samerging",
        "base_model": str(models / "base"),
        "models": [{"model": str(models / task)} for task in LABELS],
        "heads": ["classifier.*"],
        "calibration": {"files": {"mood": str(models / "mood.txt"), "topic": str(models / "topic.jsonl")}, "batch_size": 2},
        "parameters": {"steps": STEPS, "learning_rate": 0.01, "streamed": True, "checkpoint_every": 1, "progress": False},
    }
    path = folder / "merge.yaml"
    path.write_text(yaml.safe_dump(said))
    return path


def begin(both: hosts.Hosts, recipe: Path, out: Path, number: int) -> list:
    """torchrun on both hosts, a process each, and where each prints."""
    started = []
    for host in (0, 1):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        command += ["--node-rank", str(host), "--master-addr", both.addresses[0], "--master-port", hosts.PORT]
        command += ["-m", "samerge_ext", "merge", str(recipe), str(out), "--timeout", str(TIMEOUT)]
        output = out.parent / f"{out.name}-{number}-{host}.txt"
        environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        started.append((both.start(host, command, output, **environment), output))
    return started


def wait_for(condition, what: str) -> None:
    until = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < until, f"no {what} after {LONG} s"
        time.sleep(0.02)


def coefficients(folder: Path) -> torch.Tensor:
    found = json.loads((folder / "coefficients.json").read_text())["coefficients"]
    return torch.tensor([list(row.values()) for row in found.values()], dtype=torch.float64)


def in_the_middle(both: hosts.Hosts, recipe: Path, out: Path, harm) -> tuple[str, float]:
    """What the first host's processes say when harm comes to the second one in the middle of a merge, and after how long."""
    (first, output), (second, _) = begin(both, recipe, out, 0)
    state = out.with_name(f"{out.name}.state") / "state.pt"
    wait_for(lambda: state.exists() or first.poll() is not None, "first step")
    harm(1)
    started = time.monotonic()
    assert first.wait(LONG), f"{output.read_text()}\nit ended well, before harm came"
    seconds = time.monotonic() - started
    both.kill(1)
    second.wait()
    both.cut_off(1, is_down=False)
    assert state.exists() and not out.exists()
    return output.read_text(), seconds


def main() -> None:
    if reason := hosts.why_not():
        print(f"two hosts: {reason}")
        return
    with tempfile.TemporaryDirectory() as folder, hosts.Hosts() as both:
        recipe, one = write_recipe(Path(folder)), Path(folder) / "one"
        run_recipe(load_recipe(recipe, {}), one)
        truth = coefficients(one)

        def assert_alike(out: Path) -> None:
            error = (coefficients(out) - truth).norm() / truth.norm()
            assert error <= PATH_TOLERANCE[torch.float32], f"λ differs by {error:.1e}"

        out = Path(folder) / "killed"
        said, seconds = in_the_middle(both, recipe, out, both.kill)
        assert "error: rank 0: rank 0 of 2 waits for the others, and one of them has ended or does not answer" in said, said
        assert both.addresses[1] in said, f"{said}\ndoes not say who is gone"
        for process, output in begin(both, recipe, out, 1):
            assert process.wait(LONG) == 0, output.read_text()
        assert_alike(out)
        print(f"a host was killed: the other one ended after {seconds:.1f} s, and both went on to λ of one process")

        out = Path(folder) / "cut off"
        said, seconds = in_the_middle(both, recipe, out, both.cut_off)
        assert "error: rank 0: rank 0 of 2 waits for the others, and one of them has ended or does not answer" in said, said
        assert "Timed out" in said, f"{said}\ndoes not say why"
        assert seconds < TIMEOUT + SLACK, f"it took {seconds:.0f} s"
        run_recipe(load_recipe(recipe, {}), out)
        assert_alike(out)
        print(f"a card went down: the other host ended after {seconds:.1f} s of {TIMEOUT}, and one process went on to the same λ")


if __name__ == "__main__":
    main()
