"""MergedModel: the module's parameters are views of the merged weights, its gradients of the gradient buffer."""

import literal
import pytest
import tiny
import torch
from torch.func import functional_call

import samerge_ext as sm


@pytest.fixture
def packed():
    base = tiny.make(0)
    return sm.PackedWeights.from_modules(base, tiny.make_experts(base), dtype=torch.float64)


def test_forward_is_the_model_at_the_merged_weights(packed):
    base = tiny.make(0)
    experts = tiny.make_experts(base)
    coefficients = torch.rand(3, packed.layout.num_layers, dtype=torch.float64)
    model = sm.MergedModel(tiny.make(1), packed, coefficients)
    x = torch.randn(5, tiny.WIDTH, dtype=torch.float64)
    weights = {**literal.merged_parameters(base, experts, coefficients), **literal.averaged_buffers(base, experts)}
    torch.testing.assert_close(model(x), functional_call(base, weights, x))


def test_gradient_of_the_coefficients_is_the_one_through_the_merge(packed):
    base = tiny.make(0)
    experts = tiny.make_experts(base)
    coefficients = torch.rand(3, packed.layout.num_layers, dtype=torch.float64, requires_grad=True)
    model = sm.MergedModel(tiny.make(1), packed, coefficients.detach())
    x = torch.randn(5, tiny.WIDTH, dtype=torch.float64)
    weights = {**literal.merged_parameters(base, experts, coefficients), **literal.averaged_buffers(base, experts)}
    functional_call(base, weights, x).square().sum().backward()
    model.zero_gradients()
    model(x).square().sum().backward()
    model.contract()
    model.contract()  # adds up
    torch.testing.assert_close(model.coefficients.grad, 2 * coefficients.grad)


def test_the_module_is_the_users_own(packed):
    module = tiny.make(1)
    seen = []
    module.second.register_forward_hook(lambda *_: seen.append("hook"))
    model = sm.MergedModel(module, packed)
    model(torch.randn(2, tiny.WIDTH, dtype=torch.float64))
    assert model.module is module
    assert seen == ["hook"]
    assert module.tied.weight is module.first.weight, "a tied pair stays one parameter"
    assert module.first.weight.untyped_storage().data_ptr() == model.merged.untyped_storage().data_ptr()
    assert not module.frozen.weight.requires_grad, "a layer that no expert changed needs no gradient"


def test_a_merge_between_forward_and_backward_is_an_error(packed):
    model = sm.MergedModel(tiny.make(1), packed)
    loss = model(torch.randn(2, tiny.WIDTH, dtype=torch.float64)).square().sum()
    model.merge(packed.coefficients(0.5))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_replaced_gradients_are_an_error(packed):
    model = sm.MergedModel(tiny.make(1), packed)
    model.zero_gradients()
    model.module.zero_grad()
    model(torch.randn(2, tiny.WIDTH, dtype=torch.float64)).sum().backward()
    with pytest.raises(RuntimeError, match="'first.weight'.grad was replaced"):
        model.contract()


def test_a_teacher_is_the_expert_with_its_own_statistics(packed):
    experts = tiny.make_experts(tiny.make(0))
    model = sm.MergedModel(tiny.make(1), packed)
    x = torch.randn(5, tiny.WIDTH, dtype=torch.float64)
    before = model(x)
    for task, expert in experts.items():
        with model.teacher(task) as module:
            torch.testing.assert_close(module(x), expert(x))
    assert torch.equal(model(x), before), "after the teachers the model is merged as it was"


def test_it_runs_under_torch_compile(packed):
    model = sm.MergedModel(tiny.make(1), packed)
    x = torch.randn(5, tiny.WIDTH, dtype=torch.float64)
    compiled = torch.compile(model.module, backend="aot_eager", fullgraph=True)
    for scale in (0.1, 0.7):
        model.merge(packed.coefficients(scale))
        gradients = []
        for run in (model.module, compiled):
            model.zero_gradients()
            run(x).square().sum().backward()
            gradients.append(model.coefficient_gradient())
        torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merged_weights_of_another_dtype(dtype):
    base = tiny.make(0, torch.float32)
    packed = sm.PackedWeights.from_modules(base, tiny.make_experts(base))
    model = sm.MergedModel(tiny.make(1, torch.float32), packed, dtype=dtype)
    assert model.module.second.weight.dtype == dtype
    expected = packed.layout.views(packed.merge(model.coefficients.detach()))["second.weight"]
    assert torch.equal(model.module.second.weight, expected.to(dtype))


def test_a_module_of_another_architecture_is_an_error(packed):
    class Wider(tiny.Encoder):
        def __init__(self):
            super().__init__()
            self.extra = torch.nn.Linear(2, 2)

    with pytest.raises(ValueError, match=r"'extra.weight' \[2, 2\] is not among the packed layers"):
        sm.MergedModel(Wider(), packed)
    module = tiny.make(1)
    module.second = torch.nn.Linear(tiny.WIDTH, 3)
    with pytest.raises(ValueError, match=r"'second.weight' is \[3, 8\], the packed layer is \[16, 8\]"):
        sm.MergedModel(module, packed)
    del module.second
    with pytest.raises(ValueError, match=r"'second.weight' \[16, 8\] has no parameter of that name"):
        sm.MergedModel(module, packed)
