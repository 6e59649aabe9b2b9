"""The SAM perturbation, and the proof that the second gradient sees perturbed weights."""

import pytest
import tiny
import torch

import samerge_ext as sm
from samerge_ext.learning.sam import perturbation, sam_gradient


def test_plain_perturbation_has_norm_rho_and_the_gradients_direction():
    gradient = torch.tensor([[3.0, 0.0], [0.0, -4.0]])
    epsilon = perturbation(torch.zeros(2, 2), gradient, rho=0.5)
    torch.testing.assert_close(epsilon, 0.5 * gradient / 5)


def test_adaptive_perturbation_scales_with_the_coefficients():
    gradient, coefficients = torch.tensor([3.0, 4.0]), torch.tensor([2.0, -0.5])
    epsilon = perturbation(coefficients, gradient, rho=0.1, adaptive=True)
    torch.testing.assert_close(epsilon, 0.1 * torch.tensor([12.0, 1.0]) / torch.tensor([6.0, 2.0]).norm())


@pytest.mark.parametrize(("coefficients", "gradient"), [(1.0, 0.0), (0.0, 1.0)])
def test_a_zero_norm_gives_no_perturbation_and_no_nan(coefficients, gradient):
    epsilon = perturbation(torch.full((3,), coefficients), torch.full((3,), gradient), rho=0.07, adaptive=True)
    assert torch.equal(epsilon, torch.zeros(3))


@pytest.mark.parametrize("autocast", [False, True])
def test_the_second_gradient_differs_from_the_first(autocast):
    """Under autocast too, whose cache of cast weights would otherwise survive the second merge."""
    base = tiny.make(0, torch.float32)
    packed = sm.PackedWeights.from_modules(base, tiny.make_experts(base))
    model = sm.MergedModel(tiny.make(1, torch.float32), packed)
    x = torch.randn(4, tiny.WIDTH)

    def gradient_at(coefficients):
        model.merge(coefficients)
        model.zero_gradients()
        loss = model(x).float().square().sum()
        loss.backward()
        return loss.detach(), model.coefficient_gradient()

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        _, first, second = sam_gradient(gradient_at, model.coefficients.detach(), rho=0.5)
    assert (second - first).norm() > 1e-3 * first.norm()
