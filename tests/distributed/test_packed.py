"""Packed weights spread over ranks: merged and contracted by all of them together, as one process does it alone."""

import functools

import pytest
import torch
import worlds
from helpers import assert_alike
from streaming import make, make_packed

import samerge_ext as sm
from samerge_ext.packing import spread_merge
from samerge_ext.packing.components import Components
from samerge_ext.packing.ranks import Ranks

FORMS = [torch.float64, torch.float32, torch.bfloat16, "int8", "int4-residual"]


@functools.cache
def packed(form):
    torch.manual_seed(0)
    dtype = torch.float64 if form == torch.float64 else torch.float32
    return make_packed(make(dtype=dtype, width=64, vocabulary=205), task_vector_dtype=form)


def numbers(weights, rank):
    """Coefficients [T, L] and a gradient [N] of a rank; the coefficients of rank 0 stand for all."""
    generator = torch.Generator().manual_seed(rank)
    coefficients = torch.rand(weights.num_tasks, weights.layout.num_layers, generator=generator, dtype=torch.float64)
    gradient = torch.randn(weights.layout.numel, generator=generator, dtype=torch.float64)
    return coefficients.to(weights.coefficient_dtype), gradient.to(weights.base.dtype)


def together(form, at_once):
    """What a rank finds: merged [N] at the λ of all and at its own, the gradient [T, L], all tensors, and the bytes of its share.

    at_once: numbers that are gathered at a time.
    """
    spread_merge.AT_ONCE = at_once
    share = packed(form).shard()
    coefficients, gradient = numbers(share, share.ranks.rank)
    alike, _ = numbers(share, 0)
    return {
        "merged": share.merge(alike),
        "own": share.merge(coefficients),
        "gradient": share.contract(gradient),
        "tensors": dict(share.tensors(alike)),
        "nbytes": share.base.nbytes + share.task_vectors.nbytes,
    }


@pytest.fixture(scope="module", params=[1, 3, 4])
def world(request, tmp_path_factory):
    """(W, form -> what every rank finds)."""
    return request.param, worlds.run(all_forms, request.param, tmp_path_factory.mktemp("world") / "ranks")


def all_forms():
    return {form: together(form, at_once) for form, at_once in zip(FORMS, (1024, 5000, 1 << 24, 3000, 20_000), strict=True)}


@pytest.mark.parametrize("form", FORMS)
def test_ranks_merge_together_as_one_alone_does(world, form):
    size, found = world
    alone = packed(form)
    for rank in range(size):
        ours, (coefficients, _) = found[rank][form], numbers(alone, rank)
        assert torch.equal(ours["merged"], alone.merge(numbers(alone, 0)[0])), "each number is merged by one rank"
        assert torch.equal(ours["own"], alone.merge(coefficients)), "at coefficients of its own"
        expected = dict(alone.tensors(numbers(alone, 0)[0]))
        assert ours["tensors"].keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in ours["tensors"].items())


@pytest.mark.parametrize("form", FORMS)
def test_their_gradients_are_added_up_and_contracted(world, form):
    size, found = world
    alone = packed(form)
    total = sum(numbers(alone, rank)[1] for rank in range(size))
    for rank in range(size):
        assert_alike(found[rank][form]["gradient"], alone.contract(total), "∂loss/∂λ")
        assert torch.equal(found[rank][form]["gradient"], found[0][form]["gradient"])


@pytest.mark.parametrize("form", FORMS)
def test_a_share_is_a_part_of_the_whole(world, form):
    size, found = world
    alone = packed(form)
    whole = alone.base.nbytes + alone.task_vectors.nbytes
    shares = [of_rank[form]["nbytes"] for of_rank in found]
    assert sum(shares) == whole
    assert all(abs(share * size / whole - 1) < 0.05 for share in shares)


def refused():
    """The messages of what is refused on a rank, or what it gives where it is not."""
    weights = packed(torch.float32)
    share = weights.shard()
    others = make_packed(make(dtype=torch.float32), tasks=("red", "green") if share.ranks.rank else ("red", "blue"))
    attempts = [
        others.shard,
        share.shard,
        lambda: Ranks.of(None, torch.device("xpu")),
        lambda: sm.ties(share),
        lambda: share.in_memory().task_vectors[0],
        lambda: sm.layer_stats(share),
        lambda: Components.of(share, 2),
    ]
    return [message_of(attempt) for attempt in attempts]


def message_of(attempt):
    try:
        return repr(attempt())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def test_what_cannot_be_done_with_a_share_is_said(tmp_path):
    for found in worlds.run(refused, 2, tmp_path / "world"):
        others, twice, elsewhere, *whole = found
        assert others == "ValueError: tasks, layers or dtypes are others on ranks [1] than on rank 0; give all ranks the same"
        assert twice.startswith("ValueError: these weights are spread over 2 ranks already")
        assert elsewhere.startswith("ValueError: the weights are on xpu, from where the process group (cpu:gloo")
        for message in whole:
            assert message.startswith("TypeError: these weights are spread over 2 ranks; what needs them whole is given those")


def disagreeing():
    """Every rank waits for what the others do not send."""
    ranks = Ranks.of(None, torch.device("cpu"))
    if ranks.rank == 1:
        raise SystemExit(0)
    return message_of(lambda: ranks.sum(torch.zeros(3)))


def test_a_rank_that_is_gone_is_an_error_on_the_others(tmp_path):
    started = worlds.begin(disagreeing, 3, tmp_path / "world")
    worlds.end(started)
    for rank in (0, 2):
        message = torch.load(tmp_path / "world" / f"rank{rank}.pt", weights_only=False)
        assert message.startswith(f"LostRankError: rank {rank} of 3 waits for the others, and one of them has ended")
