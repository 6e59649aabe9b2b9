"""Consensus merging against its definition, number by number."""

import pytest
import torch
from folders import read_all
from helpers import assert_close
from merges import TASKS, write
from tiny import make_problem

import samerge_ext as sm
from samerge_ext.elementwise.file_merge import merge_files
from samerge_ext.recipes.data_free import file_merge


def literal(base, taus, scale, mask_lambda, agreeing):  # lists of numbers -> a list
    merged = []
    for i, number in enumerate(base):
        total = sum(tau[i] for tau in taus)
        wanted = sum(abs(tau[i]) > mask_lambda * abs(total - tau[i]) for tau in taus)
        merged.append(number + (scale * total if wanted >= agreeing else 0.0))
    return merged


@pytest.mark.parametrize("agreeing", [0, 1, 2, 3])
@pytest.mark.parametrize("mask_lambda", [0.0, 0.4, 1.0, 3.0])
def test_numbers_that_enough_tasks_want_are_kept(mask_lambda, agreeing):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(2001, generator=generator, dtype=torch.float64)
    taus = torch.randn(3, 2001, generator=generator, dtype=torch.float64) * (torch.rand(3, 2001, generator=generator) < 0.7)
    packed = sm.PackedWeights.from_state_dicts(
        {"w": base}, {f"t{i}": {"w": base + t} for i, t in enumerate(taus)}, dtype=torch.float64
    )
    stored = packed.layout.views(packed.base)["w"].tolist(), [packed.layout.views(t)["w"].tolist() for t in packed.task_vectors]
    merged = sm.consensus(packed, 0.7, mask_lambda=mask_lambda, agreeing=agreeing).state_dict()["w"]
    expected = torch.tensor(literal(*stored, 0.7, mask_lambda, agreeing), dtype=torch.float64)
    assert torch.equal(merged != base, expected != base)
    torch.testing.assert_close(merged, expected, rtol=1e-14, atol=1e-14)


def test_files_give_what_packed_weights_give(tmp_path):
    models = write(tmp_path, dtype=torch.float32)
    parameters = {"lambda": 0.7, "mask_lambda": 0.9, "agreeing": 1}
    experts = [(task, models / task, {}) for task in TASKS]
    found = read_all(merge_files(file_merge("consensus", experts, models / "base", parameters, identity={}), tmp_path / "out"))
    packed = sm.PackedWeights.from_folders(models / "base", {task: models / task for task in TASKS})
    expected = sm.consensus(packed, 0.7, mask_lambda=0.9, agreeing=1).state_dict()
    for name, tensor in found.items():
        assert_close(tensor, expected[name].double(), name)


def test_more_tasks_than_there_are_cannot_agree(tmp_path):
    models = write(tmp_path)
    experts = [(task, models / task, {}) for task in TASKS]
    with pytest.raises(ValueError, match="agreeing=3 of 2 tasks"):
        merge_files(file_merge("consensus", experts, models / "base", {"agreeing": 3}, identity={}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_makes_no_sense_is_refused():
    packed = make_problem()[2]
    for settings, message in (
        ({"mask_lambda": -0.1}, "mask_lambda=-0.1"),
        ({"agreeing": 9}, "agreeing=9 of"),
        ({"scale": float("inf")}, "scale=inf"),
    ):
        with pytest.raises(ValueError, match=message):
            sm.consensus(packed, **settings)
