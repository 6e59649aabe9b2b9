"""Learned merges by several ranks: the numbers of one process, from a W-th of the weights on each."""

import time
import weakref
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import headed
import lora_experts
import pytest
import streaming
import tiny
import torch
import torch.distributed as dist
import worlds
from helpers import PATH_TOLERANCE
from safetensors.torch import load_file

import samerge_ext as sm
from samerge_ext.packing import ranks
from samerge_ext.packing.in_pieces import InPieces
from samerge_ext.packing.layout import BLOCK
from samerge_ext.packing.shards import own

TASKS = ("red", "green", "blue")


def learn(packed, module, batches, forward, method=sm.samerging, config=sm.SAMergingConfig, heads=None, **settings):
    settings = {"steps": 3, "learning_rate": 0.02, "progress": False, **settings}
    more = {} if heads is None else {"heads": heads}
    result = method(module, packed, batches, forward, config=config(**settings), **more)
    losses = [[record["loss"], record["gradient_norm"], record.get("held_back_loss", 0.0)] for record in result.history]
    learned = [result.coefficients, torch.tensor(losses, dtype=torch.float64)]
    return [*learned, headed.flat(result.heads)] if settings.get("train_heads") else learned


def of_streaming(share, dtype=torch.float64, form=None, rows=4, **settings):
    """Of a module with dropout, as it is trained: learned methods turn that off."""
    torch.manual_seed(0)
    packed = streaming.make_packed(streaming.make(dtype=dtype), tasks=TASKS, task_vector_dtype=form)
    uneven = {
        task: [batch[:rows] for batch in batches[: 1 + place]]
        for place, (task, batches) in enumerate(streaming.make_batches(tasks=TASKS).items())
    }
    return learn(share(packed), streaming.make(1, dtype, dropout=0.5).train(), uneven, streaming.logits, **settings)


def of_a_shared_encoder(share, **settings):
    _, _, packed, heads, batches = tiny.make_problem()
    return learn(share(packed), tiny.make(1), batches, tiny.shared_encoder(heads), **settings)


def of_trained_heads(share, **settings):
    _, _, packed = headed.make_problem()
    settings = {"train_heads": headed.HEADS, "held_back": 0.3, "measure_every": 2, **settings}
    return learn(share(packed), headed.make(1), tiny.make_batches(count=4), headed.logits, **settings)


def of_a_language_model(share, name, **settings):
    import tiny_language_models as models  # transformers, which the other worlds do without

    base = models.make(name)
    return learn(share(models.make_packed(base)), base, models.make_batches(), models.adapter(name), **settings)


def of_lora_experts(share, **settings):
    """The base in a packed file, of which a rank reads its own part; factors stay factors."""
    with TemporaryDirectory() as folder:
        folders = lora_experts.write(Path(folder) / "models", torch.float64)
        settings_of_packing = {"dtype": torch.float64, "task_vector_dtype": "lora", "file": Path(folder) / "packed"}
        packed = share(sm.PackedWeights.from_folders(*folders, **settings_of_packing)).in_memory(keep_factors=True)
        assert packed.task_vector_form == "lora" and not isinstance(own(packed.base), InPieces)
    return learn(packed, lora_experts.module(dtype=torch.float64), streaming.make_batches(), streaming.logits, **settings)


FP32 = {"dtype": torch.float32}
CASES = {  # name -> a learned merge of a function that shards
    "resident": of_streaming,
    "streamed": lambda share: of_streaming(share, streamed=True),
    "fp32": lambda share: of_streaming(share, **FP32),
    "streamed fp32": lambda share: of_streaming(share, **FP32, streamed=True),
    "task-wise": lambda share: of_streaming(share, streamed=True, granularity="task", sam="off", optimizer="sgd"),
    "batches of one row": lambda share: of_streaming(share, rows=1, streamed=True),
    "adamerging": lambda share: of_streaming(share, method=sm.adamerging, config=sm.AdaMergingConfig, streamed=True),
    "int8": lambda share: of_streaming(share, **FP32, form="int8", streamed=True),
    "int4-residual": lambda share: of_streaming(share, **FP32, form="int4-residual"),
    "LoRA experts": of_lora_experts,
    "LoRA experts, streamed": lambda share: of_lora_experts(share, streamed=True),
    "shared encoder": lambda share: of_a_shared_encoder(share, streamed=True),
    "one task at a time": lambda share: of_a_shared_encoder(share, streamed=True, tasks_per_batch=1),
    "heads": lambda share: of_trained_heads(share, streamed=True),
    "heads, resident": of_trained_heads,
    "tied language model": lambda share: of_a_language_model(share, "qwen2, tied", streamed=True),
    "language model": lambda share: of_a_language_model(share, "gpt2"),
    "language model with heads whole": lambda share: of_a_language_model(share, "bert", streamed=True),
}


FEW = ("resident", "streamed", "streamed fp32", "one task at a time", "heads")
# Of two or three tasks: ranks without a task in a turn, and in a world of four ranks that have parts of a task's batches.
IN_PARTS = ("batches of one row", "adamerging", "LoRA experts", "heads, resident", "tied language model", "language model")
WORLDS = {1: FEW, 2: tuple(CASES), 3: FEW, 4: (*FEW, *IN_PARTS)}


def every_case(names):
    """What one rank learns in every case, in a second run of some, and what `counted_bytes` and those after it find."""
    found = {name: CASES[name](sm.PackedWeights.shard) for name in names}
    again = {name: CASES[name](sm.PackedWeights.shard) for name in ("resident", "streamed fp32")}
    return found, again, counted_bytes(), most_weights(), events_of_a_forward()


@pytest.fixture(scope="module", params=WORLDS)
def world(request, tmp_path_factory):
    size = request.param
    return size, worlds.run(every_case, size, tmp_path_factory.mktemp("world") / "ranks", WORLDS[size])


@pytest.fixture(scope="module")
def alone():
    return {name: case(lambda packed: packed) for name, case in CASES.items()}


def test_ranks_learn_what_one_process_learns(world, alone):
    size, found = world
    for name in WORLDS[size]:
        truth = alone[name]
        assert (truth[0] - 0.3).abs().max() > 0.01
        for of_rank in found:
            for ours, expected in zip(of_rank[0][name], truth, strict=True):
                error = (ours - expected).norm() / expected.norm()
                assert error <= PATH_TOLERANCE[truth[0].dtype], f"{name}: {error:.1e}"


def test_all_ranks_learn_the_same_bits_in_every_run(world):
    size, found = world
    for name in WORLDS[size]:
        for of_rank in found:
            assert all(torch.equal(x, y) for x, y in zip(of_rank[0][name], found[0][0][name], strict=True)), name
    for name, again in found[0][1].items():
        assert all(torch.equal(x, y) for x, y in zip(again, found[0][0][name], strict=True)), name


def counted_bytes():
    """name of a collective -> bytes that a SAM step gives to it and takes from it, of all ranks' parts."""
    found = []
    for steps in (1, 3):
        counts = Counter()
        before = ranks._all_gather, ranks._reduce_scatter, dist.all_reduce

        def counting(name, collective, counts):
            def counted(tensor, *arguments, **settings):
                counts[name] += max(part.nbytes for part in (tensor, *arguments))
                return collective(tensor, *arguments, **settings)

            return counted

        ranks._all_gather, ranks._reduce_scatter, dist.all_reduce = (
            counting(name, collective, counts) for name, collective in zip(("gather", "scatter", "sum"), before, strict=True)
        )
        try:
            module, packed, batches = streaming.chain(TASKS)
            learn(packed.shard(), module, batches, streaming.logits, streamed=True, steps=steps)
        finally:
            ranks._all_gather, ranks._reduce_scatter, dist.all_reduce = before
        found.append(counts)
    return {name: (found[1][name] - found[0][name]) / 2 for name in found[1]}


def test_the_collectives_move_what_the_formula_says(world):
    """docs/distributed.md: per turn a unit is gathered twice and its gradient scattered once, in fp32 here."""
    size, found = world
    turns_of_a_pass, layers = -(-len(TASKS) // size), 6
    units = 3 * streaming.padded_unit(size)
    per_pass = {
        "gather": turns_of_a_pass * 2 * units + 4 * size * len(TASKS) * layers,  # λ of all ranks
        "scatter": turns_of_a_pass * units,
        # ∂loss/∂λ and the losses, and how many rows of which batch a rank has
        "sum": 4 * len(TASKS) * (layers + 1) + 8 * len(TASKS) * (size > len(TASKS)),
    }
    for of_rank in found:
        assert of_rank[2] == {name: 2 * number for name, number in per_pass.items()}


def most_weights():
    """The most bytes of whole units' weights that exist at a time in a pass."""
    module, packed, batches = streaming.chain(TASKS)
    bound = 2 * streaming.padded_unit(dist.get_world_size())
    model = sm.MergedModel(module, packed.shard(), streamed=True)
    alive, most = weakref.WeakSet(), 0
    spread, gather = model.weights.spread, ranks._all_gather

    def note(tensor):
        nonlocal most
        alive.add(tensor.untyped_storage())
        until = time.monotonic() + 5  # gloo's threads let go of what they have sent a moment later
        while sum(storage.nbytes() for storage in alive) > bound and time.monotonic() < until:
            time.sleep(0.001)
        most = max(most, sum(storage.nbytes() for storage in alive))

    def gathering(out, *arguments, **settings):
        if out.numel() >= BLOCK:  # not the coefficients of all ranks
            note(out)
        return gather(out, *arguments, **settings)

    start = spread.start

    def started(*arguments):
        waited = start(*arguments)

        def noted():
            found = waited()
            note(found)
            return found

        return noted

    ranks._all_gather, spread.start = gathering, started
    try:
        for _ in range(3):
            model.merge()
            model.zero_gradients()
            model(batches["red"][0]).square().sum().backward()
    finally:
        ranks._all_gather = gather
    return most


def test_two_units_weights_exist_at_most(world):
    """What a rank computes with, and what is on its way to it, whose parts are padded to whole blocks."""
    size, found = world
    for of_rank in found:
        assert streaming.padded_unit(size) < of_rank[3] <= 2 * streaming.padded_unit(size)


def events_of_a_forward():
    """When weights of units begin to be gathered, and units have run, in a pass after one like it."""
    module, packed, batches = streaming.chain(TASKS)
    model = sm.MergedModel(module, packed.shard(), streamed=True)
    events, start = [], model.weights.spread.start

    def started(layers, *arguments):
        events.append(f"gather {layers[0] // 2}")
        return start(layers, *arguments)

    model.weights.spread.start = started
    for number, part in enumerate(module):
        part.register_forward_hook(lambda *_, number=number: events.append(f"ran {number}"))
    for _ in range(2):
        model.merge()
        model.zero_gradients()
        events.clear()
        model(batches["red"][0]).square().sum().backward()
    return events[:7]


def test_the_next_unit_is_on_its_way_while_one_runs(world):
    """The last one's again, for its backward."""
    _, found = world
    for of_rank in found:
        assert of_rank[4] == ["gather 0", "gather 1", "ran 0", "gather 2", "ran 1", "gather 2", "ran 2"]


def test_a_packed_file_is_streamed_by_every_rank(tmp_path):
    truth = streaming.path_of_gradients(streaming.make(1), streaming.packed_twice(tmp_path)[0], None, steps=2)
    for found in worlds.run(from_a_file, 2, tmp_path / "world", tmp_path / "packed"):
        for path in found:
            torch.testing.assert_close(path, 2 * truth, rtol=1e-10, atol=1e-12)


def from_a_file(file):
    """The gradients of two equal batches, from the file and from this rank's part of it in memory."""
    found = []
    for share in (sm.PackedWeights.open(file).shard(), sm.PackedWeights.open(file).shard().in_memory()):
        found.append(path_of_gradients(share))
    return found


def path_of_gradients(share):
    model = sm.MergedModel(streaming.make(1), share, 0.4, train=True, streamed=True, store=share.store(piece=3072))
    path = []
    for step in range(2):
        model.merge()
        path.append(streaming.gradient(model, streaming.make_batches()["red"][step % 3], seed=step)[1])
        model.coefficients.data -= 1e-5 * path[-1] / share.ranks.size
    return torch.stack(path)


def saved(folder):
    """The tensors that a rank finds; the first one has them written, too."""
    for name, streamed in (("streamed", True), ("resident", False)):
        torch.manual_seed(0)
        packed = streaming.make_packed(streaming.make()).shard()
        config = sm.SAMergingConfig(progress=False, steps=2, streamed=streamed)
        result = sm.samerging(streaming.make(1), packed, streaming.make_batches(), streaming.logits, config=config)
        assert result.save_pretrained(Path(folder) / name).is_dir()
    return result.state_dict()


def test_the_first_rank_saves_for_all(tmp_path):
    found = worlds.run(saved, 2, tmp_path / "world", tmp_path)
    for name in ("streamed", "resident"):
        for tensor_name, tensor in load_file(tmp_path / name / "model.safetensors").items():
            torch.testing.assert_close(tensor, found[1][tensor_name], rtol=1e-10, atol=1e-12)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resident", "streamed", "world"]
