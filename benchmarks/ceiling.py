"""The ceiling: the most bytes per second that this machine moves through buffers of a case's own size, now.

Measured on the case's own tensors, whose pages have been touched; a benchmark then times the best of these beside its
candidates, turn by turn. On the CPU plain C loops over as many streams (streams.c) are among them: at T = 20 they are 10 %
above the best that PyTorch offers. On a GPU the copy, the triad and the matrix-vector products reach what there is.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import torch
from torch import Tensor
from turns import Seconds, Turns, seconds_on

CHUNK = 1024  # of streams.c
BUDGET = 0.25  # seconds of turns to find the best probe


@dataclass(frozen=True)
class Yardstick:
    """What candidates are held against: a call and the work it does, in the unit of the candidates' work (bytes, steps)."""

    name: str
    work: float
    call: Callable[[], object]


def ceiling(stack: Tensor, vector: Tensor, out: Tensor, seconds: Seconds) -> Yardstick:
    """The probe that moves most, by the median over turns; stack [S, n], vector [n], out [n], of an even number of bytes."""
    probes = {probe.name: probe for probe in _probes(*(tensor.view(torch.float32) for tensor in (stack, vector, out)))}
    turns = Turns({name: probe.call for name, probe in probes.items()}, seconds, BUDGET)
    for _ in range(turns.rounds):
        turns.take()
    speeds = {name: [probe.work / taken for taken in turns.seconds[name]] for name, probe in probes.items()}
    averages = [mean(turn) for turn in zip(*speeds.values(), strict=True)]
    relative = {name: median(s / a for s, a in zip(own, averages, strict=True)) for name, own in speeds.items()}
    return probes[max(relative, key=relative.get)]


def machine_roofs(device: str) -> dict[str, int]:
    """Bytes per second of a large copy, read and written, and operations per second of a matrix product in fp32."""
    seconds, gpu = seconds_on(device), device == "cuda"
    source = torch.ones(2**29 if gpu else 2**26, device=device)  # 2 GB, 256 MB
    target, square = torch.empty_like(source), torch.ones(8192, 8192, device=device) if gpu else torch.ones(1024, 1024)
    copy, product = (
        median([seconds(call, 1) for _ in range(4)][1:]) for call in (lambda: target.copy_(source), lambda: square @ square)
    )
    return {"copy_bytes_per_s": round(2 * source.nbytes / copy), "matmul_fp32_per_s": round(2 * len(square) ** 3 / product)}


def _probes(stack: Tensor, vector: Tensor, out: Tensor) -> list[Yardstick]:  # [S, n], [n], [n], all fp32
    streams, one = stack.shape[0], vector.nbytes
    ones = torch.ones(streams, device=stack.device)
    probes = [
        Yardstick("copy", 2 * one, lambda: out.copy_(vector)),
        Yardstick("triad", 3 * one, lambda: torch.add(vector, stack[0], alpha=0.5, out=out)),
        Yardstick("addmv", (streams + 2) * one, lambda: torch.addmv(vector, stack.T, ones, out=out)),
        Yardstick("stack @ g", (streams + 1) * one, lambda: stack @ vector),
    ]
    if stack.device.type == "cpu" and compiler() and vector.numel() >= CHUNK:
        probes += [
            Yardstick("C loop, read and write", (streams + 2) * one, _in_threads("read_and_write", stack, vector, out)),
            Yardstick("C loop, read", (streams + 1) * one, _in_threads("read_only", stack, vector, out)),
        ]
    return probes


def compiler() -> str | None:
    return shutil.which("cc")


@functools.cache
def _streams() -> ctypes.CDLL:
    """streams.c, compiled for this processor."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "streams.so"
        source = Path(__file__).with_name("streams.c")
        # The loops are vectorised with the widest registers; sums in another order are fine here.
        flags = ["-O3", "-march=native", "-ffast-math", "-shared", "-fPIC"]
        subprocess.run([compiler(), *flags, source, "-o", library], check=True)
        return ctypes.CDLL(str(library))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def _in_threads(name: str, stack: Tensor, vector: Tensor, out: Tensor) -> Callable[[], object]:
    """A loop of streams.c over all chunks, shared among as many threads as PyTorch uses."""
    pointer, int64 = ctypes.c_void_p, ctypes.c_int64
    loop = getattr(_streams(), name)
    loop.argtypes = [pointer, int64, int64, pointer, pointer, int64, int64]
    threads, chunks = torch.get_num_threads(), vector.numel() // CHUNK
    bounds = [chunks * i // threads * CHUNK for i in range(threads + 1)]
    shared = stack.data_ptr(), stack.shape[0], stack.stride(0), vector.data_ptr(), out.data_ptr()

    def run() -> None:
        list(_pool(threads).map(lambda i: loop(*shared, bounds[i], bounds[i + 1]), range(threads)))

    return run
