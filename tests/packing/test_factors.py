"""LoRA experts kept as factors: the numbers that multiplying them out gives, in any pieces, and the same merges."""

import copy

import lora_experts
import pytest
import streaming
import torch

import samerge_ext as sm
from samerge_ext.budget.plan import MemoryBudgetError, plan
from samerge_ext.packing.components import Components
from samerge_ext.packing.factors import FactoredTaskVectors
from samerge_ext.packing.packed_file import FileNumbers
from samerge_ext.packing.ranks import Ranks
from samerge_ext.packing.shards import Shards
from samerge_ext.packing.stores import in_memory


@pytest.fixture(params=[torch.float32, torch.float64])
def folders(request, tmp_path):
    return lora_experts.write(tmp_path, request.param)


def pack(folders, **settings):
    dtype = sm.PackedWeights.describe(*folders).layout.dtypes[0]
    return sm.PackedWeights.from_folders(*folders, dtype=dtype, **settings)


def test_factors_are_the_task_vectors(folders):
    dense, factored = pack(folders), pack(folders, task_vector_dtype="lora")
    assert factored.layout == dense.layout and torch.equal(factored.base, dense.base)
    whole = factored.in_memory()
    assert isinstance(factored.task_vectors, FactoredTaskVectors) and factored.task_vector_form == "lora"
    assert whole.task_vectors.shape == factored.task_vectors.shape == dense.task_vectors.shape
    # Rounded to the base plus the product in the dense ones.
    tolerance = torch.finfo(torch.float32).eps * (dense.base.abs() + dense.task_vectors.abs()).max()
    assert (whole.task_vectors - dense.task_vectors).abs().max() <= 2 * tolerance
    assert factored.task_vectors.nbytes < dense.task_vectors.nbytes / 3
    coefficients = torch.rand(2, dense.layout.num_layers, dtype=dense.coefficient_dtype)
    assert (factored.merge(coefficients) - dense.merge(coefficients)).abs().max() <= 4 * tolerance
    merged = dense.state_dict(dense.merge(coefficients))
    one_by_one = dict(factored.tensors(coefficients))
    assert one_by_one.keys() == merged.keys()
    for name, tensor in one_by_one.items():
        assert (tensor - merged[name]).abs().max() <= 4 * tolerance, name


def test_any_piece_is_that_of_the_whole(folders):
    factors = pack(folders, task_vector_dtype="lora").task_vectors
    whole, blocks = in_memory(factors, "cpu"), factors.shape[1] // 1024
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        start = int(torch.randint(blocks, (), generator=generator))
        length = 1024 * int(torch.randint(1, blocks - start + 1, (), generator=generator))
        piece = torch.full((2, length + 1024), torch.nan, dtype=whole.dtype)
        factors.read_into(1024 * start, length, piece)
        torch.testing.assert_close(piece[:, :length], whole[:, 1024 * start : 1024 * start + length], rtol=1e-6, atol=1e-7)
        assert piece[:, length:].isnan().all()


def test_a_rank_multiplies_out_its_own_numbers_alone(folders):
    packed = pack(folders, task_vector_dtype="lora")
    whole = in_memory(packed.task_vectors, "cpu")
    for rank in range(3):
        shards = Shards(packed.layout, Ranks(None, rank, 3))
        own = in_memory(shards.own(packed.task_vectors), "cpu")
        torch.testing.assert_close(own, shards.own(whole), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("piece", [1024, None])
def test_a_learned_merge_takes_the_same_path(folders, piece):
    """In fp32 both are off by what a network makes of roundings: factors must not be further from the truth than twice as far."""

    def path(weights, store=None):
        module = lora_experts.module(dtype=weights.base.dtype)
        return streaming.path_of_gradients(module, weights, store).double()

    factored = pack(folders, task_vector_dtype="lora")
    dense, pieces = path(factored.in_memory()), path(factored, factored.store(piece=piece))
    if factored.base.dtype == torch.float64:
        torch.testing.assert_close(pieces, dense, rtol=1e-10, atol=1e-10)
    else:
        wide = sm.PackedWeights.from_folders(*folders, dtype=torch.float64, task_vector_dtype="lora")
        truth = path(wide.in_memory())
        assert (pieces - truth).norm() <= 2 * (dense - truth).norm()


def test_a_budget_that_dense_task_vectors_exceed_is_met(folders):
    factored = pack(folders, task_vector_dtype="lora")
    module, batches = lora_experts.module(dtype=factored.base.dtype), streaming.make_batches()
    ways = plan(module, factored, batches, streaming.logits, sm.SAMergingConfig()).ways
    assert {way.store for way in ways} == {"device", "factors", "file"} and all(way.streamed for way in ways[1:])
    least = min((way for way in ways if way.store == "factors"), key=lambda way: way.device_bytes)
    assert "streamed from LoRA factors" in least.name

    def learned(**how):
        config = sm.SAMergingConfig(progress=False, steps=3, learning_rate=1e-3, **how)
        return sm.samerging(copy.deepcopy(module), factored, batches, streaming.logits, config=config).coefficients

    results = [learned(memory_budget=2 * least.device_bytes), learned(streamed=True), learned(streamed=False)]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("piece", [1024, None])
def test_a_base_in_a_packed_file_goes_with_factors_in_memory(folders, tmp_path, piece):
    in_memory, file = pack(folders, task_vector_dtype="lora"), tmp_path / "packed"
    for packed in (pack(folders, task_vector_dtype="lora", file=file), sm.PackedWeights.open(file)):
        assert isinstance(packed.base, FileNumbers) and packed.layout == in_memory.layout
        assert packed.task_vector_form == "lora" and not packed.experts
        assert packed.task_vectors.nbytes == in_memory.task_vectors.nbytes
        for layer, of_tasks in in_memory.task_vectors.changes.items():
            for change, found in zip(of_tasks, packed.task_vectors.changes[layer], strict=True):
                assert (change is None) == (found is None)
                torch.testing.assert_close(found, change, rtol=0, atol=0)
        paths = [
            streaming.path_of_gradients(lora_experts.module(dtype=packed.base.dtype), weights, weights.store(piece=piece))
            for weights in (packed, in_memory)
        ]
        assert torch.equal(*paths)
    kept = packed.in_memory(keep_factors=True)
    assert torch.equal(kept.base, in_memory.base) and isinstance(kept.task_vectors, FactoredTaskVectors)
    assert torch.equal(packed.in_memory().task_vectors, in_memory.in_memory().task_vectors)


def test_a_budget_that_the_base_exceeds_is_met_from_a_packed_file(folders, tmp_path):
    """The base's bytes are what the ways differ in."""
    in_memory, in_file = (pack(folders, task_vector_dtype="lora", file=file) for file in (None, tmp_path / "packed"))
    module, batches = lora_experts.module(dtype=in_memory.base.dtype), streaming.make_batches()

    def planned(packed):
        return plan(copy.deepcopy(module), packed, batches, streaming.logits, sm.SAMergingConfig())

    found = planned(in_file)
    from_file, from_factors = ([way for way in found.ways if way.store == store] for store in ("file", "factors"))
    for file, factors in zip(from_file, from_factors, strict=True):
        assert file.piece == factors.piece and factors.device_bytes - file.device_bytes == in_memory.base.nbytes
        assert file.moved % in_memory.base.dtype.itemsize == 0 < file.moved and not factors.moved
    assert found.choose(from_file[0].device_bytes) == from_file[0]
    with pytest.raises(MemoryBudgetError, match="would: keep the weights in a packed file"):
        of_memory = planned(in_memory)
        of_memory.choose(min(way.device_bytes for way in of_memory.ways))
    held = from_factors[0].make(copy.deepcopy(module), in_file, 0.3, in_memory.base.device).packed
    assert torch.equal(held.base, in_memory.base) and held.task_vector_form == "lora"
    config = sm.SAMergingConfig(progress=False, steps=2, learning_rate=1e-3, streamed=True)
    results = [
        sm.samerging(copy.deepcopy(module), packed, batches, streaming.logits, config=config).coefficients
        for packed in (in_file, in_memory)
    ]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_what_cannot_be_kept_as_factors_is_said(folders):
    base, experts = folders
    with pytest.raises(ValueError, match=r"expert 'whole' .* is no LoRA adapter, and task_vector_dtype='lora' keeps factors"):
        pack((base, {**experts, "whole": base}), task_vector_dtype="lora")
    with pytest.raises(TypeError, match=r"these weights are kept as LoRA factors; .* takes packed.in_memory\(\)"):
        sm.layer_stats(pack(folders, task_vector_dtype="lora"))


def test_the_components_of_an_adapter_are_as_many_as_its_rank(folders):
    """With a coefficient for each of them nothing is left of a matrix; a coefficient of 1 gives the adapter's product."""
    whole = pack(folders, task_vector_dtype="lora").in_memory()
    components = Components.of(whole, lora_experts.RANK)
    assert set(components.ranks.values()) == {lora_experts.RANK}
    for row in range(whole.num_tasks):
        changes = whole.layout.views(whole.task_vectors[row])
        for name, (left, right) in components.factors.items():
            of_task = slice(lora_experts.RANK * row, lora_experts.RANK * (row + 1))
            product = left[:, of_task] @ right[:, of_task].mT
            assert (product - changes[name]).norm() <= 1e-5 * changes[name].norm(), name
