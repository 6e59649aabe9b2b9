"""component_sum and component_grad against their equations in fp64."""

import pytest
import torch
from helpers import NARROW, assert_close, random_normal
from torch.library import opcheck

from samerge_ext.ops import component_grad, component_sum

M, N, K = 7, 5, 6


def make(dtype=torch.float64, m=M, n=N, k=K):
    return random_normal((m, k), (n, k), (k,), (m, n), seed=0, dtype=dtype)


def test_the_equations():
    left, right, coefficients, grad = make()
    expected = sum(coefficients[r] * torch.outer(left[:, r], right[:, r]) for r in range(K))
    assert_close(component_sum(left, right, coefficients), expected)
    assert_close(component_grad(grad, left, right), torch.stack([left[:, r] @ grad @ right[:, r] for r in range(K)]))


@pytest.mark.parametrize("shape", [(1, 1, 1), (300, 70, 33), (3, 400, 2), (4, 5, 0), (0, 5, 2)])
@pytest.mark.parametrize("autocast", [False, True])
def test_fp32_at_odd_sizes_and_under_autocast(shape, autocast):
    left, right, coefficients, grad = make(torch.float32, *shape)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, gradient = component_sum(left, right, coefficients), component_grad(grad, left, right)
    doubles = [x.double() for x in (left, right, coefficients)]
    assert found.dtype == gradient.dtype == torch.float32
    assert_close(found, component_sum(*doubles))
    expected = component_grad(grad.double(), *doubles[:2])
    assert_close(gradient, expected, at_least=(grad.norm() * left.norm() * right.norm() / max(1, shape[2])).item())


@pytest.mark.parametrize("dtype", NARROW)
def test_gradients_of_any_float_type(dtype):
    left, right, _, grad = make(torch.float32)
    found = component_grad(grad.to(dtype).mT.contiguous().mT, left, right)
    assert_close(found, component_grad(grad.to(dtype).double(), left.double(), right.double()), at_least=grad.norm().item())


def test_gradients_are_those_of_finite_differences():
    left, right, coefficients, grad = make()
    coefficients.requires_grad_(), grad.requires_grad_()
    assert torch.autograd.gradcheck(lambda c: component_sum(left, right, c).sin(), coefficients)
    assert torch.autograd.gradcheck(lambda g: component_grad(g, left, right).sin(), grad)


def test_the_dispatcher_accepts_them():
    left, right, coefficients, grad = make()
    opcheck(torch.ops.samerge.component_sum, (left, right, coefficients.requires_grad_()))
    opcheck(torch.ops.samerge.component_grad, (grad.requires_grad_(), left, right))
    torch.compile(lambda c: component_sum(left, right, c).sum(), fullgraph=True, backend="aot_eager")(coefficients).backward()
    assert_close(coefficients.grad, component_grad(torch.ones(M, N, dtype=torch.float64), left, right))


def test_what_does_not_fit_is_refused():
    left, right, coefficients, grad = make()
    for arguments, message in (
        ((left, right[:, :3], coefficients), r"right has shape \[5, 3\]"),
        ((left, right, coefficients[:2]), r"coefficients has shape \[2\]; .* it must be \[6\]"),
        ((left.clone().requires_grad_(), right, coefficients), "left requires grad"),
    ):
        with pytest.raises(ValueError, match=message):
            component_sum(*arguments)
    with pytest.raises(ValueError, match=r"grad has shape \[5, 7\]; with these factors it must be \[7, 5\]"):
        component_grad(grad.mT, left, right)
    with pytest.raises(TypeError, match="float64 does not mix"):
        component_grad(grad.float(), left, right)
    with pytest.raises(TypeError, match="left is torch.float16; both factors must be float32"):
        component_sum(left.half(), right.half(), coefficients.half())
