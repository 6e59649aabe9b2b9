"""Which numbers are whose where weights are spread over ranks: no process group is needed to say so."""

import pytest
import torch
from streaming import make, make_packed, packed_twice

from samerge_ext.packing.layout import BLOCK, Layout
from samerge_ext.packing.ranks import Ranks
from samerge_ext.packing.shards import OwnPieces, Shards

WORLDS = [1, 2, 3, 4, 7]
SIZES = [5000, 3, 1024, 70_000, 0, 1025, 40, 9000, 1, 2048]  # numbers of layers; the third is not packed


def layout(sizes=SIZES):
    shapes = [torch.Size([size]) for size in sizes]
    packed = [place != 2 for place in range(len(sizes))]
    return Layout.build([f"layer{i}" for i in range(len(sizes))], shapes, [torch.float32] * len(sizes), packed)


def shards(of, size):
    return [Shards(of, Ranks(None, rank, size)) for rank in range(size)]


@pytest.mark.parametrize("size", WORLDS)
def test_every_number_is_one_rank_s(size):
    whole = layout()
    found = [place for each in shards(whole, size) for first, _, count in each.ranges(0, each.numel)
             for place in range(first, first + count)]  # fmt: skip
    assert sorted(found) == list(range(whole.numel))
    for each in shards(whole, size):
        blocks = [whole.block_layer[first // BLOCK : (first + count) // BLOCK] for first, _, count in each.ranges(0, each.numel)]
        assert torch.equal(torch.cat(blocks), each.block_layer)


@pytest.mark.parametrize("size", WORLDS)
def test_a_rank_has_a_contiguous_part_of_every_layer(size):
    whole = layout()
    for each in shards(whole, size):
        for layer in (layer for layer, offset in enumerate(whole.offsets) if offset is not None):
            ranges = list(each.ranges(*each.extent(layer)))
            assert len(ranges) == (each.extent(layer)[1] > 0)
            for first, place, count in ranges:
                start, length = whole.extent(layer)
                assert place == 0 and start <= first and first + count <= start + length


@pytest.mark.parametrize("size", WORLDS)
def test_layers_side_by_side_are_dealt_evenly(size):
    """To a block, which is why stores are a W-th of the whole and parts that are sent hardly padded."""
    whole = layout()
    everyone = shards(whole, size)
    for first in range(whole.num_layers):
        for end in range(first + 1, whole.num_layers + 1):
            counts = [sum(each.extent(layer)[1] for layer in range(first, end)) for each in everyone]
            assert max(counts) - min(counts) <= BLOCK
            assert everyone[0].most(range(first, end)) == max(counts)


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("layers", [(0, 1, 3), (5,), (1, 7, 8, 9), (3, 4, 6)])
def test_the_ranks_parts_put_in_order_are_the_layers(size, layers):
    whole = layout()
    flat = torch.arange(whole.numel)
    everyone = shards(whole, size)
    parts_of_ranks = torch.full((size, everyone[0].most(layers)), -1)
    for each, part in zip(everyone, parts_of_ranks, strict=True):
        own = each.own(flat)
        mine = torch.cat([own[start : start + length] for start, length in map(each.extent, layers)])
        part[: len(mine)] = mine
    found = parts_of_ranks.view(-1, BLOCK)[everyone[0].order(layers, flat.device)].flatten()
    assert torch.equal(found, torch.cat([flat[start : start + length] for start, length in map(whole.extent, layers)]))


@pytest.mark.parametrize("form", [torch.float32, torch.bfloat16, "int8", "int4", "int4-residual"])
def test_own_numbers_are_those_of_the_whole(form):
    packed = make_packed(make(dtype=torch.float32, width=24, vocabulary=200), task_vector_dtype=form)
    whole = torch.stack(list(packed.task_vectors))
    for each in shards(packed.layout, 3):
        own = each.own(packed.task_vectors)
        rows = torch.stack(list(own))
        for first, place, count in each.ranges(0, each.numel):
            assert torch.equal(rows[:, place : place + count], whole[:, first : first + count])
        assert own.nbytes == packed.task_vectors.nbytes * each.numel // packed.layout.numel


def test_a_packed_file_is_read_where_own_numbers_are(tmp_path, monkeypatch):
    memory, in_file = packed_twice(tmp_path, make(width=24, vocabulary=200))
    read, read_into = [], in_file.base.file.read_into

    def counted(body, start, out):
        read.append(out.numel())
        read_into(body, start, out)

    monkeypatch.setattr(in_file.base.file, "read_into", counted)
    total = 0
    for each in shards(memory.layout, 3):
        for numbers, in_pieces in ((memory.base, in_file.base), (memory.task_vectors, in_file.task_vectors)):
            own = each.own(in_pieces)
            assert isinstance(own, OwnPieces)
            for start in range(0, each.numel, 2 * BLOCK):  # also over the ends of layers
                length = min(2 * BLOCK, each.numel - start)
                piece = own.empty(length, "cpu")
                own.read_into(start, length, piece)
                assert torch.equal(piece, each.own(numbers)[..., start : start + length])
        total += each.numel * (1 + memory.num_tasks)
    assert sum(read) == total == memory.layout.numel * (1 + memory.num_tasks)


def test_without_a_process_group_there_are_no_ranks():
    with pytest.raises(ValueError, match="torch.distributed has no process group here; call .*init_process_group"):
        make_packed(make()).shard()
