"""Matrices that are stacked in one tensor, a mixture's experts or equal layers, are merged as if each were one of its own."""

import pytest
import torch
from folders import read_all
from helpers import assert_close

import samerge_ext as sm
from samerge_ext.checkpoints.saving import save_checkpoint
from samerge_ext.elementwise import file_pieces
from samerge_ext.elementwise.file_merge import merge_files
from samerge_ext.packing.matrices import stack_of
from samerge_ext.recipes.data_free import file_merge

# By the name of what is stacked: what is left of one, and how many there are.
STACKS = {
    "mlp.experts.gate_up_proj": ((6, 4), 3),  # transformers' Mixtral, gpt-oss, Llama 4
    "mlp.experts.gate_up_proj_bias": ((6,), 3),
    "block_sparse_moe.input_linear.weight": ((4, 5), 2),  # Granite
    "decoder.layers.mlp.linear_fc1.weight": ((7, 3), 2),  # Megatron-LM
    "decoder.layers.mlp.linear_fc1.bias": ((7,), 2),
}
ALONE = {"mlp.experts.0.weight": (4, 3), "block_sparse_moe.gate.weight": (3, 4), "conv.weight": (4, 2, 3), "layers.0.w": (3, 2)}
METHODS = {
    "wudi": sm.wudi,
    "preconditioned": lambda packed: sm.task_arithmetic(sm.preconditioned(packed), 1.0),
    "tsv_m": sm.tsv_m,
    "iso_c": sm.iso_c,
    "knots": lambda packed: sm.knots(packed, density=1.0),
    "boosted": sm.subspace_boosting,
}


def models(tasks=3, times=1):
    """Base and experts, stacked; and the same with every part as a tensor of its own. times: as wide and as high."""
    generator = torch.Generator().manual_seed(0)
    larger = lambda shape: tuple(times * size for size in shape)
    shapes = {name: (count, *larger(shape)) for name, (shape, count) in STACKS.items()} | ALONE
    drawn = lambda: {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    stacked = [drawn() for _ in range(1 + tasks)]
    return stacked, [apart(model) for model in stacked]


def apart(model):
    """Parts are named as nothing that is stacked."""
    parts = {f"{name}/{i}".replace(".", "_"): part for name in STACKS for i, part in enumerate(model[name])}
    return {name: model[name] for name in ALONE} | parts


def packed_of(models):
    return sm.PackedWeights.from_state_dicts(
        models[0], {f"task{t}": expert for t, expert in enumerate(models[1:])}, dtype=torch.float64
    )


@pytest.mark.parametrize("method", METHODS)
def test_every_part_is_merged_by_itself(method):
    stacked, parts = models()
    found = METHODS[method](packed_of(stacked)).state_dict()
    expected = METHODS[method](packed_of(parts)).state_dict()
    for name, tensor in apart(found).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_files_are_merged_so_too(tmp_path, monkeypatch):
    """In pieces of some rows, and from buffers that hold less than a stack."""
    monkeypatch.setattr(file_pieces, "ALIGNMENT", 1024)
    monkeypatch.setitem(file_pieces.BUFFER_BYTES, "cpu", 1)
    stacked, _ = models(times=20)
    base, *experts = (save_checkpoint(tmp_path / f"model{i}", model) for i, model in enumerate(stacked))
    given = [(f"task{t}", expert, {}) for t, expert in enumerate(experts)]
    merge_files(file_merge("wudi", given, base, {}, identity={}), tmp_path / "out")
    expected = sm.wudi(packed_of(stacked)).state_dict()
    for name, tensor in read_all(tmp_path / "out").items():
        assert_close(tensor, expected[name], name)


@pytest.mark.parametrize("name", [*STACKS, *ALONE])
def test_what_is_a_stack(name):
    shape, count = STACKS.get(name, (ALONE.get(name), 1))
    whole = (count, *shape) if name in STACKS else shape
    assert stack_of(name, torch.Size(whole)) == (count, torch.Size(shape))


def test_layers_of_experts_and_stacks_of_nothing():
    name, shape = "decoder.layers.mlp.experts.linear_fc1.weight", torch.Size([2, 3, 4, 5])
    assert stack_of(name, shape) == (6, torch.Size([4, 5]))
    assert stack_of("encoder.layers.conv1.weight", torch.Size([4, 3, 3])) == (1, torch.Size([4, 3, 3]))
    assert stack_of("mlp.experts.w1", torch.Size([0, 4, 3])) == (1, torch.Size([0, 4, 3]))
