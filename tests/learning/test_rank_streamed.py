"""Coefficients of singular components where no weights are held whole: gradients, learned merges and what is saved, wherever base and
task vectors lie."""

import headed
import pytest
import streaming
import tiny
import torch
from helpers import PATH_TOLERANCE
from safetensors.torch import load_file
from torch.func import functional_call

import samerge_ext as sm
from samerge_ext.budget.plan import Plan
from samerge_ext.packing import components
from samerge_ext.packing.components import Components

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


def test_a_module_of_other_tests_streams_too():
    _, _, packed, heads, batches = tiny.make_problem()
    for forward in (tiny.plain(heads), tiny.shared_encoder(heads)):
        resident, streamed = streaming.learn_both(packed, tiny.make(1), batches, forward, **SETTINGS)
        assert_same_path(streamed, resident, torch.float64)
