"""How the benchmarks measure.

    python -m pytest benchmarks [--device cuda] [--size quick] [-k "softmax_kl and 4096"] [--save-to benchmarks/results]

A benchmark is one candidate on one case (an operator's inputs). Other programs disturb a machine by more than candidates
differ, so nothing is compared over a distance: in every round three calls take turns, the yardstick (the fastest way to move
bytes through the same buffers, ceiling.py), ours, and the candidate. The share of the ceiling and the time against ours are
medians of the rounds' own ratios; the seconds are pytest-benchmark's. Its timer is a stopwatch that runs only during the
candidate's call, so that one of its rounds is a whole round of turns.

No number is printed for a wrong result: before it is timed, a candidate's first result is compared with the reference in
fp64, and where ours is too far off the benchmark fails; in that call, what our operators allocate is filled with NaN. In a
second call memory is watched: the peak beyond the inputs and a given out=. A baseline that raises, or is too far off, is skipped
with its error, a case that does not fit into free memory with its size.

An operator's file offers CASES (device, size -> cases), `ours`, CANDIDATES (name -> function of the inputs that returns the
call to time) and, for GPUs, CUDA_CANDIDATES. A candidate whose name starts with "samerge" is ours: it may not raise, and its
result must be closer to the truth.
"""

from __future__ import annotations

import gc
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from cases import takes_part
from ceiling import Yardstick, ceiling, compiler, machine_roofs
from inputs import free_bytes, give_back_memory, poisoned_memory
from report import Results, environment, record, summary
from turns import Stopwatch, Turns, seconds_on

import samerge_ext as sm
from samerge_ext.memory import PeakMemory

OURS = {"cpu": ("samerge cpu",), "cuda": ("samerge cuda", "samerge triton")}  # the rest is held against the first
BUDGET = {"full": 3.0, "quick": 0.5, "tiny": 0.0}  # seconds of turns per benchmark
ON_A_GPU = 1 / 10  # of that
RESULTS = pytest.StashKey[Results]()


def pytest_addoption(parser):
    group = parser.getgroup("benchmarks")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu")
    group.addoption("--size", choices=("full", "quick", "tiny"), default="full", help="which cases; tiny ones only try the code")
    group.addoption("--save-to", type=Path, metavar="FOLDER", help="write <device>-<date>.json there, anew after every benchmark")


def pytest_configure(config):
    device = config.option.device
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch sees no CUDA device")
    about = {**environment(device), "size": config.option.size, **machine_roofs(device)}
    if device == "cpu":
        about["C loops in the ceiling"] = "yes" if compiler() else "no: cc is not installed"
    config.stash[RESULTS] = Results(about, config.option.save_to)


def pytest_generate_tests(metafunc):
    device, module = metafunc.config.option.device, metafunc.module
    cases = module.CASES(device, metafunc.config.option.size)
    metafunc.parametrize("x", cases, indirect=True, scope="module", ids=str)
    metafunc.parametrize("candidate", [*OURS[device], *_baselines(module, device)])


def pytest_collection_modifyitems(config, items):
    """Some candidates take part in some cases only."""
    params = [item.callspec.params for item in items]
    left_out = [not takes_part(p["candidate"], p["x"]) for p in params]
    config.hook.pytest_deselected(items=[item for item, out in zip(items, left_out, strict=True) if out])
    items[:] = [item for item, out in zip(items, left_out, strict=True) if not out]


def pytest_unconfigure(config):
    """The tables are what the run ends with."""
    if RESULTS in config.stash:
        print(summary(config.stash[RESULTS]), end="")


@pytest.fixture(scope="module")
def x(request):
    """The inputs of a case, held while its candidates run."""
    case, device = request.param, request.config.option.device
    gc.collect()  # the case before
    if (needed := case.needed_bytes(device)) > (free := free_bytes(device)):
        pytest.skip(f"{case} needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")
    return case.build(device)


@pytest.fixture(scope="module")
def yardstick(x, request) -> Yardstick:
    return ceiling(*x.streams, seconds_on(request.config.option.device))


@pytest.fixture
def measure(request, x, yardstick):
    """The function that checks, times and records a candidate."""
    module, option, case = request.module, request.config.option, request.node.callspec.params["x"]
    results, seconds = request.config.stash[RESULTS], seconds_on(option.device)
    first_of_ours = OURS[option.device][0]

    def measure(candidate, *, work, error_of, operations=None, yardstick=yardstick, peak=None):
        """work: bytes it must move (or steps, against a yardstick that counts them); operations: its arithmetic, for the
        roofline; error_of(result): relative to the truth; peak(): its memory, where one call does not show it."""
        is_ours = candidate.startswith("samerge")
        try:
            call = _call(module, candidate, x, option.device)
            with poisoned_memory() if is_ours else nullcontext():
                result = call()
        except Exception as error:
            _skip_baseline(candidate, error)
        error, tolerance = error_of(result), case.tolerance(is_ours)
        del result
        if not error < tolerance:
            fault = ArithmeticError(f"relative error {error:.2e} exceeds {tolerance:.0e}; no time is given for a wrong result")
            _skip_baseline(candidate, fault)
        peak_bytes = peak() if peak else _peak_of(call, option.device)

        calls = {"yardstick": yardstick.call, candidate: call}
        if candidate != first_of_ours:
            calls["ours"] = _call(module, first_of_ours, x, option.device)
        try:
            turns = Turns(calls, seconds, BUDGET[option.size] * (ON_A_GPU if option.device == "cuda" else 1))
        except Exception as error:
            _skip_baseline(candidate, error)
        stopwatch = Stopwatch()

        def turn():
            turns.take()
            stopwatch.elapsed += turns.seconds[candidate][-1]

        operator = module.__name__.removeprefix("bench_")
        request.node.add_marker(pytest.mark.benchmark(timer=stopwatch, group=f"{operator} {case}"))
        benchmark = request.getfixturevalue("benchmark")
        benchmark.pedantic(turn, rounds=turns.rounds)
        row = record(operator, str(case), candidate, turns.seconds, yardstick, work, operations, peak_bytes, error)
        benchmark.extra_info.update(row)
        results.add(row)

    return measure


def _baselines(module, device: str) -> dict:
    return {**module.CANDIDATES, **(getattr(module, "CUDA_CANDIDATES", {}) if device == "cuda" else {})}


def _call(module, candidate: str, x, device: str):
    """The call to time; ours runs on the backend that its name ends with."""
    if candidate not in OURS[device]:
        return _baselines(module, device)[candidate](x)
    backend = candidate.split()[-1]
    with sm.use_backend(backend):
        ours = module.ours(x)

    def call():
        with sm.use_backend(backend):
            return ours()

    return call


def _peak_of(call, device: str) -> int:
    give_back_memory()
    with PeakMemory(device) as memory:
        call()
    return memory.rise


def _skip_baseline(candidate: str, error: Exception) -> None:
    """What fails elsewhere must not cost the run; our own errors are raised."""
    if candidate.startswith("samerge"):
        raise error
    pytest.skip(f"{candidate}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}")
