"""What only the emulated device shows of the CUDA kernels: that nothing depends on the order of threads, on the size of the
device or on what memory held before; what they ask of memory; and that faults are seen, which would otherwise be worth nothing.

Bounds, alignment, races, copies that are not waited for and threads that part are looked for in every launch, here as in the
other tests that run on the emulated device."""

import ctypes
import re
import sys

import pytest
import torch
from helpers import ROOT, packed, random_normal, running_on
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import samerge_ext as sm
from samerge_ext import backend
from samerge_ext.elementwise.magnitudes import LargestMagnitudes
from samerge_ext.ops import krylov
from samerge_ext.packing.quantised import QuantisedTaskVectors
from samerge_ext.reference.count_digits import BITS

emulated_cuda = sys.modules.get("emulated_cuda")
pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(emulated_cuda is None, reason="runs on the emulated device, from tests/whole/test_emulated_gpu.py"),
]
OTHERWISE = (
    {"order": 1, "poison": 0},
    {"order": 2, "processors": 1, "per_processor": 1, "poison": 0x3F},
    {"order": 3, "processors": 132, "per_processor": 3},
)
BF16, FP32, FP64, INT8, INT4 = torch.bfloat16, torch.float32, torch.float64, "int8", "int4"
BYTES = {BF16: 2, FP32: 4, FP64: 8, INT8: 1 + 2 / 128, INT4: 0.5 + 2 / 128}


@pytest.fixture(autouse=True)
def on_the_device():
    with running_on("cuda"):
        yield


def moved(tensor, offset):
    """The same numbers `offset` numbers into memory of their own, which ends with them."""
    place = torch.empty(tensor.numel() + offset, dtype=tensor.dtype)[offset:].view(tensor.shape)
    return place.copy_(tensor)


def vectors(tasks, dtype, offset=0, layers=(3, 0, 1, 2)):
    quantised = dtype in (INT8, INT4)
    wide = FP64 if dtype == FP64 else FP32
    base, values, coefficients, block_layer = packed(tasks, list(layers), base=wide if quantised else dtype, tasks=wide)
    stored = QuantisedTaskVectors.of(values.cpu(), dtype).to("cuda") if quantised else moved(values.to(dtype), offset)
    return moved(base, offset), stored, coefficients, block_layer


def weighted_sum(tasks, dtype, **options):
    base, stored, coefficients, block_layer = vectors(tasks, dtype, **options)
    return lambda: [sm.weighted_sum(base, stored, coefficients, block_layer)]


def coefficient_grad(tasks, dtype, **options):
    grad, stored, coefficients, block_layer = vectors(tasks, dtype, **options)
    return lambda: [sm.coefficient_grad(grad, stored, block_layer, coefficients.shape[1])]


def elected_sum(tasks, dtype, offset=0, layers=(5,)):
    base, values, *_ = vectors(tasks, dtype, offset, layers)
    weights = torch.linspace(0.5, 1.0, tasks, dtype=FP64 if dtype == FP64 else FP32)
    return lambda: [sm.ops.elected_sum(base, values, weights, 0.7)]


def selection(tasks, dtype, offset=0, size=20_000, rounded=True):
    """A row's largest magnitudes, found and kept: counting, choosing and trimming, where many numbers are equal."""
    numbers = random_normal((tasks, size), seed=4, dtype=FP64)[0]
    numbers = moved(((4 * numbers).round() / 4 if rounded else numbers).to(dtype), offset)

    def call():
        largest = LargestMagnitudes([size // 5] * tasks, size, dtype)
        for _ in range(largest.rounds):
            largest.look(numbers)
            largest.next_round()
        out = torch.empty_like(numbers)
        largest.trim(out, numbers)
        return [out, largest.keys, largest.ties]

    return call


def count_digits(tasks, dtype, size=1024 * 100):
    numbers, counts = random_normal((tasks, size), seed=4)[0].to(dtype), torch.zeros(tasks, 1 << 16, dtype=torch.int64)
    keys, ties, shift = torch.zeros(tasks, dtype=torch.int64), torch.ones(tasks, dtype=torch.int64), 8 * dtype.itemsize - 16
    return lambda: [backend._C.count_digits_cuda(counts, numbers, keys, ties, shift)]


def trim(tasks, dtype, ties=-1, size=1024 * 100):
    """As the first of two pieces has it: what equals 1 in magnitude has some left to be kept, or all."""
    numbers, keys = random_normal((tasks, size), seed=4)[0].to(dtype), torch.ones(tasks, dtype=dtype)
    keys, ties, out = keys.view(BITS[dtype.itemsize]).long(), torch.full((tasks,), ties), torch.empty_like(numbers)
    return lambda: [backend._C.trim_cuda(out, numbers, keys, ties)]


def drop(tasks, dtype, offset=0, size=20_000):
    numbers = moved(random_normal((tasks, size), seed=4)[0].to(dtype), offset)
    keys = torch.arange(tasks * -(-size // (1 << 16)), dtype=torch.int32).view(tasks, -1)
    thresholds, factors = torch.full((tasks,), 2**30), torch.full((tasks,), 2.0, dtype=FP64 if dtype == FP64 else FP32)
    out = torch.empty_like(numbers)

    def call():
        backend._C.drop_cuda(out, numbers, keys, thresholds, factors)
        return [out]

    return call


def softmax_kl(rows, columns, dtype, loss="kl", teachers=1, grad=True, offset=0, in_place=False, beta=0.0):
    student, teacher = (3 * x for x in random_normal((rows, columns), (teachers, rows, columns), seed=columns))
    student, teacher = moved(student.to(dtype), offset), moved(teacher.to(dtype), offset)
    scale = torch.linspace(-1, 2, rows, dtype=FP64 if dtype == FP64 else FP32) if grad else None
    out = moved(student, offset) if grad else None
    arguments = None if loss == "entropy" else teacher, None, None, scale, out, loss, 2.0, 1.5, beta

    def call():
        logits = out.copy_(student) if in_place else student
        return [x for x in backend._C.softmax_kl_cuda(logits, *arguments) if x is not None]

    return call


def gram_product(shape, dtype, width=8, base=None, offset=0, batch=1, wide=False):
    matrices = [moved(w.to(dtype), offset) for w in random_normal(*[shape] * batch, seed=1)]
    bases = [moved(w.to(base), offset) for w in random_normal(*[shape] * batch, seed=2)] if base else []
    (q,) = random_normal((batch, width, min(shape)), seed=3, dtype=FP64 if wide or dtype == FP64 else FP32)
    scale = torch.full((batch,), 0.5, dtype=FP64)
    return lambda: [backend._C.gram_product_cuda(matrices, bases, q, scale)]


def lanczos(shape, dtype, width=8, base=None, offset=0, batch=1, wide=False, first=0, steps=2, stride=0):
    """Steps `first` to `steps` - 1, what came before being random."""
    side = min(shape)
    matrices = [moved(w.to(dtype), offset) for w in random_normal(*[shape] * batch, seed=1)]
    bases = [moved(w.to(base), offset) for w in random_normal(*[shape] * batch, seed=2)] if base else []
    scale = torch.full((batch,), 0.5, dtype=FP64)
    real = FP64 if wide or dtype == FP64 else FP32
    (start,) = random_normal((side, (first + 1) * width), seed=3, dtype=FP64)
    basis = torch.zeros(batch, (steps + 1) * width, -(-max(side, stride) // 16) * 16, dtype=real)
    basis[:, : (first + 1) * width, :side] = torch.linalg.qr(start)[0].mT
    projected = torch.zeros(batch, steps * width, steps * width, dtype=FP64)

    def call():
        leaving = backend._C.lanczos_cuda(matrices, bases, scale, basis, projected, width, first, steps)
        return [leaving, basis, projected.tril()]

    return call


def moments(shape, dtype, base=None, offset=0, batch=1):
    matrices = [moved(w.to(dtype), offset) for w in random_normal(*[shape] * batch, seed=1)]
    bases = [moved(w.to(base), offset) for w in random_normal(*[shape] * batch, seed=2)] if base else []
    return lambda: [backend._C.moments_cuda(matrices, bases)]


CASES = {
    **{f"{op.__name__} {t} {d}": lambda op=op, t=t, d=d, **options: op(t, d, **options)
       for op in (weighted_sum, coefficient_grad) for t, d in ((3, FP32), (11, BF16), (2, FP64), (3, INT8), (5, INT4))},
    **{f"elected_sum {t} {d}": lambda t=t, d=d, **options: elected_sum(t, d, **options)
       for t, d in ((3, FP32), (11, BF16), (2, FP64))},
    **{f"magnitudes {t} {d}": lambda t=t, d=d, **options: selection(t, d, **options)
       for t, d in ((3, FP32), (5, BF16), (2, FP64))},
    **{f"drop {t} {d}": lambda t=t, d=d, **options: drop(t, d, **options) for t, d in ((3, FP32), (5, BF16), (2, FP64))},
    "softmax_kl warps": lambda **options: softmax_kl(40, 100, FP32, teachers=2, **options),
    "softmax_kl odd": lambda **options: softmax_kl(5, 1001, BF16, "cross_entropy", **options),
    "softmax_kl blocks": lambda **options: softmax_kl(3, 5000, BF16, teachers=2, **options),
    "softmax_kl entropy": lambda **options: softmax_kl(3, 4096, FP32, "entropy", **options),
    "softmax_kl losses": lambda **options: softmax_kl(3, 4096, FP64, grad=False, **options),
    "softmax_kl clusters": lambda **options: softmax_kl(2, 40000, FP32, **options),
    "softmax_kl in place": lambda **options: softmax_kl(3, 5001, BF16, teachers=2, in_place=True, **options),
    "softmax_kl clusters in place": lambda **options: softmax_kl(2, 40000, FP32, "entropy", in_place=True, **options),
    "softmax_kl reverse": lambda **options: softmax_kl(40, 100, FP32, teachers=2, beta=1.0, **options),
    "softmax_kl jsd": lambda **options: softmax_kl(3, 5001, BF16, teachers=2, beta=0.25, in_place=True, **options),
    "softmax_kl jsd clusters": lambda **options: softmax_kl(2, 40000, FP32, beta=0.25, **options),
    "gram_product tall": lambda **options: gram_product((300, 130), FP32, batch=2, **options),
    "gram_product wide": lambda **options: gram_product((70, 300), BF16, base=FP32, width=12, **options),
    "gram_product long lines": lambda **options: gram_product((1030, 1100), FP32, base=BF16, **options),
    "gram_product double": lambda **options: gram_product((90, 70), FP64, width=4, **options),
    "lanczos tall": lambda **options: lanczos((170, 130), FP32, batch=2, **options),
    "lanczos wide": lambda **options: lanczos((70, 300), BF16, base=FP32, width=12, **options),
    "lanczos double": lambda **options: lanczos((90, 70), FP64, width=4, **options),
    "lanczos many known": lambda **options: lanczos((340, 340), FP32, first=39, steps=40, **options),
    "lanczos long vectors": lambda **options: lanczos((300, 290), FP32, stride=2100, steps=1, **options),
    "moments": lambda **options: moments((65, 1030), FP32, base=BF16, batch=2, **options),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_results_depend_on_the_input_alone(case):
    call = CASES[case]()
    expected = [result.clone() for result in call()]
    for otherwise in OTHERWISE:
        with emulated_cuda.device(**otherwise):
            assert all(torch.equal(a, b) for a, b in zip(call(), expected, strict=True)), otherwise


@pytest.mark.parametrize("offset", (1, 4, 8))
@pytest.mark.parametrize("case", CASES)
def test_numbers_may_begin_anywhere_and_end_where_memory_ends(case, offset):
    expected = [result.clone() for result in CASES[case]()()]
    for a, b in zip(CASES[case](offset=offset)(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 if b.dtype != BF16 else 1e-2, atol=1e-6)


@pytest.mark.parametrize("dtype", (FP32, BF16))
def test_digits_are_counted_without_as_much_shared_memory(dtype):
    call = selection(3, dtype, rounded=False)
    expected = [result.clone() for result in call()]
    with emulated_cuda.device(shared_bytes=99 << 10):
        assert all(torch.equal(a, b) for a, b in zip(call(), expected, strict=True))


def of_vectors(op, tasks, dtype, others):
    """Of N numbers in one layer: task vectors, and as many vectors of the base's dtype beside them."""
    n, base = 1024 * 100, FP32 if dtype in (INT8, INT4) else dtype
    return op(tasks, dtype, layers=(100,)), n * (tasks * BYTES[dtype] + others * BYTES[base])


def of_numbers(op, tasks, dtype, moves, **options):
    """Of T rows of N numbers, each moved so many times."""
    n = 1024 * 100
    return op(tasks, dtype, size=n, **options), n * tasks * moves * BYTES[dtype]


def of_rows(rows, columns, dtype, beta=0.0):
    return softmax_kl(rows, columns, dtype, beta=beta), 3 * rows * columns * BYTES[dtype]


def of_matrix(op, shape, dtype):
    return op(shape, dtype), shape[0] * shape[1] * BYTES[dtype]


def of_step(shape, dtype, known):
    """The matrix, and four times the vectors that are known when the step begins or are its q."""
    width, real = 8, FP64 if dtype == FP64 else FP32
    step = lanczos(shape, dtype, first=known // width - 1, steps=known // width)
    return step, shape[0] * shape[1] * BYTES[dtype] + 4 * known * min(shape) * BYTES[real]


# Beside the bytes that benchmarks/NOTES.md calls the floor: at most how many times as many are moved, each once however often it
# is asked for, and asked for; how many sectors for the least; and how many turns of shared memory's banks for the least.
FLOORS = {
    "weighted_sum, T = 8, fp32": (lambda: of_vectors(weighted_sum, 8, FP32, 2), 1.001, 1.01, 1.0, 1.0),
    "weighted_sum, T = 20, fp32": (lambda: of_vectors(weighted_sum, 20, FP32, 2), 1.001, 1.01, 1.0, 1.0),
    "weighted_sum, T = 8, bf16": (lambda: of_vectors(weighted_sum, 8, BF16, 2), 1.001, 1.01, 1.0, 1.0),
    "weighted_sum, T = 8, int8": (lambda: of_vectors(weighted_sum, 8, INT8, 2), 1.001, 1.41, 1.001, 1.0),
    "weighted_sum, T = 8, int4": (lambda: of_vectors(weighted_sum, 8, INT4, 2), 1.001, 1.27, 1.001, 1.0),
    "coefficient_grad, T = 8, fp32": (lambda: of_vectors(coefficient_grad, 8, FP32, 1), 1.005, 1.01, 1.001, 1.0),
    "coefficient_grad, T = 20, fp32": (lambda: of_vectors(coefficient_grad, 20, FP32, 1), 1.005, 1.11, 1.001, 1.0),
    "coefficient_grad, T = 8, bf16": (lambda: of_vectors(coefficient_grad, 8, BF16, 1), 1.01, 1.02, 1.002, 1.0),
    "elected_sum, T = 8, fp32": (lambda: of_vectors(elected_sum, 8, FP32, 2), 1.001, 1.02, 1.0, 1.0),
    "elected_sum, T = 8, bf16": (lambda: of_vectors(elected_sum, 8, BF16, 2), 1.001, 1.04, 1.0, 1.0),
    "count_digits, T = 8, fp32": (lambda: of_numbers(count_digits, 8, FP32, 1), 1.07, 1.08, 1.04, 2.8),
    "count_digits, T = 8, bf16": (lambda: of_numbers(count_digits, 8, BF16, 1), 1.13, 1.15, 1.06, 2.8),
    "trim, T = 8, fp32": (lambda: of_numbers(trim, 8, FP32, 2), 1.01, 1.01, 1.0, 1.0),
    "trim, T = 8, bf16": (lambda: of_numbers(trim, 8, BF16, 2), 1.01, 1.01, 1.0, 1.0),
    "trim, ties, T = 8, bf16": (lambda: of_numbers(trim, 8, BF16, 3, ties=20), 1.01, 1.01, 1.001, 1.0),
    "drop, T = 8, fp32": (lambda: of_numbers(drop, 8, FP32, 2), 1.01, 1.01, 1.0, 1.0),
    "drop, T = 8, bf16": (lambda: of_numbers(drop, 8, BF16, 2), 1.01, 1.01, 1.0, 1.0),
    "softmax_kl (32, 1000) fp32": (lambda: of_rows(32, 1000, FP32), 1.001, 1.67, 1.0, 1.0),
    "softmax_kl (3, 32000) fp32": (lambda: of_rows(3, 32000, FP32), 1.001, 1.001, 1.0, 1.0),
    "softmax_kl (3, 32000) bf16": (lambda: of_rows(3, 32000, BF16), 1.001, 1.001, 1.0, 1.0),
    "softmax_kl (1, 128256) bf16": (lambda: of_rows(1, 128256, BF16), 1.001, 1.001, 1.0, 1.0),
    "softmax_kl, jsd (3, 32000) bf16": (lambda: of_rows(3, 32000, BF16, 0.5), 1.001, 1.001, 1.0, 1.0),
    "gram_product 768 x 768 fp32": (lambda: of_matrix(gram_product, (768, 768), FP32), 1.11, 1.14, 1.001, 1.0),
    "gram_product 768 x 768 bf16": (lambda: of_matrix(gram_product, (768, 768), BF16), 1.21, 1.28, 1.001, 1.0),
    "gram_product 300 x 768 fp32": (lambda: of_matrix(gram_product, (300, 768), FP32), 1.11, 1.14, 1.9, 1.0),
    "lanczos 768 x 768 fp32, 32 known": (lambda: of_step((768, 768), FP32, 32), 1.21, 1.47, 1.03, 1.0),
    "lanczos 768 x 768 fp32, 328 known": (lambda: of_step((768, 768), FP32, 328), 1.14, 1.35, 1.06, 1.0),
    "moments 768 x 768 fp32": (lambda: of_matrix(moments, (768, 768), FP32), 1.001, 1.001, 1.001, 1.0),
}


@pytest.mark.parametrize("case", FLOORS)
def test_bytes_are_the_floor(case, record_property):
    make, *most = FLOORS[case]
    call, floor = make()
    rows = emulated_cuda.traffic(call)
    globally, shared = [row for row in rows if not row.shared], [row for row in rows if row.shared]
    add = lambda rows, name: sum(getattr(row, name) for row in rows)
    found = [add(globally, "unique") / floor, add(globally, "asked") / floor, add(globally, "units") / add(globally, "least")]
    found.append(add(shared, "units") / add(shared, "least") if shared else 1.0)
    columns = zip(("moved", "asked for", "sectors", "turns of banks"), found)
    record_property("measured", f"{case:32} {floor / 1e6:6.2f} MB" + "".join(f", {name} {x:.3f}" for name, x in columns))
    worst = sorted((row for row in rows if row.units > row.least), key=lambda row: row.least - row.units)[:5]
    assert all(a <= b for a, b in zip(found, most)), (found, most, worst)


class Reads(TorchDispatchMode):
    """The names of the operators by which the host has read what lies on the device, and waited for it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        result = operator(*arguments, **(options or {}))
        on_device = lambda tree: {x.is_cuda for x in tree_leaves(tree) if isinstance(x, torch.Tensor)}
        name = operator.overloadpacket.__name__
        if True in on_device(arguments) and (name in ("nonzero", "_local_scalar_dense") or False in on_device(result)):
            self.names.append(name)
        return result


def test_a_search_waits_once_a_check_and_twice_in_the_end(monkeypatch):
    """Beside what torch's eigendecomposition waits for: for what is searched further, for fp64, and for who is settled."""
    checks, lanczos = [], krylov._lanczos
    monkeypatch.setattr(krylov, "_lanczos", lambda *arguments: checks.append(1) or lanczos(*arguments))
    matrices = random_normal((200, 190), seed=0)
    with Reads() as reads:
        sm.svd_topk(matrices, 3)
    assert checks and reads.names == [*["nonzero"] * len(checks), "nonzero", "_to_copy"]


PLANTED = dict(re.findall(r"PLANTED\((\w+), \d, \d\) +// (.+)", (ROOT / "tests" / "emulated_cuda" / "planted.cu").read_text()))


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_are_seen(fault):
    x = torch.zeros(64)
    for order in (0, 1, 2):
        with emulated_cuda.device(order=order):
            for right in (True, False):
                failed = emulated_cuda.runtime.planted(fault.encode(), ctypes.c_void_p(x.data_ptr()), ctypes.c_bool(right))
                said = emulated_cuda.runtime.emulated_fault().decode()
                assert bool(failed) != right and said.startswith("" if right else PLANTED[fault]), said
                assert right or "planted.cu:" in said or "copies" in said, said
