"""Learned methods on the GPU follow the literal loops, or learn what the CPU learns."""

import json
import subprocess
import sys

import literal
import pytest
import tiny
import torch
from helpers import ROOT
from safetensors.torch import save_file

import samerge_ext as sm

pytestmark = pytest.mark.gpu


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
