"""The leading singular components of task vectors, against torch's whole decomposition."""

import pytest
import tiny
import torch
from helpers import SIGMA_TOLERANCE, assert_close

import samerge_ext as sm
from samerge_ext.ops.singular import leading_components
from samerge_ext.packing.components import Components


def spectrum(m, n, decay, dtype=torch.float64):
    torch.manual_seed(1)
    u, v = torch.linalg.qr(torch.randn(m, n, dtype=torch.float64)).Q, torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q
    return ((u * decay ** torch.arange(n, dtype=torch.float64)) @ v.mT).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("decay", [0.7, 0.97])
def test_components_are_those_of_the_whole_decomposition(dtype, transposed, decay):
    matrix = spectrum(120, 60, decay, dtype)
    matrix = matrix.mT if transposed else matrix
    left, right = leading_components(matrix, 5)
    truth = torch.linalg.svdvals(matrix.double())
    assert left.shape == (matrix.shape[0], 5) and right.shape == (matrix.shape[1], 5)
    assert ((right.double().norm(dim=0) - truth[:5]).abs() / truth[:5]).max() < SIGMA_TOLERANCE
    assert_close(left.mT @ left, torch.eye(5, dtype=torch.float64))
    rest = (matrix.double() - left.double() @ right.double().mT).norm()
    assert rest < (1 + SIGMA_TOLERANCE) * truth[5:].norm(), "as near as rank 5 can be"


def test_a_matrix_without_so_many_components_is_whole():
    for matrix in (spectrum(9, 4, 0.9), torch.zeros(5, 3, dtype=torch.float64), torch.ones(1, 6, dtype=torch.float64)):
        left, right = leading_components(matrix, 16)
        assert left.shape[1] == min(matrix.shape)
        assert_close(left @ right.mT, matrix, at_least=1e-2)


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
