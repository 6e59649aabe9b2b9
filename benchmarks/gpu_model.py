"""What the CUDA kernels would take on a GPU, predicted without one: python benchmarks/gpu_model.py

Every operator runs on the emulated device of the tests, which records its launches. One warp of each kernel is then run through
the machine code that nvcc makes (sass/), to count what it issues; bytes are what must move (NOTES.md). The predicted time is
the largest of three: bytes at the pace of a copy, all instructions at four a cycle and multiprocessor, and those of the busiest
unit at its own pace. Latency is not in it: beside it stand the bytes that a multiprocessor has in flight when its warps wait,
and those that the bandwidth needs. Needs nvcc, nvdisasm (from the toolkit or Triton) and g++.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sass.memory import SHARED_WINDOW
from sass.registers import Instruction
from sass.warp import Warp, functions

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURE, PARAMETERS = "90", 0x210  # where a kernel's arguments begin in the bank of constants
LATENCY = 700e-9  # seconds, of memory under load: published microbenchmarks of an H100 find 500 to 800
# Warps' instructions a cycle and multiprocessor: CUDA C++ Programming Guide, arithmetic throughput, compute capability 9.0;
# uniform and control by estimate.
PACE = {"fp32": 4, "integer": 2, "multiply": 2, "fp64": 2, "special": 0.5, "memory": 1, "uniform": 2, "control": 4}
ISSUE = 4


@dataclass(frozen=True)
class Gpu:
    name: str
    processors: int
    clock: float  # Hz, sustained
    bandwidth: float  # bytes per second of a copy, read and written


GPUS = (Gpu("H100", 132, 1.755e9, 3.0e12), Gpu("H200", 132, 1.755e9, 4.3e12))


@dataclass(frozen=True)
class Launch:
    kernel: str
    grid: int
    block: int
    shared_bytes: int
    arguments: bytes


@dataclass(frozen=True)
class Code:
    instructions: list[Instruction]
    registers: int
    shared_bytes: int

    def resident_warps(self, launch: Launch) -> int:
        warps = launch.block // 32
        by_registers = 65536 // (-(-self.registers * 32 // 256) * 256 * warps)
        by_shared = 233472 // (self.shared_bytes + launch.shared_bytes + 1024)
        return warps * min(by_registers, by_shared, 64 // warps, 32)


def plain(mangled: str) -> str:
    """A name without that of its anonymous namespace, which compilers choose."""
    if not (match := re.search(r"(\d+)_GLOBAL__N_", mangled)):
        return mangled
    return mangled[: match.start()] + mangled[match.end(1) + int(match[1]) :]


def compiled_kernels(operator: str) -> dict[str, Code]:
    """By plain name; of the operator's source, and of all where none has its name."""
    disassembler = nvdisasm()
    if disassembler is None:
        raise SystemExit("nvdisasm is neither on the path nor in Triton's package; install the CUDA toolkit")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
        for source in [source for source in sources if source.stem == operator] or sources:
            command = ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{ARCHITECTURE}", "-Xptxas", "-v", "-cubin", source, "-o", cubin]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stderr
            text = subprocess.run([disassembler, "-c", cubin], check=True, capture_output=True, text=True).stdout
            resources, name = {}, ""
            for line in printed.splitlines():
                name = found_name[1] if (found_name := re.search(r"Compiling entry function '(\w+)'", line)) else name
                if used := re.search(r"Used (\d+) registers", line):
                    shared = re.search(r"(\d+) bytes smem", line)
                    resources[name] = (int(used[1]), int(shared[1]) if shared else 0)
            for name, instructions in functions(text).items():
                if name in resources:
                    found[plain(name)] = Code(instructions, *resources[name])
    return found


def nvdisasm() -> Path | None:
    if found := shutil.which("nvdisasm"):
        return Path(found)
    triton = importlib.util.find_spec("triton")
    brought = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm" if triton and triton.origin else None
    return brought if brought and brought.exists() else None


def launches(call: Callable[[], object]) -> tuple[list[Launch], int]:
    """What a call starts on a device of one multiprocessor, which holds one block, and the requests of all warps to memory."""
    import emulated_cuda as emulated

    with emulated.device(processors=1, per_processor=1):
        requests = sum(place.requests for place in emulated.traffic(call) if not place.shared)
    rows = [line.split("\t") for line in emulated.runtime.emulated_launches().decode().splitlines()]
    command = ["addr2line", "-f", "-e", emulated.LIBRARY, *(row[0] for row in rows)]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[::2]
    product = lambda text: math.prod(map(int, text.split()))
    made = lambda name, row: Launch(plain(name), product(row[1]), product(row[2]), int(row[3]), bytes.fromhex(row[4]))
    return [made(name, row) for name, row in zip(names, rows, strict=True)], requests


@dataclass
class Count:
    """Of all launches of a call: what all warps issue, by unit; of the longest kernel what it occupies and has in flight."""

    units: Counter[str]
    requests: int = 0  # to global memory
    emulated: int = 0  # as many as the emulated device counted
    unknown: int = 0  # branches that the one warp could not know, and did not take
    registers: int = 0
    warps: int = 0
    in_flight: int = 0  # bytes of a multiprocessor


def count(call: Callable[[], object], kernels: dict[str, Code]) -> Count:
    found, longest = Count(Counter()), 0
    started, found.emulated = launches(call)
    for launch in started:
        code = kernels[launch.kernel]
        sizes = b"".join(n.to_bytes(4, "little") for n in (launch.block, 1, 1, launch.grid, 1, 1))
        warp = Warp(code.instructions, {0: sizes, PARAMETERS: launch.arguments}, SPECIAL, readable)
        issued = warp.run()
        all_warps = launch.block // 32 * launch.grid
        for unit, number in issued.units.items():
            found.units[unit] += number * all_warps
        found.unknown += issued.unknown.total()
        found.requests += issued.requests * all_warps
        if issued.total * all_warps > longest:
            longest, found.registers, found.warps = issued.total * all_warps, code.registers, code.resident_warps(launch)
            found.in_flight = issued.in_flight * 32 * found.warps
    return found


FIRST = ("TID.X", "TID.Y", "TID.Z", "CTAID.X", "CTAID.Y", "CTAID.Z", "LANEID", "CgaCtaId")
SPECIAL = dict.fromkeys((f"SR_{name}" for name in FIRST), 0) | {"SR_SWINHI": SHARED_WINDOW}


def readable(address: int, size: int) -> bool:
    global _maps
    if not any(low <= address and address + size <= high for low, high in _maps):
        _maps = [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in open("/proc/self/maps") if " r" in line]
    return any(low <= address and address + size <= high for low, high in _maps)


_maps: list[tuple[int, ...]] = []


# ------------------------------------------------------------------------------------------------------------------- the cases
@dataclass(frozen=True)
class Case:
    """call: on the emulated device, over ``numbers`` numbers of task vectors' places, logits or matrices. size, moved: what the
    prediction is for, in the same numbers, and its bytes."""

    operator: str
    shape: str
    call: Callable[[], object]
    numbers: int
    size: float
    moved: float


def cases() -> list[Case]:
    import torch

    import samerge_ext as sm
    from samerge_ext import backend
    from samerge_ext.reference.count_digits import BITS

    def normal(*shape: int, dtype=torch.float32):
        generator = torch.Generator().manual_seed(sum(shape))
        return torch.randn(*shape, generator=generator).to(dtype).cuda()

    found, names = [], {torch.float32: "fp32", torch.bfloat16: "bf16"}
    blocks, size, logits = 64, 88e6, (2, 32000)
    layers = torch.zeros(blocks, dtype=torch.int32).cuda()
    for dtype, name in names.items():
        for tasks in (8, 20):
            base, vectors = normal(1024 * blocks, dtype=dtype), normal(tasks, 1024 * blocks, dtype=dtype)
            weights = torch.ones(tasks).cuda()
            calls = {
                "weighted_sum": (lambda b=base, v=vectors, w=weights: sm.weighted_sum(b, v, w[:, None], layers), 2),
                "coefficient_grad": (lambda b=base, v=vectors: sm.coefficient_grad(b, v, layers, 1), 1),
                "elected_sum": (lambda b=base, v=vectors, w=weights: sm.ops.elected_sum(b, v, w, 1.0, False), 2),
            }
            if tasks == 8:
                key, ties = (
                    torch.ones(tasks, dtype=dtype).view(BITS[dtype.itemsize]).long().cuda(),
                    torch.full((tasks,), -1).cuda(),
                )
                counts, out = torch.zeros(tasks, 1 << 16, dtype=torch.int64).cuda(), torch.empty_like(vectors)
                first = 8 * dtype.itemsize - 16
                count_all = lambda c=counts, v=vectors, k=key, t=-ties, f=first: backend._C.count_digits_cuda(c, v, 0 * k, t, f)
                half, twice = torch.full((tasks,), 2**30).cuda(), torch.full((tasks,), 2.0).cuda()
                drawn = torch.zeros(tasks, 1, dtype=torch.int32).cuda()
                calls["count_digits"] = count_all, 0
                calls["trim"] = (lambda o=out, v=vectors, k=key, t=ties: backend._C.trim_cuda(o, v, k, t)), tasks
                calls["drop"] = (lambda o=out, v=vectors, k=drawn, h=half, f=twice: backend._C.drop_cuda(o, v, k, h, f)), tasks
            for operator, (call, others) in calls.items():
                moved = size * (tasks + others) * dtype.itemsize
                found.append(Case(operator, f"N = 88 M, T = {tasks}, {name}", call, 1024 * blocks, size, moved))
        student, teacher, scale = normal(*logits, dtype=dtype), normal(1, *logits, dtype=dtype), torch.ones(2).cuda()
        arguments = student, teacher, None, None, scale, torch.empty_like(student), "kl", 1.0, 1.0, 0.0
        whole = 4096 * 32000.0
        call = lambda a=arguments: backend._C.softmax_kl_cuda(*a)
        found.append(Case("softmax_kl", f"(4096, 32000) {name}", call, student.numel(), whole, 3 * whole * dtype.itemsize))
        matrix, vectors = normal(768, 768, dtype=dtype), normal(1, 8, 768)
        call = lambda m=matrix, q=vectors: backend._C.gram_product_cuda([m], [], q, torch.ones(1, dtype=torch.float64).cuda())
        found.append(
            Case("gram_product", f"8 x 88 M, 768 x 768, {name}", call, matrix.numel(), 8 * size, 8 * size * dtype.itemsize)
        )
        if dtype == torch.bfloat16:
            continue  # moments jumps by a table there, which the disassembly does not show
        call = lambda m=matrix: backend._C.moments_cuda([m], [])
        found.append(Case("moments", f"8 x 88 M, 768 x 768, {name}", call, matrix.numel(), 8 * size, 8 * size * dtype.itemsize))
    return sorted(found, key=lambda case: case.operator)


COLUMNS = (
    *(
        "kernel",
        "shape",
        "instructions",
        "by unit",
        "requests, emulated",
        "unknown branches",
        "registers",
        "warps",
        "KB in flight, needed",
    ),
    *("bytes", "issue", "busiest unit", "predicted", "of a copy"),
)


def row(case: Case, kernels: dict[str, Code], gpu: Gpu) -> str:
    """Instructions and time of a case."""
    found = count(case.call, kernels)
    warps_instructions = case.size / case.numbers
    cycles = lambda number, pace: number * warps_instructions / pace / gpu.processors / gpu.clock
    by_unit = {unit: cycles(number, PACE[unit]) for unit, number in found.units.items()}
    busiest = max(by_unit, key=by_unit.__getitem__)
    bytes_s, issue_s = case.moved / gpu.bandwidth, cycles(found.units.total(), ISSUE)
    predicted = max(bytes_s, issue_s, by_unit[busiest])
    per_number = lambda number: number * 32 / case.numbers
    milliseconds = lambda seconds: f"{seconds * 1e3:.2f} ms"
    columns = [
        case.operator,
        case.shape,
        f"{per_number(found.units.total()):.1f}",
        ", ".join(f"{unit} {per_number(number):.1f}" for unit, number in found.units.most_common()),
        f"{found.requests}, {found.emulated}",
        f"{found.unknown}",
        f"{found.registers}",
        f"{found.warps}",
        f"{found.in_flight / 1024:.0f}, {gpu.bandwidth * LATENCY / gpu.processors / 1024:.0f}",
        milliseconds(bytes_s),
        milliseconds(issue_s),
        f"{milliseconds(by_unit[busiest])} {busiest}",
        milliseconds(predicted),
        f"{bytes_s / predicted:.2f}",
    ]
    return f"| {' | '.join(columns)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=[gpu.name for gpu in GPUS], default="H100")
    parser.add_argument("--operator", default="", help="this one alone")
    given = parser.parse_args()
    sys.path.append(str(ROOT / "tests" / "emulated_cuda"))
    if "LD_PRELOAD" not in os.environ:
        import compiled

        os.environ |= {"LD_PRELOAD": str(compiled.library()), "OMP_NUM_THREADS": "1"}
        os.execv(sys.executable, [sys.executable, *sys.argv])
    from samerge_ext import backend

    importlib.import_module("emulated_cuda")  # puts the device in torch's place

    kernels, gpu = compiled_kernels(given.operator), next(gpu for gpu in GPUS if gpu.name == given.gpu)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    with backend.use_backend("cuda"):
        for case in cases():
            if given.operator not in case.operator:
                continue
            print(row(case, kernels, gpu), flush=True)
    sys.stdout.flush()
    os._exit(0)  # as emulated_cuda.py's pytest_unconfigure


if __name__ == "__main__":
    main()
