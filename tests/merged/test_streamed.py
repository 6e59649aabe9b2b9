"""Streamed MergedModel: the same numbers as the resident one, from weights that exist only while a unit runs."""

import copy
import gc
import weakref

import pytest
import streaming
import tiny
import torch
from helpers import PATH_TOLERANCE, assert_close
from streaming import TASKS, Model, both, gradient, learn_both, make, make_batches, make_packed
from torch import nn
from torch.nn import functional as F

import samerge_ext as sm
from samerge_ext.merged.streamed import rows_of
from samerge_ext.merged.units import find_units
from samerge_ext.models import parameters_on_meta
from samerge_ext.packing.stores import StagedStore


def test_forward_and_gradient_are_those_of_the_resident_model():
    resident, streamed = both()
    tokens = make_batches()["red"][0]
    for x, y in zip(gradient(resident, tokens), gradient(streamed, tokens), strict=True):
        assert y.abs().sum() > 0
        torch.testing.assert_close(y, x, rtol=1e-10, atol=1e-12)


def test_dropout_repeats_its_random_state():
    resident, streamed = both(dropout=0.5)
    resident.module.train(), streamed.module.train()
    tokens = make_batches()["red"][0]
    before = gradient(streamed, tokens, seed=1)[1]
    assert not torch.allclose(before, gradient(streamed, tokens, seed=2)[1]), "dropout is at work"
    for x, y in zip(gradient(resident, tokens), gradient(streamed, tokens), strict=True):
        torch.testing.assert_close(y, x, rtol=1e-10, atol=1e-12)


def test_running_statistics_are_updated_once_a_pass():
    resident, streamed = both()
    tokens = make_batches()["red"][0]
    for model in (resident, streamed):
        model.module.train()
        gradient(model, tokens)
    torch.testing.assert_close(streamed.module.norm.running_mean, resident.module.norm.running_mean)
    torch.testing.assert_close(streamed.module.norm.running_var, resident.module.norm.running_var)
    assert streamed.module.norm.num_batches_tracked == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("settings", [{}, {"sam": "off", "granularity": "task"}])
def test_a_learned_merge_takes_the_same_path(dtype, settings):
    packed = make_packed(make(dtype=dtype))
    results = learn_both(packed, make(1, dtype), steps=5, learning_rate=0.02, **settings)
    resident, streamed = (result.coefficients for result in results)
    assert (resident - 0.3).abs().max() > 0.01
    assert (streamed - resident).norm() <= PATH_TOLERANCE[dtype] * resident.norm()
    for x, y in zip(*(result.history for result in results), strict=True):
        assert y["loss"] == pytest.approx(x["loss"], rel=PATH_TOLERANCE[dtype])


WAYS = {"resident": {}, "streamed": {"streamed": True}, "planned": {"memory_budget": "100GB"}}


@pytest.mark.parametrize("second", WAYS)
@pytest.mark.parametrize("first", WAYS)
def test_a_module_can_be_merged_again(first, second):
    """As one does in a notebook: of an earlier merge nothing is left in it."""
    packed, module = make_packed(make()), make(1)

    def learn(module, way):
        config = sm.SAMergingConfig(steps=2, progress=False, **WAYS[way])
        return sm.samerging(module, packed, make_batches(), streaming.logits, config=config)

    learn(module, first)
    again, fresh = learn(module, second), learn(make(1), second)
    assert torch.equal(again.coefficients, fresh.coefficients)
    tokens = make_batches()["red"][0]
    with torch.no_grad():
        assert torch.equal(again.module(tokens), fresh.module(tokens))
    if second != "streamed":
        assert all(type(part._parameters) is dict and "forward" not in vars(part) for part in module.modules())


def test_a_streamed_module_has_no_state_dict_until_it_is_merged_again():
    """What stands for its weights is NaN, which nobody wants in a file."""
    module, packed = make(1), make_packed(make())
    sm.MergedModel(module, packed, streamed=True)
    with pytest.raises(
        RuntimeError, match=r"the weights of '.+' are merged when .* save_pretrained\(path\) writes them one by one"
    ):
        module.state_dict()
    sm.MergedModel(module, packed)
    assert all(tensor.isfinite().all() for tensor in module.state_dict().values())


def test_a_forward_of_the_users_own_is_back_after_streaming():
    module = make(1)
    of_class = module.blocks[0].forward
    module.blocks[0].forward = own = lambda x, *, scale: of_class(x, scale=scale)
    for streamed in (True, False):
        sm.MergedModel(module, make_packed(make()), streamed=streamed)
    assert module.blocks[0].forward is own


def test_a_shared_encoder_streams_too():
    packed = make_packed(make())
    shared = sm.models.SharedEncoder(lambda module, batch: module(batch), lambda features, task: features[:, : 3 + len(task)])
    resident, streamed = learn_both(packed, make(1), forward=shared, steps=3)
    torch.testing.assert_close(streamed.coefficients, resident.coefficients, rtol=1e-10, atol=0)


def test_teachers_are_the_experts():
    base = make()
    packed = make_packed(base)
    tokens = make_batches()["red"][0]
    resident, streamed = (sm.MergedModel(make(1), packed, streamed=s) for s in (False, True))
    for task in TASKS:
        with resident.teacher(task) as one, streamed.teacher(task) as other:
            torch.testing.assert_close(other(tokens), one(tokens), rtol=1e-12, atol=1e-12)


def test_a_module_on_meta_runs():
    packed = make_packed(make())
    with torch.device("meta"):
        module = Model().double()
    tokens = make_batches()["red"][0]
    resident, streamed = sm.MergedModel(make(1), packed), sm.MergedModel(module, packed, streamed=True)
    for x, y in zip(gradient(resident, tokens), gradient(streamed, tokens), strict=True):
        torch.testing.assert_close(y, x, rtol=1e-10, atol=1e-12)


def test_a_buffer_on_meta_that_nothing_fills_is_an_error():
    class Rotary(Model):
        def __init__(self):
            super().__init__()
            self.register_buffer("frequencies", torch.arange(4.0), persistent=False)

    with torch.device("meta"):
        module = Rotary().double()
    with pytest.raises(ValueError, match="'frequencies' is on meta .*parameters_on_meta"):
        sm.MergedModel(module, make_packed(make()), streamed=True)
    with parameters_on_meta():
        module = Rotary().double()
    assert all(p.is_meta for p in module.parameters()) and module.head.weight is module.embedding.weight
    sm.MergedModel(module, make_packed(make()), streamed=True)
    assert torch.equal(module.frequencies, torch.arange(4.0, dtype=torch.float64))


def test_autocast_reaches_the_units():
    resident, streamed = both(dtype=torch.float32)
    tokens = make_batches()["red"][0]
    for scale in (0.2, 0.6):  # autocast's cache must not keep the weights of the first merge
        for model in (resident, streamed):
            model.merge(model.packed.coefficients(scale))
        (x, g), (y, h) = (gradient(model, tokens, enabled=True) for model in (resident, streamed))
        assert x.dtype == y.dtype == torch.bfloat16
        torch.testing.assert_close(y, x)
        assert F.cosine_similarity(g.flatten(), h.flatten(), dim=0) > 0.999


def test_weights_exist_only_while_their_unit_runs(monkeypatch):
    packed = make_packed(make())
    model = sm.MergedModel(make(1), packed, streamed=True)
    alive, most = weakref.WeakSet(), 0
    merged = model.weights._merged

    def watched(unit):
        nonlocal most
        layers = merged(unit)
        alive.add(next(iter(layers.values())).untyped_storage())
        most = max(most, sum(storage.nbytes() for storage in alive))
        return layers

    monkeypatch.setattr(model.weights, "_merged", watched)
    gradient(model, make_batches()["red"][0])
    gc.collect()
    assert not alive
    bytes_of = {unit.name: 8 * unit.numel for unit in model.weights.units}
    read_alone = bytes_of["embedding"] + 8 * 1024  # the embedding read by functional.linear, the root's own parameter
    assert most <= max(bytes_of.values()) + read_alone < sum(bytes_of.values()) / 2
    assert all(p.untyped_storage().nbytes() <= 8 for n, p in model.module.named_parameters() if not n.startswith("frozen"))


def test_gradients_are_contracted_as_they_appear(monkeypatch):
    model = sm.MergedModel(make(1), make_packed(make()), streamed=True)
    alive, most = weakref.WeakSet(), 0
    contract = model.weights.contract

    def watched(gradient, unit, layer):
        nonlocal most
        alive.add(gradient.untyped_storage())
        most = max(most, len(alive))
        contract(gradient, unit, layer)

    monkeypatch.setattr(model.weights, "contract", watched)
    gradient(model, make_batches()["red"][0])
    assert most <= 3, "a block has ten layers"


def test_a_merge_between_forward_and_backward_is_an_error():
    model = sm.MergedModel(make(1), make_packed(make()), streamed=True)
    loss = model(make_batches()["red"][0]).sum()
    model.merge()
    with pytest.raises(RuntimeError, match="merged again between its forward and its backward"):
        loss.backward()


def test_recurrent_layers_keep_their_list_of_weights():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cells = nn.LSTM(6, 4, batch_first=True)

        def forward(self, x):
            return self.cells(x)[0][:, -1]

    torch.manual_seed(0)
    base, expert, module = (Recurrent().double().eval() for _ in range(3))
    packed = sm.PackedWeights.from_modules(base, {"one": expert}, dtype=torch.float64)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    for streamed in (False, True):
        model = sm.MergedModel(copy.deepcopy(module), packed, 1.0, streamed=streamed)
        torch.testing.assert_close(model(x), expert(x))


@pytest.mark.parametrize(
    "patterns, expected",
    [
        ((), ["embedding", "blocks.0", "blocks.1", "norm", "frozen", "head"]),
        (("blocks.0.wide", "blocks.1"), ["embedding", "blocks.0.attention", "blocks.0.norm", "blocks.0.wide", "blocks.0.narrow",
                                         "blocks.1", "norm", "frozen", "head"]),
    ],
)  # fmt: skip
def test_units(patterns, expected):
    assert list(find_units(make(blocks=2), patterns)) == expected
    with pytest.raises(ValueError, match="units pattern 'layers.*' fits no module"):
        find_units(make(), ("layers.*",))


def test_units_named_by_pattern_give_the_same_numbers():
    packed = make_packed(make())
    tokens = make_batches()["red"][0]
    resident = gradient(sm.MergedModel(make(1), packed), tokens)
    streamed = gradient(sm.MergedModel(make(1), packed, streamed=True, units=("blocks.*.wide", "blocks.1")), tokens)
    torch.testing.assert_close(streamed, resident, rtol=1e-10, atol=1e-12)


def test_a_result_of_a_streamed_merge_is_saved_layer_by_layer(tmp_path):
    packed = make_packed(make())
    resident, streamed = learn_both(packed, make(1), steps=2)
    assert streamed.merged is None
    torch.testing.assert_close(streamed.state_dict(), resident.state_dict(), rtol=1e-10, atol=1e-12)
    streamed.save_pretrained(tmp_path / "out")
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in streamed.state_dict().items() if name in saved)
    assert saved.keys() == resident.state_dict().keys() - packed.aliases.keys()
    tokens = make_batches()["red"][0]
    torch.testing.assert_close(streamed.module(tokens), resident.module(tokens), rtol=1e-10, atol=1e-12)


def test_the_small_models_of_the_other_tests_stream():
    base, _, packed, heads, batches = tiny.make_problem()
    for forward in (tiny.plain(heads), tiny.shared_encoder(heads)):
        resident, streamed = learn_both(packed, tiny.make(1), batches, forward, steps=4, learning_rate=0.02)
        torch.testing.assert_close(streamed.coefficients, resident.coefficients, rtol=1e-10, atol=0)


@pytest.mark.parametrize("piece", [None, 1024, 3072])
def test_rows_of_a_matrix_are_merged_when_they_are_asked_for(piece):
    """And their gradient is contracted with the task vectors, slab by slab, into that of λ."""
    packed = make_packed(make(vocabulary=200))
    store = piece and StagedStore(packed.base, packed.task_vectors, torch.device("cpu"), piece)
    model = sm.MergedModel(make(1, vocabulary=200), packed, streamed=True, store=store)
    coefficients = torch.randn_like(packed.coefficients(0.0))
    model.merge(coefficients)
    model.zero_gradients()
    rows = rows_of(model.module.head, "weight")
    slabs = rows.slabs(64)
    assert [row for some in slabs for row in range(some.start, some.stop)] == list(range(200)) and len(slabs) == 4
    layer = packed.layout.names.index("embedding.weight")
    expected = packed.layout.views(packed.merge(coefficients))["embedding.weight"]
    found = [rows.rows(some, torch.empty(some.stop - some.start, 16, dtype=torch.float64), torch.empty(0)) for some in slabs]
    assert torch.equal(torch.cat(found), expected) and torch.equal(rows.whole(), expected)
    by_weight = torch.randn(200, 16, dtype=torch.float64)
    start, length = packed.layout.extent(layer)
    by_coefficients = packed.task_vectors[:, start : start + length][:, : 200 * 16] @ by_weight.flatten()
    assert_close(rows.contracted(by_weight), by_coefficients, at_least=by_weight.norm().item())  # sums that cancel
    torch.autograd.backward([rows.coefficients], [by_coefficients])
    assert torch.equal(model.coefficient_gradient()[:, layer], by_coefficients)


def test_rows_that_are_no_whole_blocks_of_a_piece_are_merged_as_a_whole():
    base = make(width=24, vocabulary=200)
    packed = make_packed(base)
    store = StagedStore(packed.base, packed.task_vectors, torch.device("cpu"), 1024)  # 128 rows are 3 blocks
    model = sm.MergedModel(make(1, width=24, vocabulary=200), packed, streamed=True, store=store)
    assert rows_of(model.module.head, "weight") is None
    assert rows_of(sm.MergedModel(make(1, width=24, vocabulary=200), packed).module.head, "weight") is None  # not streamed
