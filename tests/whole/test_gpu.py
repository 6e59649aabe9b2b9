"""What only a GPU can show: methods on the device, graph capture, huge tensors, long rows, repeats, sanitised runs."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial

import literal
import pytest
import tiny
import torch
from helpers import ROOT, assert_close, packed, random_normal, running_on
from safetensors.torch import save_file

import samerge_ext as sm
from samerge_ext import reference
from samerge_ext.elementwise import piecewise
from samerge_ext.methods.dare import Dare
from samerge_ext.methods.ties import Ties
from samerge_ext.ops import krylov

pytestmark = pytest.mark.gpu
SETTINGS = ("kl", 2.0, 2.0, 0.0)


@pytest.fixture(params=("cuda", "triton"))
def on_gpu(request):
    with running_on(request.param):
        yield request.param


@pytest.fixture
def room():
    """A function that skips the test where fewer gigabytes than it names are free; returns what it used."""

    def need(gigabytes):
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info()[0] < gigabytes * 2**30:
            pytest.skip(f"needs {gigabytes} GB of device memory")

    yield need
    torch.cuda.empty_cache()


def truth(student, teacher, row_scale, settings=SETTINGS):
    return reference.softmax_kl(student.double(), teacher.double(), None, None, row_scale.double(), None, *settings)


@pytest.fixture
def problem():
    base = tiny.make(0)
    experts = tiny.make_experts(base)
    heads, batches = tiny.make_heads(), tiny.make_batches()
    on_device = (
        sm.PackedWeights.from_modules(base, experts, dtype=torch.float64, device="cuda"),
        {task: head.cuda() for task, head in heads.items()},
        {task: [batch.cuda() for batch in held] for task, held in batches.items()},
    )
    return (base, experts, heads, batches), on_device


@pytest.fixture
def on_gpu_by_name(request, on_gpu):
    """As `on_gpu`, with tensors still created on the CPU: methods must place what they create themselves."""
    torch.set_default_device("cpu")
    return on_gpu


@pytest.mark.parametrize("adapter", (tiny.shared_encoder, tiny.plain))
@pytest.mark.parametrize("granularity", ("layer", "task"))
def test_samerging_follows_the_literal_loop(on_gpu_by_name, problem, adapter, granularity):
    (base, experts, heads, batches), (packed_weights, device_heads, device_batches) = problem
    expected = literal.learn(base, experts, heads, batches, steps=10, task_wise=granularity == "task")[-1]
    config = sm.SAMergingConfig(steps=10, granularity=granularity, progress=False)
    result = sm.samerging(tiny.make(1), packed_weights, device_batches, adapter(device_heads), config=config)
    assert result.coefficients.is_cuda
    error = (result.coefficients.cpu() - expected).norm() / expected.norm()
    assert error < 1e-9


@pytest.mark.parametrize("streamed", (True, False))
@pytest.mark.parametrize("where", ("device", "host", "file"))
def test_weights_from_everywhere_follow_the_literal_loop(problem, where, streamed, tmp_path):
    """On the device, in host memory (streamed: pinned), and in a packed file (streamed: read through pinned memory)."""
    torch.set_default_device("cpu")
    (base, experts, heads, batches), (on_device, device_heads, device_batches) = problem
    expected = literal.learn(base, experts, heads, batches, steps=4)[-1]
    stores = {
        "device": lambda: on_device,
        "host": lambda: sm.PackedWeights.from_modules(base, experts, dtype=torch.float64),
        "file": lambda: in_a_file(base, experts, tmp_path),
    }
    config = sm.SAMergingConfig(steps=4, progress=False, streamed=streamed, device="cuda")
    result = sm.samerging(tiny.make(1), stores[where](), device_batches, tiny.plain(device_heads), config=config)
    columns = [result.packed.layout.names.index(name) for name in on_device.layout.names]  # a file has its own order
    error = (result.coefficients.cpu()[:, columns] - expected).norm() / expected.norm()
    assert error < 1e-9


def in_a_file(base, experts, folder):
    for name, module in {"base": base, **experts}.items():
        (folder / name).mkdir()
        tensors = {n: t.clone() for n, t in module.state_dict().items() if n != "tied.weight"}
        save_file(tensors, folder / name / "model.safetensors")
    folders = {task: folder / task for task in experts}
    return sm.PackedWeights.from_folders(
        folder / "base", folders, dtype=torch.float64, device="cuda", file=folder / "packed.safetensors"
    )


@pytest.mark.parametrize("form", ("int8", "int4", "int4-residual"))
def test_quantised_task_vectors_stream_from_pinned_memory(problem, form):
    torch.set_default_device("cpu")
    (base, experts, heads, batches), (_, device_heads, device_batches) = problem
    packed_weights = sm.PackedWeights.from_modules(base, experts, dtype=torch.float64, task_vector_dtype=form)
    settings = {"steps": 4, "progress": False}
    config = sm.SAMergingConfig(**settings)
    expected = sm.samerging(tiny.make(1), packed_weights, batches, tiny.plain(heads), config=config).coefficients
    config = sm.SAMergingConfig(**settings, streamed=True, device="cuda")
    result = sm.samerging(tiny.make(1), packed_weights, device_batches, tiny.plain(device_heads), config=config)
    assert (result.coefficients.cpu() - expected).norm() < 1e-9 * expected.norm()


def test_a_gpu_stays_within_its_plan(tmp_path):
    """A model of 9 M parameters with six experts in a process of its own, by each way: measured beside predicted."""
    script = ROOT / "benchmarks" / "large_models.py"
    options = ["--shape", "test", "--device", "cuda", "--ways", "resident,memory,host,smallest"]
    subprocess.run([sys.executable, script, *options, "--work", tmp_path, "--out", tmp_path / "out.json"], check=True)
    rows = json.loads((tmp_path / "out.json").read_text())["ways"]
    assert [row["plan"]["streamed"] for row in rows] == [False, True, True, True]
    assert [row["plan"]["store"] for row in rows[:3]] == ["device", "device", "host"]
    expected = torch.tensor(rows[0]["coefficients"])
    for row in rows:
        assert row["measured_bytes"] <= min(1.15 * row["planned_bytes"], row["memory_budget"]), row["way"]
        assert (torch.tensor(row["coefficients"]) - expected).norm() <= 1e-5 * expected.norm(), row["way"]


def test_a_device_without_an_index_is_the_current_one():
    packed_weights = sm.PackedWeights.from_modules(tiny.make(0), tiny.make_experts(tiny.make(0)), device="cuda")
    assert packed_weights.store(device="cuda").piece is None, "what is there already is not staged"
    assert packed_weights.in_memory("cuda") is packed_weights


def test_adamerging_follows_the_literal_loop(on_gpu_by_name, problem):
    (base, experts, heads, batches), (packed_weights, device_heads, device_batches) = problem
    adam = lambda p: torch.optim.Adam(p, lr=1e-3)
    expected = literal.learn(base, experts, heads, batches, steps=10, loss="entropy", sam="off", optimizer=adam)[-1]
    config = sm.AdaMergingConfig(steps=10, progress=False)
    result = sm.adamerging(tiny.make(1), packed_weights, device_batches, tiny.shared_encoder(device_heads), config=config)
    assert (result.coefficients.cpu() - expected).norm() / expected.norm() < 1e-9


@pytest.mark.parametrize(
    "settings",
    [
        {"train_heads": "weight", "head_learning_rate": 0.01, "held_back": 0.3, "measure_every": 3},
        {"granularity": "rank", "rank": 3},
        {"confidence_weights": True, "samples": 9},
    ],
    ids=["heads", "rank", "lessons"],
)
def test_what_else_is_learned_is_what_the_cpu_learns(problem, settings):
    torch.set_default_device("cpu")
    (base, experts, heads, batches), (on_device, _, device_batches) = problem
    on_cpu = sm.PackedWeights.from_modules(base, experts, dtype=torch.float64)
    config = sm.SAMergingConfig(steps=8, progress=False, **settings)
    results = []
    for packed_weights, given in ((on_cpu, batches), (on_device, device_batches)):
        own = {task: torch.nn.Linear(*head.shape, bias=False, dtype=torch.float64) for task, head in heads.items()}
        for task, head in own.items():
            head.weight.data = heads[task].T.clone().to(packed_weights.base.device)
        logits = tiny.plain_modules(own)
        trained = own if "train_heads" in settings else None
        results.append(sm.samerging(tiny.make(1), packed_weights, given, logits, config=config, heads=trained))
    expected, found = results
    assert found.coefficients.is_cuda and all(tensor.is_cuda for head in found.heads.values() for tensor in head.values())
    assert (found.coefficients.cpu() - expected.coefficients).norm() < 1e-9 * expected.coefficients.norm()
    for name, components in expected.component_coefficients.items():
        assert (found.component_coefficients[name].cpu() - components).norm() < 1e-9 * components.norm()
    for task, head in expected.heads.items():
        for name, tensor in head.items():
            assert (found.heads[task][name].cpu() - tensor).norm() < 1e-9 * tensor.norm()


def test_heads_are_learned_in_a_captured_graph(problem):
    """Also where what is held back is measured between its replays."""
    torch.set_default_device("cpu")
    (_, _, heads, _), (packed_weights, _, batches) = problem
    results = []
    for captured in (False, True):
        own = {task: torch.nn.Linear(*head.shape, bias=False, dtype=torch.float64) for task, head in heads.items()}
        for task, head in own.items():
            head.weight.data = heads[task].T.clone()
        settings = {"train_heads": "weight", "head_learning_rate": 0.01, "held_back": 0.3, "measure_every": 2}
        config = sm.SAMergingConfig(steps=12, progress=False, cuda_graph=captured, **settings)
        logits = tiny.plain_modules(own)
        results.append(sm.samerging(tiny.make(1), packed_weights, batches, logits, config=config, heads=own))
    assert torch.equal(results[0].coefficients, results[1].coefficients) and results[0].history == results[1].history
    assert all(torch.equal(results[0].heads[task]["weight"], results[1].heads[task]["weight"]) for task in heads)


def test_a_run_continues_from_its_checkpoint(on_gpu_by_name, problem, tmp_path):
    _, (packed_weights, heads, batches) = problem
    options = {"progress": False, "checkpoint_every": 2}
    whole = sm.samerging(tiny.make(1), packed_weights, batches, tiny.plain(heads), config=sm.SAMergingConfig(steps=6, **options))
    for steps in (4, 6):
        config = sm.SAMergingConfig(steps=steps, checkpoint_dir=tmp_path, **options)
        parts = sm.samerging(tiny.make(1), packed_weights, batches, tiny.plain(heads), config=config)
    assert torch.equal(parts.coefficients, whole.coefficients)


def test_cpu_batches_are_fetched(on_gpu_by_name, problem):
    """Batches in the host's memory, pinned by the run or by the user, give what batches on the device give."""
    (_, _, _, batches), (packed_weights, heads, device_batches) = problem
    pinned = {task: [batch.pin_memory() for batch in held] for task, held in batches.items()}
    run = lambda given: sm.samerging(
        tiny.make(1), packed_weights, given, tiny.shared_encoder(heads), config=sm.SAMergingConfig(steps=7, progress=False)
    )
    expected = run(device_batches).coefficients
    assert torch.equal(run(batches).coefficients, expected)
    assert torch.equal(run(pinned).coefficients, expected)


@pytest.mark.parametrize("adapter", (tiny.shared_encoder, tiny.plain))
@pytest.mark.parametrize("settings", ({}, {"sam": "off", "optimizer": "sgd"}, {"granularity": "task", "adaptive": True}))
def test_a_captured_step_gives_the_same_numbers(on_gpu_by_name, problem, adapter, settings):
    _, (packed_weights, heads, batches) = problem

    def run(cuda_graph):
        config = sm.SAMergingConfig(steps=12, cuda_graph=cuda_graph, log_every=4, progress=False, **settings)
        return sm.samerging(tiny.make(1), packed_weights, batches, adapter(heads), config=config)

    called, captured = run(False), run(True)
    assert torch.equal(captured.coefficients, called.coefficients)
    assert captured.history == called.history and len(captured.history) == 12


@pytest.mark.parametrize("cuda_graph", (False, True))
def test_steps_do_not_wait_for_the_device(on_gpu_by_name, problem, cuda_graph):
    _, (packed_weights, heads, batches) = problem
    forward, calls = tiny.plain(heads), 0

    def logits(module, batch, task):
        nonlocal calls
        calls += torch.is_grad_enabled()
        if calls == 2 * 2 * len(tiny.TASKS) + 1:  # two steps in: everything that is made once is there
            torch.cuda.set_sync_debug_mode("error")
        return forward(module, batch, task)

    config = sm.SAMergingConfig(steps=20, log_every=4, cuda_graph=cuda_graph, progress=False)
    try:
        result = sm.samerging(tiny.make(1), packed_weights, batches, logits, config=config)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(result.history) == 20


def test_a_late_read_names_the_step_that_went_wrong(on_gpu_by_name, problem):
    _, (packed_weights, heads, batches) = problem
    broken = {**batches, "green": [batches["green"][0], batches["green"][1] * torch.inf]}
    config = sm.AdaMergingConfig(steps=20, log_every=7, progress=False)
    with pytest.raises(FloatingPointError, match="loss of task 'green' is nan at step 1;"):
        sm.adamerging(tiny.make(1), packed_weights, broken, tiny.plain(heads), config=config)


def test_bf16_autocast_learns(on_gpu_by_name, problem):
    (base, experts, _, _), (_, heads, batches) = problem
    narrow = [{t: h.float() for t, h in heads.items()}, {t: [b.float() for b in held] for t, held in batches.items()}]
    packed_weights = sm.PackedWeights.from_modules(base, experts, device="cuda")
    steps = 6 * 3 + 1  # of three batches: the last is the first again
    config = sm.SAMergingConfig(steps=steps, precision="bf16", learning_rate=1e-2, progress=False)
    result = sm.samerging(tiny.make(1, torch.float32), packed_weights, narrow[1], tiny.shared_encoder(narrow[0]), config=config)
    assert result.history[-1]["loss"] < result.history[0]["loss"]


MERGES = {
    "average": sm.average,
    "task_arithmetic": lambda packed: sm.task_arithmetic(packed, [0.5, 0.25, -1.0]),
    "ties": lambda packed: sm.ties(packed, [0.3, 1.0, 0.0], 0.7),
    "ties, whole": lambda packed: sm.ties(packed, 0.1, 0.7, weights=[1.0, 0.5, 2.0], trim="vector"),
    "dare": lambda packed: sm.dare(packed, [0.3, 0.0, 1.0], 0.7, seed=5),
    "dare, elected": lambda packed: sm.dare(packed, 0.9, rule="ties", normalize=True),
    "emr": lambda packed: sm.emr(packed).merge("b"),
    "adamerging++": lambda packed: sm.task_arithmetic(sm.trimmed(packed, 0.2), 0.3),
    "adamerging++, whole": lambda packed: sm.task_arithmetic(sm.trimmed(packed, [0.2, 0.9, 0.0], trim="vector"), 0.3),
}


def large(dtype, device, form=None):
    """Layers of one number, of more than a tile and of more than a stretch; the second expert changes half of one."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)
    base = {"bias": draw(1), "wide": draw(70, 1001), "norm": draw(300), "same": draw(40)}
    experts = {t: {n: x + 0.1 * draw(*x.shape) * (n != "same") for n, x in base.items()} for t in "abc"}
    experts["b"]["wide"][:35] = base["wide"][:35]
    return sm.PackedWeights.from_state_dicts(base, experts, dtype=dtype, task_vector_dtype=form, device=device)


EXACT, QUANTISED = (None,), (None, "int8", "int4-residual")  # how task vectors are stored


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize(
    ("merge", "form"), [(merge, form) for merge in MERGES for form in (EXACT if "++" in merge else QUANTISED)]
)
def test_merges_without_data_are_the_cpus(on_gpu_by_name, merge, form, dtype):
    """The same numbers kept or dropped; sums in another order, rounded as fp32 or bf16 are."""
    result = MERGES[merge](large(dtype, "cuda", form)).merged
    assert result.is_cuda
    with sm.use_backend("auto"):
        on_cpu = large(dtype, "cpu", form)
        expected = MERGES[merge](on_cpu).merged
    if merge.startswith(("ties", "dare")):
        changed = lambda merged: merged.cpu() != on_cpu.base
        assert torch.equal(changed(result), changed(expected))
    assert_close(result.cpu(), expected.double())


def test_selected_task_vectors_are_the_cpus_to_the_bit(on_gpu_by_name):
    for trim in ("tensor", "vector"):
        trimmed = sm.trimmed(large(torch.float32, "cuda"), [0.2, 0.9, 0.0], trim=trim).task_vectors
        with sm.use_backend("auto"):
            expected = sm.trimmed(large(torch.float32, "cpu"), [0.2, 0.9, 0.0], trim=trim).task_vectors
        assert torch.equal(trimmed.cpu(), expected)


def test_pieces_do_not_matter(on_gpu_by_name, monkeypatch):
    packed_weights = large(torch.bfloat16, "cuda")
    expected = {merge: MERGES[merge](packed_weights).merged for merge in ("ties", "ties, whole", "dare")}
    monkeypatch.setattr(piecewise, "GPU_PIECE_BYTES", 1)  # pieces of 65,536 numbers
    for merge, merged in expected.items():
        assert torch.equal(MERGES[merge](packed_weights).merged, merged), merge


@pytest.mark.parametrize("merge", ("ties", "dare", "dare, elected"))
def test_pieces_do_not_wait_for_the_device(on_gpu_by_name, monkeypatch, merge):
    """Once a rule knows all that it must, and after a first merge, which makes what is made once."""
    packed_weights = large(torch.float32, "cuda")
    expected = MERGES[merge](packed_weights).merged
    monkeypatch.setattr(piecewise, "GPU_PIECE_BYTES", 1)
    merges = {cls: cls.merge for cls in (Ties, Dare)}

    def without_waiting(self, piece):
        torch.cuda.set_sync_debug_mode("error" if piece.start else "default")
        try:
            return merges[type(self)](self, piece)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    for cls in merges:
        monkeypatch.setattr(cls, "merge", without_waiting)
    assert torch.equal(MERGES[merge](packed_weights).merged, expected)


@pytest.mark.parametrize("loss, beta", (("kl", 0.0), ("kl", 0.5), ("kl", 1.0), ("cross_entropy", 0.0), ("entropy", 0.0)))
def test_losses_can_be_captured(on_gpu, loss, beta):
    student, teacher = random_normal((64, 5000), (1, 64, 5000), seed=0)
    arguments = (None if loss == "entropy" else teacher, None, None, torch.ones(64), loss, 2.0, 2.0, beta)
    capture_and_replay(lambda: torch.ops.samerge.softmax_kl_grad(student, *arguments), student)


def test_packed_operators_can_be_captured(on_gpu):
    base, task_vectors, coefficients, block_layer = packed(5, [3, 1, 200])
    capture_and_replay(lambda: [sm.weighted_sum(base, task_vectors, coefficients, block_layer)], coefficients)
    capture_and_replay(lambda: [sm.coefficient_grad(base, task_vectors, block_layer, 3)], base)


def test_lanczos_steps_can_be_captured():
    """All steps up to a check as one graph, which the composed steps of other backends are not."""
    with running_on("cuda"):
        matrices, (start,) = random_normal(*[(300, 200)] * 3, seed=0), random_normal((200, 8), seed=1)
        basis, projected = torch.zeros(3, 40, 208), torch.zeros(3, 32, 32, dtype=torch.float64)
        basis[:, :8, :200] = torch.linalg.qr(start)[0].mT
        scale = torch.ones(3, dtype=torch.float64)
        steps = lambda: krylov._lanczos(matrices, [], scale, basis, projected, 8, 0, 4)
        capture_and_replay(lambda: [steps(), basis.clone(), projected.clone()], matrices[1])


def capture_and_replay(call, input):
    """A graph captured once gives, for other inputs, what a call gives, bit for bit."""
    call()  # compiles, tunes
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    input.mul_(0.5).add_(0.25)
    graph.replay()
    for replayed, called in zip(captured, call(), strict=True):
        assert torch.equal(replayed, called)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("teachers", (1, 3))
@pytest.mark.parametrize("columns", (32000, 50257, 128256, 262144))
def test_long_rows(on_gpu, columns, teachers, dtype):
    """Shares of a row in clusters, rows that no vector access fits, rows too long for shared memory."""
    student, teacher = (3 * x for x in random_normal((5, columns), (teachers, 5, columns), seed=columns))
    student, teacher, row_scale = student.to(dtype), teacher.to(dtype), torch.linspace(-1, 2, 5)
    losses, grad = torch.ops.samerge.softmax_kl_grad(student, teacher, None, None, row_scale, *SETTINGS)
    expected = truth(student, teacher, row_scale)
    assert_close(losses, expected[0], "losses")
    assert_close(grad, expected[1], "grad")
    again = torch.ops.samerge.softmax_kl_grad(student, teacher, None, None, row_scale, *SETTINGS)
    assert torch.equal(again[0], losses) and torch.equal(again[1], grad)


def test_many_blocks_repeat_to_the_bit(on_gpu):
    grad, task_vectors, _, block_layer = packed(8, [1, 6000, 7, 2000], tasks=torch.bfloat16)
    first = sm.coefficient_grad(grad, task_vectors, block_layer, 4)
    assert all(torch.equal(first, sm.coefficient_grad(grad, task_vectors, block_layer, 4)) for _ in range(20))
    expected = reference.coefficient_grad(grad.double(), task_vectors.double(), block_layer, 4)
    assert_close(first, expected, at_least=(grad.double().norm() * 8**0.5).item())


def test_more_than_2_to_the_31_numbers(on_gpu, room):
    room(24)
    blocks = 2**21 + 3
    n = blocks * 1024
    base, task_vectors = torch.empty(n, dtype=torch.bfloat16).normal_(), torch.empty(2, n, dtype=torch.bfloat16).normal_()
    block_layer = (torch.arange(blocks) >= blocks - 2).int()
    coefficients = torch.tensor([[0.5, -1.0], [0.25, 2.0]])
    merged = sm.weighted_sum(base, task_vectors, coefficients, block_layer)
    contracted = sm.coefficient_grad(base, task_vectors, block_layer, 2)
    sums = torch.zeros(2, 2, dtype=torch.float64)
    for first in range(0, n, 2**27):
        some = slice(first, min(first + 2**27, n))
        layers = block_layer[first // 1024 : -(-some.stop // 1024)]
        expected = torch.empty(some.stop - first)
        reference.weighted_sum(expected, base[some], task_vectors[:, some], coefficients, layers)
        assert_close(merged[some], expected.double(), f"numbers from {first}")
        sums += reference.coefficient_grad(base[some].double(), task_vectors[:, some].double(), layers, 2)
    assert_close(contracted, sums, at_least=n**0.5)


def test_more_than_2_to_the_31_logits(on_gpu, room):
    room(24)
    rows, columns = 2**14 + 5, 2**17
    student = torch.empty(rows, columns, dtype=torch.bfloat16).normal_()
    teacher = torch.empty(1, rows, columns, dtype=torch.bfloat16).normal_()
    losses, grad = torch.ops.samerge.softmax_kl_grad(student, teacher, None, None, torch.ones(rows), *SETTINGS)
    for some in (slice(0, 4), slice(rows - 8, rows)):
        expected = truth(student[some], teacher[:, some], torch.ones(rows)[some])
        assert_close(losses[some], expected[0])
        assert_close(grad[some], expected[1])
    assert losses.isfinite().all()


SMALL_CALLS = """
import torch, samerge_ext as sm
torch.manual_seed(0)
with sm.use_backend("cuda"):
    layers = torch.tensor([0, 0, 2], dtype=torch.int32, device="cuda")
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for tasks in (1, 8, 11):
            base, vectors = torch.randn(3072, device="cuda").to(dtype), torch.randn(tasks, 3072, device="cuda").to(dtype)
            sm.weighted_sum(base, vectors, torch.ones(tasks, 3, device="cuda", dtype=wide), layers)
            sm.coefficient_grad(base, vectors, layers, 3)
        for columns in (7, 1000, 5003, 40960, 131072):
            student = torch.randn(3, columns, device="cuda").to(dtype)
            teacher = torch.randn(2, 3, columns, device="cuda").to(dtype)
            sm.softmax_kl_with_grad(student, teacher)
            sm.argmax_cross_entropy_with_grad(student, teacher)
            sm.entropy_with_grad(student)
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ("memcheck", "racecheck"))
def test_sanitized(tool):
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    if reason := sm.available()["cuda"]:
        pytest.skip(reason)
    command = [sanitizer, f"--tool={tool}", "--error-exitcode=9", "--kernel-regex=kns=samerge", sys.executable, "-c", SMALL_CALLS]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=400)
    if "Device not supported" in result.stdout + result.stderr:
        pytest.skip("compute-sanitizer does not support this device")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


SPECTRAL = {
    "tsv_m": sm.tsv_m,
    "iso_c": sm.iso_c,
    "iso_cts": sm.iso_cts,
    "knots": sm.knots,
    "subspace_boosting": partial(sm.subspace_boosting, beta=0.5),
    "svc": sm.svc,
}


@pytest.mark.parametrize("name", SPECTRAL)
def test_singular_values_are_those_of_the_cpu(on_gpu_by_name, problem, name):
    (base, experts, *_), (on_device, *_) = problem
    on_cpu = sm.PackedWeights.from_modules(base, experts, dtype=torch.float64)
    found = SPECTRAL[name](on_device).merged
    with sm.use_backend("reference"):
        expected = SPECTRAL[name](on_cpu).merged
    assert found.device.type == "cuda"
    assert (found.cpu() - expected).norm() < 1e-11 * expected.norm()


@pytest.mark.parametrize("inputs", ("experts", "merged"))
def test_inputs_are_collected_on_the_device(on_gpu_by_name, problem, inputs):
    (base, experts, heads, batches), (on_device, device_heads, device_batches) = problem
    on_cpu = sm.PackedWeights.from_modules(base, experts, dtype=torch.float64)
    with sm.use_backend("reference"):
        expected = sm.regmean(tiny.make(1), on_cpu, batches, tiny.plain(heads), inputs=inputs).merged
    found = sm.regmean(tiny.make(1), on_device, device_batches, tiny.plain(device_heads), inputs=inputs).merged
    assert found.device.type == "cuda"
    assert (found.cpu() - expected).norm() < 1e-11 * expected.norm()


@pytest.mark.parametrize("adapter", (tiny.shared_encoder, tiny.plain))
def test_task_vectors_are_distilled_on_the_device(on_gpu_by_name, problem, adapter):
    (base, experts, heads, batches), (on_device, device_heads, device_batches) = problem
    config = sm.DisTaCConfig(steps=5, learning_rate=1e-2, progress=False)
    with sm.use_backend("reference"):
        on_cpu = sm.PackedWeights.from_modules(base, experts, dtype=torch.float64)
        expected = sm.distac(tiny.make(1), on_cpu, batches, adapter(heads), config=config).task_vectors
    found = sm.distac(tiny.make(1), on_device, device_batches, adapter(device_heads), config=config).task_vectors
    assert found.device.type == "cuda"
    assert (found.cpu() - expected).norm() < 1e-9 * expected.norm()
