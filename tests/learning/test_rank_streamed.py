"""Coefficients of singular components where no weights are held whole: gradients, learned merges and what is saved, wherever base
and task vectors lie."""

import json
import subprocess
import sys
from dataclasses import replace

import headed
import pytest
import streaming
import tiny
import torch
from helpers import PATH_TOLERANCE, ROOT, SIGMA_TOLERANCE
from safetensors.torch import load_file
from torch.func import functional_call

import samerge_ext as sm
from samerge_ext.budget.dry_run import dry_run
from samerge_ext.budget.plan import Plan, plan
from samerge_ext.packing import components
from samerge_ext.packing.components import Components
from samerge_ext.packing.factors import FactoredTaskVectors

WIDTH, RANK = 48, 40  # with so many of 48 components the search is exact
SETTINGS = {"granularity": "rank", "rank": 3, "steps": 4, "learning_rate": 0.02}


def make(seed=0, dtype=torch.float64):
    return streaming.make(seed, dtype, width=WIDTH, blocks=1)


@pytest.fixture(scope="module")
def packed_twice(tmp_path_factory):
    return streaming.packed_twice(tmp_path_factory.mktemp("packed"), make())


def plain_gradient(module, packed, coefficients, tokens):
    """Outputs and ∂loss/∂coefficients [T, L + C] in autograd, with weights that are written out on torch's decompositions."""
    layout, at = packed.layout, coefficients.clone().requires_grad_()
    task_vectors = [layout.views(row) for row in packed.task_vectors]
    weights, column = {**packed.unchanged, **packed.merged_buffers()}, layout.num_layers
    for name, base in layout.views(packed.base).items():
        layer = layout.names.index(name)
        weights[name] = base + sum(at[t, layer] * of_task[name] for t, of_task in enumerate(task_vectors))
        if base.dim() > 1:
            k = min(RANK, *base.flatten(1).shape)
            for t, of_task in enumerate(task_vectors):
                u, s, vh = torch.linalg.svd(of_task[name].flatten(1), full_matrices=False)
                deviation = (u[:, :k] * (at[t, column : column + k] * s[:k])) @ vh[:k]
                weights[name] = weights[name] + deviation.view_as(base)
            column += k
    assert column == at.shape[1]
    outputs = functional_call(module, weights, (tokens,))
    return outputs.detach(), torch.autograd.grad(outputs.square().sum(), at)[0]


def assert_near(found, expected, dtype=torch.float64):
    assert (found - expected).norm() <= PATH_TOLERANCE[dtype] * expected.norm()


@pytest.mark.parametrize("piece", [None, 1024], ids=["whole units", "pieces"])
@pytest.mark.parametrize("kept", ["in memory", "in a file"])
def test_the_gradient_is_that_of_the_formula(packed_twice, kept, piece, monkeypatch):
    """A block that runs twice, tied weights that are read elsewhere too, a parameter of three dimensions; in pieces, matrices are
    fetched, added to and contracted in several parts."""
    monkeypatch.setattr(components, "AT_ONCE", piece or components.AT_ONCE)
    packed = packed_twice[kept == "in a file"]
    model = sm.MergedModel(make(1), packed, 0.4, streamed=True, store=packed.store(piece=piece))
    model.use_components(Components.of(packed, RANK, model.weights.store))
    torch.manual_seed(3)
    model.coefficients.data += 0.3 * torch.randn_like(model.coefficients)
    model.merge()
    tokens = streaming.make_batches()["red"][0]
    expected = plain_gradient(make(1), packed_twice[0], model.coefficients.detach(), tokens)
    for found, truth in zip(streaming.gradient(model, tokens), expected, strict=True):
        assert_near(found, truth)
    of_components = expected[1][:, packed.layout.num_layers :]
    assert of_components.norm() > 0.1 * expected[1].norm()


def learned(packed, module, **settings):
    config = sm.SAMergingConfig(progress=False, **{**SETTINGS, **settings})
    return sm.samerging(module, packed, streaming.make_batches(), streaming.logits, config=config)


def assert_same_path(found, expected, dtype):
    assert_near(found.coefficients, expected.coefficients, dtype)
    assert found.component_coefficients.keys() == expected.component_coefficients.keys()
    for name, of_layer in expected.component_coefficients.items():
        assert_near(found.component_coefficients[name], of_layer, dtype)


@pytest.mark.parametrize("sam", ["paper", "off"])
def test_a_learned_merge_takes_the_same_path(packed_twice, sam):
    resident = learned(packed_twice[0], make(1), sam=sam)
    moved = [c - resident.coefficients.mean() for c in resident.component_coefficients.values()]
    assert max(c.abs().max() for c in moved) > 0.02
    for packed in packed_twice:
        assert_same_path(learned(packed, make(1), sam=sam, streamed=True), resident, torch.float64)


@pytest.mark.parametrize("form", ["int8", "int4-residual"])
def test_quantised_task_vectors_take_it_too(packed_twice, form, tmp_path):
    folder = packed_twice[1].base.file.path.parent
    models = folder / "base.safetensors", {task: folder / f"{task}.safetensors" for task in streaming.TASKS}
    settings = {"dtype": torch.float32, "task_vector_dtype": form}
    in_memory, in_file = (sm.PackedWeights.from_folders(*models, **settings, file=file) for file in (None, tmp_path / "packed"))
    resident = learned(in_memory, make(1, torch.float32), steps=2)
    for packed in (in_memory, in_file):
        assert_same_path(learned(packed, make(1, torch.float32), steps=2, streamed=True), resident, torch.float32)


def factored(packed):
    """Weights whose task vectors are LoRA factors of rank 2, or of rank 1; in places a tensor of an adapter's own, or nothing."""
    layout, generator = packed.layout, torch.Generator().manual_seed(7)

    def normal(*shape):
        return 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)

    changes = {}
    for layer, shape in enumerate(layout.shapes):
        if layout.offsets[layer] is None:
            continue
        m, n = shape[0], shape[1:].numel()
        changes[layer] = tuple((normal(m, r), normal(r, n)) if len(shape) > 1 else normal(*shape) for r in (2, 1))
    changes[layout.names.index("embedding.weight")] = (None, (normal(37, 2), normal(2, WIDTH)))
    changes[layout.names.index("blocks.0.wide.weight")] = (normal(2 * WIDTH, WIDTH), None)
    changes[layout.names.index("blocks.0.narrow.weight")] = (None, None)
    return replace(packed, task_vectors=FactoredTaskVectors(layout, changes, 2, torch.float64))


def test_lora_factors_are_decomposed_as_they_are(packed_twice):
    """As many components as the larger of the tasks' ranks, the zeros of a smaller one behind them; what is left is nothing."""
    packed = factored(packed_twice[0])
    found, whole = Components.of(packed, 5), packed.in_memory()
    own = {"blocks.0.wide.weight": 5, "position": 1}
    matrices = {name for name, shape in zip(packed.layout.names, packed.layout.shapes, strict=True) if len(shape) > 1}
    assert found.factors.keys() == matrices - {"frozen.weight", "blocks.0.narrow.weight"}
    assert found.ranks == {name: own.get(name, 2) for name in found.factors}
    for row in range(2):
        changes = whole.layout.views(whole.task_vectors[row])
        for name, (left, right) in found.factors.items():
            k = found.ranks[name]
            of_task = slice(k * row, k * (row + 1))
            product, truth = left[:, of_task] @ right[:, of_task].mT, changes[name].flatten(1)
            if name in own:
                u, s, vh = torch.linalg.svd(truth, full_matrices=False)
                assert ((product - truth).norm() - s[k:].norm()).abs() <= SIGMA_TOLERANCE * s.norm()
            else:
                assert_near(product, truth)
                lengths = right[:, of_task].norm(dim=0)
                assert_near(lengths, torch.linalg.svdvals(truth)[:k])


def test_a_merge_of_lora_factors_takes_the_same_path_streamed(packed_twice):
    packed = factored(packed_twice[0])
    assert_same_path(learned(packed, make(1), streamed=True), learned(packed, make(1)), torch.float64)


def test_heads_are_learned_beside_components():
    _, _, packed = headed.make_problem()
    resident, streamed = (headed.run(packed, **SETTINGS, streamed=streamed) for streamed in (False, True))
    assert_same_path(streamed, resident, torch.float64)
    assert_near(headed.flat(streamed.heads), headed.flat(resident.heads))
    assert headed.relative(headed.flat(resident.heads), headed.flat(packed.heads)) > 1e-3


def test_what_is_saved_is_the_model_as_it_runs(packed_twice, tmp_path):
    """A streamed result has no merged weights; its layers are merged one by one, their components with them."""
    resident, streamed = (learned(packed_twice[1], make(1), streamed=way) for way in (False, True))
    assert streamed.merged is None and resident.components is None
    tokens = streaming.make_batches()["red"][0]
    torch.testing.assert_close(streamed.module(tokens), resident.module(tokens))
    by_layers = packed_twice[0].state_dict(packed_twice[0].merge(streamed.coefficients))
    expected = resident.state_dict()
    found = streamed.state_dict()
    streamed.save_pretrained(tmp_path / "out")
    saved = load_file(tmp_path / "out/model.safetensors")
    for name in streamed.component_coefficients:
        assert_near(found[name], expected[name])
        assert torch.equal(saved[name], found[name])
        assert (found[name] - by_layers[name]).norm() > 1e-4 * found[name].norm(), "components went ways of their own"


class Interrupted(Exception):
    pass


def test_an_interrupted_run_within_a_budget_continues_to_the_same_numbers(packed_twice, tmp_path, monkeypatch):
    """From a packed file in pieces: the components are found again, and are the same to the bit."""
    monkeypatch.setattr(Plan, "choose", lambda self, *_: next(way for way in self.ways if way.store == "file"))
    monkeypatch.setattr(components, "AT_ONCE", 1024)
    calls = 0

    def run(folder, last=None):
        def logits(module, batch, task):
            nonlocal calls
            calls += torch.is_grad_enabled()
            if last is not None and calls > last:
                raise Interrupted
            return module(batch)

        config = sm.SAMergingConfig(progress=False, **SETTINGS, memory_budget="1TB", checkpoint_dir=folder, checkpoint_every=1)
        return sm.samerging(make(1), packed_twice[1], streaming.make_batches(), logits, config=config)

    whole, of_plan_and_steps = run(tmp_path / "whole"), calls
    calls = 0
    with pytest.raises(Interrupted):
        run(tmp_path / "state", last=of_plan_and_steps - 3)
    continued = run(tmp_path / "state")
    assert continued.history == whole.history and torch.equal(continued.coefficients, whole.coefficients)
    for name, of_layer in whole.component_coefficients.items():
        assert torch.equal(continued.component_coefficients[name], of_layer)


def test_components_are_the_same_wherever_task_vectors_lie(packed_twice, monkeypatch):
    in_memory, in_file = packed_twice
    expected = Components.of(in_memory, 3).factors
    monkeypatch.setattr(components, "AT_ONCE", 2048)
    for packed in packed_twice:
        found = Components.of(packed, 3, packed.store(piece=1024)).factors
        for name, sides in expected.items():
            assert all(torch.equal(*pair) for pair in zip(found[name], sides, strict=True)), name


def test_a_plan_counts_what_components_take():
    """A process stays within it where their factors are as many numbers as the task vectors."""
    script = ROOT / "tests" / "support" / "rank_memory.py"
    run = subprocess.run([sys.executable, script], check=True, capture_output=True, text=True)
    planned, measured, without = json.loads(run.stdout)
    assert 0.8 * planned < measured <= planned, f"{measured} of {planned} bytes"
    assert measured > without


def test_factors_are_planned_for_as_they_are_found(packed_twice):
    """Of LoRA experts too, whose dense task vectors do not exist in a plan."""
    batches = {task: held[0] for task, held in streaming.make_batches().items()}
    for packed in (packed_twice[0], factored(packed_twice[0])):
        peaks = [
            dry_run(make(1), packed, batches, streaming.logits, device=torch.device("cpu"), streamed=True, rank=rank).peak
            for rank in (0, 5)
        ]
        found = sum(side.nbytes for sides in Components.of(packed, 5).factors.values() for side in sides)
        assert found <= peaks[1] - peaks[0] <= 2 * found
    planned = plan(make(1), packed, streaming.make_batches(), streaming.logits, sm.SAMergingConfig(**SETTINGS))
    assert {way.store for way in planned.ways} == {"device", "factors", "file"}


def test_a_module_of_other_tests_streams_too():
    _, _, packed, heads, batches = tiny.make_problem()
    for forward in (tiny.plain(heads), tiny.shared_encoder(heads)):
        resident, streamed = streaming.learn_both(packed, tiny.make(1), batches, forward, **SETTINGS)
        assert_same_path(streamed, resident, torch.float64)
