"""What merges must bear: two of everything at once, disks that fill, inputs that change, signals, damaged state.

Every attack leaves the bytes of a quiet run, or one message with the mend, after which the same command ends in these bytes.
"""

import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path

import torch
from processes import heed_signals, print_to
from safetensors.torch import load_file, save_file

import samerge_ext as sm
from samerge_ext.cli.signals import STOPPED, one_line_for_signals
from samerge_ext.elementwise.file_merge import FileMerge, merge_files
from samerge_ext.elementwise.piecewise import Combination
from samerge_ext.elementwise.ranks import ALONE, Rank
from samerge_ext.methods.dare import Dare
from samerge_ext.methods.ties import Ties
from samerge_ext.recipes import run

EXPERTS = ("mood", "topic")
REFUSED = r"is held by another merge|exists and is not empty"


class Merge:
    """A merge of a base and two experts under a folder: called with OUT, it merges to there."""

    heads = ()

    def __init__(self, draw, folder):
        self.draw, self.folder = draw, folder

    def quiet(self):
        """The files of a run that nothing disturbs, and the seconds that it takes."""
        out = self.folder / "quiet"
        shutil.rmtree(out, ignore_errors=True)
        started = time.monotonic()
        code, said = ended(begun(self, out))
        assert code == 0, said
        return content(out), time.monotonic() - started


class DataFree(Merge):
    def __init__(self, draw, folder):
        super().__init__(draw, folder)
        self.method, dtype = draw.choice(["arithmetic", "ties", "whole", "dare"]), draw.choice([torch.float32, torch.bfloat16])
        base = {f"w{i}": torch.randn(50, draw.randint(1, 400)) for i in range(12)}
        for seed, name in enumerate(("base", *EXPERTS)):
            torch.manual_seed(seed)
            change = 0.1 if seed else 0.0
            tensors = {key: (tensor + change * torch.randn_like(tensor)).to(dtype) for key, tensor in base.items()}
            (folder / name).mkdir()
            save_file(tensors, folder / name / "model.safetensors")

    def __call__(self, out, rank=ALONE):
        combination = Combination([0.7, 0.4], 0.9, elect=self.method in ("ties", "whole"))
        rule = {
            "arithmetic": lambda name, shape, dtype: combination,
            "dare": lambda name, shape, dtype: Dare(name, [0.3, 0.5], 3, combination),
        }.get(self.method, lambda name, shape, dtype: Ties(shape.numel(), dtype, [0.3, 0.5], combination))
        experts, base = [(task, self.folder / task) for task in EXPERTS], self.folder / "base"
        merge_files(FileMerge(experts, rule, base, base, whole=self.method == "whole", shard_bytes=100_000), out, rank=rank)


class Recipe(Merge):
    """Of transformers' models, learned or not, as the command runs it."""

    heads = ("classifier.*",)

    def __init__(self, draw, folder):
        import classifiers

        from samerge_ext.recipes.recipe import Recipe

        super().__init__(draw, folder)
        classifiers.write(folder)
        method = draw.choice(["samerging", "adamerging", "statsmerging", "ties"])
        files = {"mood": folder / "mood.txt", "topic": folder / "topic.jsonl"}
        learned = {
            "calibration": {"files": files, "batch_size": 2},
            "parameters": {"steps": draw.randint(2, 6), "progress": False, "checkpoint_every": draw.randint(1, 6)},
        }
        self.recipe = Recipe(
            merge_method=method,
            base_model=folder / "base",
            models=[{"model": folder / task} for task in EXPERTS],
            heads=["classifier.*"],
            **({"parameters": {"weight": 0.5, "density": 0.4}} if method == "ties" else learned),
        )

    def __call__(self, out):
        run.merge_files = lambda merge, *rest, **keys: merge_files(replace(merge, shard_bytes=10_000), *rest, **keys)
        run.run_recipe(self.recipe, out)


def begun(merge, out):
    """A fork that merges as the command does; it has begun to heed signals. Returns its number and the file of its messages."""
    messages = Path(tempfile.mkstemp(dir=merge.folder, suffix=".err")[1])
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        code = 2
        try:
            heed_signals()
            print_to(Path(os.devnull), messages)
            with one_line_for_signals():
                os.write(tell, b"1")
                try:
                    merge(out)
                    code = 0
                except (ValueError, OSError) as error:
                    print(error, file=sys.stderr, flush=True)
                    code = 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(tell)
    os.read(ready, 1)
    os.close(ready)
    return child, messages


def ended(process):
    """Its exit code, or minus the signal, and what it said."""
    child, messages = process
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = messages.read_text()
    messages.unlink()
    assert "Traceback" not in said, said
    return code, said


def content(folder):
    """The files of a folder without the report's, which say how long a run took and what memory."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.stem != "report"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def assert_whole(out, expected):
    """OUT has the expected files, and nothing is beside it."""
    found = content(out)
    assert found == expected, sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    beside = [path.name for path in out.parent.iterdir() if path.name.lstrip(".").startswith(f"{out.name}.")]
    assert not beside, beside


def goes_on(merge, out, expected):
    """The same command again, after what it says to do, ends in the expected files."""
    done = []
    for _ in range(4):
        code, said = ended(begun(merge, out))
        if code == 0:
            assert_whole(out, expected)
            return ", ".join(done) or "went on"
        if re.search("exists and is not empty", said):  # it was over, but for its state
            shutil.rmtree(out.with_name(f"{out.name}.state"))
            assert_whole(out, expected)
            return "was over"
        found = re.search(r"(\S+\.state/\S+) (?:is|holds) .*delete it", said)
        assert found, said
        Path(found[1]).unlink()
        done.append(f"{Path(found[1]).name} deleted as told")
    raise AssertionError(done)


def two_at_once(merge, out, expected, seconds):
    first = begun(merge, out)
    time.sleep(merge.draw.uniform(0, seconds))
    answers = [ended(begun(merge, out)), ended(first)]
    assert any(code == 0 for code, _ in answers), answers
    assert all(code == 0 or re.search(REFUSED, said) for code, said in answers), answers
    assert_whole(out, expected)
    return f"{sum(code != 0 for code, _ in answers)} refused"


class OfRank:
    """A merge as one of several processes makes it; killed when it is to wait for the disk for the ``syncs``-th time."""

    def __init__(self, merge, rank, syncs=0):
        self.folder, self._merge, self._rank, self._syncs = merge.folder, merge, rank, syncs

    def __call__(self, out):  # in a fork
        fsync, left = os.fsync, itertools.count(self._syncs, -1)
        os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL) if next(left) == 1 else fsync(file)
        self._merge(out, self._rank)


def killed_ranks(merge, out, expected, seconds):
    """One or all of some ranks are killed as soon as they have something to lose, and others, of another number, go on."""
    if not isinstance(merge, DataFree):
        return "skipped: recipes are merged by one process here"
    count, then = merge.draw.randint(2, 4), merge.draw.randint(1, 4)
    doomed = merge.draw.choice([range(count), [merge.draw.randrange(count)]])
    syncs = [merge.draw.randint(1, 12) if number in doomed else 0 for number in range(count)]
    ranks = [begun(OfRank(merge, Rank(number, count), syncs[number]), out) for number in range(count)]
    codes = [ended(each)[0] for each in ranks]
    assert set(codes) <= {0, -signal.SIGKILL}, codes
    answers = [ended(each) for each in [begun(OfRank(merge, Rank(number, then)), out) for number in range(then)]]
    assert all(code == 0 for code, _ in answers), answers
    if then > 1:  # what says to ranks that come late that all is done
        out.with_name(f"{out.name}.state").joinpath("merge.json").unlink()
        out.with_name(f"{out.name}.state").rmdir()
    assert_whole(out, expected)
    return f"{codes.count(-signal.SIGKILL)} of {count} killed, {then} went on"


def two_packers(merge, out, expected, seconds):
    """Of one file, in fp32 and fp64; each computes with what it packed."""
    experts = {task: merge.folder / task for task in EXPERTS}

    def packs(dtype):
        def pack(file):
            options = {"dtype": dtype, "heads": merge.heads}
            packed = sm.PackedWeights.from_folders(merge.folder / "base", experts, file=file, **options).in_memory()
            whole = sm.PackedWeights.from_folders(merge.folder / "base", experts, **options)
            if not (torch.equal(packed.base, whole.base) and torch.equal(packed.task_vectors, whole.task_vectors)):
                raise ValueError("what was packed is not what is opened")

        pack.folder = merge.folder
        return pack

    file = out.with_suffix(".packed")
    answers = [ended(each) for each in [begun(packs(dtype), file) for dtype in (torch.float32, torch.float64, torch.float32)]]
    assert answers == [(0, "")] * 3, answers
    sm.PackedWeights.open(file)
    file.unlink()
    return "each its own"


def signals(merge, out, expected, seconds):
    """Four of three kinds, of which some come too late."""
    sent = []
    for _ in range(4):
        process = begun(merge, out)
        time.sleep(merge.draw.uniform(0, seconds))
        number = merge.draw.choice([signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
        os.kill(process[0], number)
        code, said = ended(process)
        if code in (0, 1):
            assert code == 0 or "exists and is not empty" in said, said
            assert content(out) == expected
            shutil.rmtree(out)
            shutil.rmtree(out.with_name(f"{out.name}.state"), ignore_errors=True)
        elif number == signal.SIGKILL:
            assert code == -number, (code, said)
        else:
            assert code == 128 + number and said.endswith(STOPPED.format(number.name) + "\n"), (code, said)
        sent += [number.name] if code not in (0, 1) else []
    goes_on(merge, out, expected)
    return " ".join(sent) or "too late"


def damaged_state(merge, out, expected, seconds):
    state = out.with_name(f"{out.name}.state")
    for _ in range(4):
        process = begun(merge, out)
        time.sleep(merge.draw.uniform(0.3, 1) * seconds)
        os.kill(process[0], signal.SIGKILL)
        ended(process)
        files = sorted(path for path in state.rglob("*") if path.is_file() and path.stat().st_size)
        if files:
            break
        shutil.rmtree(out, ignore_errors=True)
    else:
        goes_on(merge, out, expected)
        return "nothing to damage"
    path = merge.draw.choice(files)
    spoilt = bytearray(path.read_bytes())
    harm = merge.draw.choice(["removed", "emptied", "cut", "flipped"])
    if harm == "removed":
        path.unlink()
    elif harm == "flipped":
        spoilt[merge.draw.randrange(len(spoilt))] ^= 1 << merge.draw.randrange(8)
        path.write_bytes(spoilt)
    else:
        os.truncate(path, 0 if harm == "emptied" else merge.draw.randrange(len(spoilt)))
    return f"{path.name} {harm}: {goes_on(merge, out, expected)}"


def changed_input(merge, out, expected, seconds):
    """Numbers of the old expert or of the new one, never of both; or its file is named. The same command merges the new one."""
    path = merge.folder / merge.draw.choice(EXPERTS) / "model.safetensors"
    old = path.read_bytes()
    other = merge.folder / "other.safetensors"
    save_file({name: (1.5 * tensor).to(tensor.dtype) for name, tensor in load_file(path).items()}, other, {"format": "pt"})
    new = other.read_bytes()
    path.write_bytes(new)
    with_new, _ = merge.quiet()
    path.write_bytes(old)
    process = begun(merge, out)
    time.sleep(merge.draw.uniform(0, seconds))
    change = merge.draw.choice(["renamed over", "written over", "cut", "removed", "touched"])
    if change == "renamed over":
        os.replace(other, path)
    elif change == "written over":
        path.write_bytes(new)
    elif change == "cut":
        os.truncate(path, len(old) // 2)
    elif change == "removed":
        path.unlink()
    else:
        os.utime(path)
    code, said = ended(process)
    outcome = f"{change}: "
    if code == 0:
        found = content(out)
        assert found in (expected, with_new), f"{change}: numbers of both, or of neither"
        outcome += "old" if found == expected else "new"
        shutil.rmtree(out)
    else:
        assert path.parent.name in said, said
        outcome += "told"
    path.write_bytes(new)
    goes_on(merge, out, with_new)
    path.write_bytes(old)
    return outcome


def full_disk(merge, out, expected, seconds):
    """A file system of random size, which is told and leaves no OUT; in a larger one the same command ends well."""
    needed = sum(map(len, expected.values()))
    disk = merge.folder / "disk"
    disk.mkdir(exist_ok=True)
    size = f"size={int(needed * merge.draw.uniform(0.05, 1.5)) + 8192}"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", str(disk)], capture_output=True).returncode:
        return "skipped: this process may not mount a file system (it takes root)"
    try:
        code, said = ended(begun(merge, disk / "out"))
        assert code == 0 or (re.search("no space", said, re.IGNORECASE) and not (disk / "out").exists()), said
        if code:
            subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
            goes_on(merge, disk / "out", expected)
        assert_whole(disk / "out", expected)
        return "told" if code else "it sufficed"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


ATTACKS = (two_at_once, killed_ranks, two_packers, signals, damaged_state, changed_input, full_disk)


def one_round(seed, kind=None, attacks=ATTACKS):
    """Every attack on one random merge; says what came of each. In a process that has made no backward pass."""
    torch.set_num_threads(1)  # a fork has no other threads
    draw = random.Random(seed)
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        merge = (kind or draw.choice([DataFree, Recipe]))(draw, Path(folder))
        expected, seconds = merge.quiet()
        for attack in attacks:
            out = Path(folder) / attack.__name__
            try:
                outcomes.append(f"{attack.__name__}: {attack(merge, out, expected, seconds)}")
            except BaseException as error:
                error.add_note(f"round {seed}, {type(merge).__name__}, {attack.__name__}")
                raise
            shutil.rmtree(out, ignore_errors=True)
    return outcomes
