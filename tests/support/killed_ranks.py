"""`samerge merge` by several ranks of which one or all are killed at random moments, again and again: the same command goes on to
the bytes of a quiet run.

Ranks are forks of one process that has imported everything, with the variables that torchrun sets; what torchrun does when one of
them ends, `together` does.
"""

import os
import random
import shutil
import signal
import socket
import tempfile
import time
from pathlib import Path

import attacks
import torch
import yaml

KINDS = ("learned", "file to file")
GRACE = 30  # seconds that a rank has to end after SIGTERM, as of torchrun


class Command:
    """A rank of `samerge merge`, as torchrun starts it."""

    def __init__(self, folder: Path, arguments: list[str], rank: int, count: int, port: int):
        self.folder, self._arguments = folder, arguments
        self._variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}

    def __call__(self, out: Path) -> None:  # in a fork
        from samerge_ext.cli.commands import app

        variables = {"MASTER_ADDR": "localhost", "TORCHELASTIC_RUN_ID": "soak", **self._variables}
        os.environ.update({name: str(value) for name, value in variables.items()})
        if app(["merge", self._arguments[0], str(out), *self._arguments[1:]], standalone_mode=False):
            raise ValueError("samerge ended with an error")


def together(commands: list[Command], out: Path, kill_after: float | None = None, doomed: tuple[int, ...] = ()) -> list[int]:
    """Their exit codes, or minus the signals. doomed: the ranks that are killed after so many seconds. A rank that fails has the
    others stopped."""
    started = [attacks.begun(command, out) for command in commands]
    until = None if kill_after is None else time.monotonic() + kill_after
    codes: dict[int, int] = {}
    stopped_at = None
    while len(codes) < len(started):
        for rank, (child, messages) in enumerate(started):
            if rank not in codes and (ended := os.waitpid(child, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(ended[1])
                if codes[rank] == 0:
                    continue
                said = messages.read_text()
                assert "Traceback" not in said, said
        if until is not None and time.monotonic() >= until:
            _send(signal.SIGKILL, [started[rank][0] for rank in doomed if rank not in codes])
            until = None
        left = [child for rank, (child, _) in enumerate(started) if rank not in codes]
        if stopped_at is None and any(codes.values()):
            stopped_at = time.monotonic()
            _send(signal.SIGTERM, left)
        if stopped_at is not None and time.monotonic() > stopped_at + GRACE:
            _send(signal.SIGKILL, left)
        time.sleep(0.005)
    for _, messages in started:
        messages.unlink()
    return [codes[rank] for rank in range(len(started))]


def _send(number: int, children: list[int]) -> None:
    for child in children:
        os.kill(child, number)


def recipe_of(draw: random.Random, folder: Path, kind: str) -> list[str]:
    """The arguments of a command for models in the folder: "learned", or from "file to file"."""
    import classifiers

    models = classifiers.write(folder)
    said = {
        "base_model": str(models / "base"),
        "models": [{"model": str(models / task)} for task in classifiers.LABELS],
        "heads": ["classifier.*"],
    }
    path = folder / "merge.yaml"
    if kind == "learned":
        held = draw.choice([{"streamed": True}, {"streamed": False}, {"memory_budget": "100GB"}])
        files = {"mood": str(models / "mood.txt"), "topic": str(models / "topic.jsonl")}
        said["merge_method"] = draw.choice(["samerging", "adamerging"])
        said["calibration"] = {"files": files, "batch_size": 2}
        said["parameters"] = {"steps": draw.randint(10, 40), "checkpoint_every": draw.randint(1, 3), "progress": False, **held}
    else:
        said["merge_method"] = draw.choice(["ties", "dare_linear", "task_arithmetic"])
        said["parameters"] = {"weight": 0.5, "density": 0.4} if said["merge_method"] != "task_arithmetic" else {"weight": 0.5}
        if said["merge_method"] == "ties" and draw.random() < 0.5:
            said["parameters"]["trim"] = "vector"
    path.write_text(yaml.safe_dump(said))
    return [str(path), "--quiet", *(["--shard-size", "5KB"] if kind != "learned" else [])]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def one_merge(seed: int, kind: str, kills: int) -> int:
    """A random merge that is killed at most so often; returns how often. Learned, its ranks stay as many, which end in the same
    bits; from file to file they are of another number each time."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments, learned = recipe_of(draw, folder, kind), kind == "learned"
        count, done = draw.randint(2, 3), 0

        def ranks(number: int) -> list[Command]:
            port = free_port()
            return [Command(folder, arguments, rank, number, port) for rank in range(number)]

        quiet, out = folder / "quiet", folder / "out"
        started = time.monotonic()
        assert together(ranks(count if learned else 1), quiet) == [0] * (count if learned else 1)
        seconds, expected = time.monotonic() - started, attacks.content(quiet)
        while done < kills:
            number = count if learned else draw.randint(1, 5)
            doomed = draw.choice([tuple(range(number)), (draw.randrange(number),)])
            codes = together(ranks(number), out, draw.uniform(0.1, 1) * seconds, doomed)
            killed = -signal.SIGKILL in codes
            done += killed
            if not killed:  # it was through, and is made anew
                assert codes == [0] * number, codes
                assert attacks.content(out) == expected, f"seed {seed}, {kind}"
                shutil.rmtree(out)
                shutil.rmtree(out.with_name("out.state"), ignore_errors=True)
        number = count if learned else draw.randint(1, 5)
        if not out.exists():
            assert together(ranks(number), out) == [0] * number
        assert attacks.content(out) == expected, f"seed {seed}, {kind}: other bytes after {done} kills"
        return done


def many_kills(kind: str, kills: int, seed: int = 0) -> None:
    """So many in runs from this seed on; in a process that has made no backward pass, which a fork may not follow."""
    import samerge_ext.cli.commands
    import samerge_ext.recipes.run  # noqa: F401  (what every fork would import)

    torch.set_num_threads(1)
    done = 0
    while done < kills:
        done += one_merge(seed, kind, min(5, kills - done))
        seed += 1
        print(f"{kind}, by ranks: {done} killed runs; each went on to the same bytes, up to seed {seed - 1}", flush=True)
