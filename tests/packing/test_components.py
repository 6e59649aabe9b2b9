"""The leading singular components of task vectors, against torch's whole decomposition."""

import pytest
import tiny
import torch
from helpers import COMPONENTS_SHARE, SIGMA_TOLERANCE, assert_close, random_normal

import samerge_ext as sm
from samerge_ext.packing.components import RTOL, Components


def of_matrix(matrix, rank):
    """left [m, k] and right [n, k] of a matrix that is one expert's whole task vector."""
    base = {"w": torch.zeros_like(matrix)}
    packed = sm.PackedWeights.from_state_dicts(base, {"only": {"w": matrix}}, dtype=matrix.dtype)
    components = Components.of(packed, rank)
    assert components.ranks == {"w": min(rank, *matrix.shape)} and components.columns == components.ranks["w"]
    return components.factors["w"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(200, 180), (180, 200), (9, 4), (1, 6)])
def test_components_hold_what_those_of_the_whole_decomposition_do(dtype, shape):
    """Of random numbers, whose singular values lie close: the hardest to find."""
    (matrix,) = random_normal(shape, seed=1, dtype=dtype)
    left, right = of_matrix(matrix, 5)
    truth = torch.linalg.svdvals(matrix.double())[:5]
    assert left.dtype == right.dtype == dtype
    assert_close(left.mT @ left, torch.eye(len(truth), dtype=dtype))
    held = (left.mT @ matrix).norm().item() / truth.norm().item()
    assert COMPONENTS_SHARE < held < 1 + SIGMA_TOLERANCE
    assert ((matrix.mT @ left - right).norm(dim=0) <= RTOL * right.norm(dim=0)).all()


def test_a_matrix_that_a_task_does_not_change_has_components_of_no_length():
    base = {"w": torch.zeros(6, 4), "bias": torch.zeros(3)}
    experts = {"none": {**base, "bias": torch.ones(3)}, "all": {**base, "w": torch.ones(6, 4)}}
    left, right = Components.of(sm.PackedWeights.from_state_dicts(base, experts, dtype=torch.float32), 3).factors["w"]
    assert not left[:, :3].any() and not right[:, :3].any()
    assert_close(left[:, 3:] @ right[:, 3:].mT, torch.ones(6, 4))


def test_every_matrix_of_the_layout_has_its_own():
    """Tensors of one dimension and unchanged ones have none; what is merged at d is the sum of the equation."""
    base = tiny.make(0)
    experts = tiny.make_experts(base)
    packed = sm.PackedWeights.from_modules(base, experts, dtype=torch.float64)
    components = Components.of(packed, 3)
    assert components.ranks == {"first.weight": 3, "second.weight": 3} and components.columns == 6
    torch.manual_seed(0)
    deviations = torch.randn(3, 6, dtype=torch.float64)
    merged = packed.merge(packed.coefficients(0.3))
    views = packed.layout.views(merged)
    expected = {name: view.clone() for name, view in views.items()}
    for row, expert in enumerate(experts.values()):
        for column, name in ((0, "first.weight"), (3, "second.weight")):
            u, s, vh = torch.linalg.svd(expert.get_parameter(name).detach() - base.get_parameter(name).detach())
            for r in range(3):
                expected[name] += deviations[row, column + r] * s[r] * torch.outer(u[:, r], vh[r])
    for name, of_layer in components.split(torch.cat([packed.coefficients(0.3), deviations], 1)).items():
        components.add(name, of_layer, views[name])
    for name, tensor in expected.items():
        assert (views[name] - tensor).norm() < 1e-12 * tensor.norm(), name


def test_quantised_task_vectors_have_components_too():
    base = tiny.make(0, torch.float32)
    experts = tiny.make_experts(base)
    packed = sm.PackedWeights.from_modules(base, experts, task_vector_dtype="int8")
    left, right = Components.of(packed, 8).factors["first.weight"]
    for row, expert in enumerate(experts.values()):
        of_task = left[:, 8 * row : 8 * row + 8] @ right[:, 8 * row : 8 * row + 8].mT
        difference = expert.first.weight - base.first.weight - of_task
        assert 0 < difference.norm() < 0.02 * of_task.norm()
