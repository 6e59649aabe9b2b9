"""How losses of logits are called: reductions, weights, gradients, compilers, errors, and where the gradient is written."""

import pytest
import torch
from helpers import INTERPRETED, NARROW, assert_close, random_normal
from softmax_losses import BETA, LOSSES, OPS, arguments, function_of, logits, run, settings_of, truth
from torch.library import opcheck

import samerge_ext as sm


def test_reductions_and_weights(each_backend):
    student, teacher = logits(6, 30), logits(3, 6, 30, seed=1)
    rows, v = torch.rand(6), torch.tensor([0.2, 0.5, 0.3])
    options = {"row_weights": rows, "teacher_weights": v, "student_temperature": 1.5, "teacher_temperature": 3.0}
    kl, grad = truth(student, teacher, v[:, None].expand(-1, 6), None, rows / 6, "kl", 1.5, 3.0, 0.0)
    expected = {"none": kl * rows, "sum": (kl * rows).sum(), "batchmean": (kl * rows).sum() / 6}
    for reduction, value in expected.items():
        factor = 1 if reduction == "batchmean" else 6
        loss, fused = sm.softmax_kl_with_grad(student, teacher, **options, reduction=reduction)
        assert_close(loss, value, reduction)
        assert_close(fused, grad * factor, reduction)
        leaf = student.clone().requires_grad_()
        (2.5 * sm.softmax_kl(leaf, teacher, **options, reduction=reduction)).sum().backward()
        assert_close(leaf.grad, grad * factor * 2.5, reduction)
    default = sm.softmax_kl(student, teacher)
    assert_close(default, truth(student, teacher, None, None, None, "kl", 2.0, 2.0, 0.0)[0].mean())
    assert_close(sm.softmax_kl(student, teacher, teacher_weights=torch.full((3, 6), 1 / 3)), default.double())
    assert_close(sm.softmax_kl(student, teacher[0]), truth(student, teacher[:1], None, None, None, "kl", 2.0, 2.0, 0.0)[0].mean())


def test_siblings(each_backend):
    student, teacher, rows = logits(6, 30), logits(6, 30, seed=1), torch.rand(6)
    for loss, function, with_grad, inputs, name in (
        ("entropy", sm.entropy, sm.entropy_with_grad, (student,), "temperature"),
        ("cross_entropy", sm.argmax_cross_entropy, sm.argmax_cross_entropy_with_grad, (student, teacher), "student_temperature"),
    ):
        given = (student, None if loss == "entropy" else teacher[None], None, None, rows / 6)
        losses, grad = truth(*given, loss, 1.5, 1.0, 0.0)
        options = {name: 1.5, "row_weights": rows}
        leaf = student.clone().requires_grad_()
        function(leaf, *inputs[1:], **options).backward()
        value, fused = with_grad(*inputs, **options)
        assert_close(value, (losses * rows).mean(), loss)
        assert_close(fused, grad, loss)
        assert_close(leaf.grad, grad, loss)
        assert_close(function(*inputs), truth(*given, loss, 1.0, 1.0, 0.0)[0].mean(), "temperature 1 by default")


@pytest.mark.parametrize("beta", (0.0, 0.25, 1.0))
def test_beta_chooses_the_divergence(each_backend, beta):
    student, teacher = logits(6, 30), logits(2, 6, 30, seed=1)
    losses, grad = truth(student, teacher, None, None, torch.full((6,), 1 / 6), "kl", 1.5, 1.5, beta)
    options = {"student_temperature": 1.5, "teacher_temperature": 1.5, "beta": beta}
    leaf = student.clone().requires_grad_()
    loss = sm.softmax_kl(leaf, teacher, **options)
    loss.backward()
    for value, gradient in ((loss, leaf.grad), sm.softmax_kl_with_grad(student, teacher, **options)):
        assert_close(value, losses.mean())
        assert_close(gradient, grad)


@pytest.mark.parametrize("beta", (2**-30, 1 - 2**-30))
def test_kl_and_reverse_kl_are_the_limits(each_level, beta):
    """Relative to β and 1 − β; sums that are accurate to what they are as a whole would have no digit of it."""
    if each_level == "reference" or INTERPRETED:
        pytest.skip("plain PyTorch does not sum this form, and Triton's interpreter has such a β in fp32")
    student, teacher, scale = logits(4, 1041), logits(1, 4, 1041, seed=1), torch.ones(4)
    found = run(student, teacher, None, None, scale, "kl", 2.0, 1.5, beta)
    limit = truth(student, teacher, None, None, scale, "kl", 2.0, 1.5, float(beta > 0.5))
    for value, expected in zip(found, limit, strict=True):
        assert_close(value / min(beta, 1 - beta), expected)


def test_ties_count_as_the_first_class(each_level):
    student, teacher = logits(1, 2000), torch.zeros(1, 1, 2000)
    teacher[0, 0, [1500, 7, 1023]] = 1
    grad = run(student, teacher, None, None, torch.ones(1), *settings_of("cross_entropy", 1.0, 1.0))[1]
    assert (grad[0] < 0).nonzero().flatten().tolist() == [7]


def test_row_weights_get_a_gradient(each_backend):
    rows = torch.rand(4, requires_grad=True)
    student, teacher = logits(4, 9), logits(4, 9, seed=1)
    sm.softmax_kl(student, teacher, row_weights=rows).backward()
    assert_close(rows.grad, truth(student, teacher[None], None, None, None, "kl", 2.0, 2.0, 0.0)[0] / 4)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(each_backend, loss):
    student, teacher, weights, _, _, *settings = arguments(loss, 3, 5, 2, student=torch.float64, teacher=torch.float64)
    counts = torch.tensor([5, 3, 1])
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: OPS[0](s, teacher, weights, counts, *settings), student)
    grad = torch.autograd.grad(OPS[0](student, teacher, weights, counts, *settings).sum(), student, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("loss", LOSSES)
def test_opcheck(each_backend, loss):
    student, teacher, weights, _, scale, *settings = arguments(loss, 3, 5, teachers=2)
    counts = torch.tensor([5, 3, 1])
    opcheck(OPS[0], (student, teacher, weights, counts, *settings))
    opcheck(OPS[0], (student.clone().requires_grad_(), teacher, weights, None, *settings))
    opcheck(OPS[1], (student, teacher, None, counts, scale, *settings))


def test_compile(each_backend):
    teacher, counts = logits(2, 6, 30, seed=1), torch.full((6,), 20)

    def step(student):
        loss = sm.softmax_kl(student, teacher, num_classes=counts) + sm.entropy(student)
        loss = loss + sm.argmax_cross_entropy(student, teacher) + sm.softmax_kl(student, teacher, beta=0.25)
        return loss, sm.softmax_kl_with_grad(student, teacher)[1]

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = logits(6, 30).requires_grad_()
        loss, fused = function(leaf)
        loss.backward()
        assert not fused.requires_grad
        results.append((loss, leaf.grad, fused))
    for compiled, eager in zip(results[1], results[0]):
        assert_close(compiled, eager.double())


def test_errors_name_the_argument(each_backend):
    student, teacher = logits(4, 9), logits(2, 4, 9)
    cases = [
        (ValueError, r"student has shape \[9\]", (student[0], teacher), {}),
        (ValueError, r"student has shape \[4, 0\]", (student[:, :0], teacher), {}),
        (ValueError, r"teacher has shape \[2, 4, 8\]", (student, teacher[..., :8]), {}),
        (ValueError, r"teacher has shape \[1, 3, 9\]", (student, teacher[0, :3]), {}),
        (TypeError, r"teacher is torch.float64 but student", (student, teacher.double()), {}),
        (TypeError, r"student is torch.int64", (student.long(), teacher), {}),
        (ValueError, r"teacher requires grad", (student, teacher.clone().requires_grad_()), {}),
        (ValueError, r"teacher_weights has shape \[3\]", (student, teacher), {"teacher_weights": torch.ones(3)}),
        (TypeError, r"row_weights is torch.float64", (student, teacher), {"row_weights": torch.ones(4).double()}),
        (ValueError, r"row_weights has shape \[1\]", (student, teacher), {"row_weights": torch.ones(1)}),
        (ValueError, r"num_classes has shape \[1\]", (student, teacher), {"num_classes": torch.tensor([3])}),
        (TypeError, r"num_classes is torch.int32", (student, teacher), {"num_classes": torch.ones(4).int()}),
        (ValueError, r"student's temperature is 0", (student, teacher), {"student_temperature": 0}),
        (ValueError, r"teacher's temperature is nan", (student, teacher), {"teacher_temperature": float("nan")}),
        (ValueError, r"beta is 1.5; it must lie in 0 … 1", (student, teacher), {"beta": 1.5}),
        (ValueError, r"beta is nan", (student, teacher), {"beta": float("nan")}),
        (ValueError, r"unknown reduction 'mean'", (student, teacher), {"reduction": "mean"}),
    ]
    for error, message, inputs, options in cases:
        for function in (sm.softmax_kl, sm.softmax_kl_with_grad):
            with pytest.raises(error, match=message):
                function(*inputs, **options)


@pytest.mark.parametrize("wrong", (-1, 0, 10))
def test_impossible_numbers_of_classes(each_backend, wrong):
    """The CPU raises; kernels cannot without stalling the device, and make the row's loss and gradient NaN."""
    student, teacher, counts = logits(4, 9), logits(2, 4, 9), torch.tensor([9, 9, wrong, 9])
    if each_backend in ("reference", "cpu"):
        for function in (sm.softmax_kl, sm.softmax_kl_with_grad):
            with pytest.raises(ValueError, match="num_classes must lie in 1"):
                function(student, teacher, num_classes=counts)
        return
    losses, grad = sm.softmax_kl_with_grad(student, teacher, num_classes=counts, reduction="none")
    assert losses.isnan().tolist() == [False, False, True, False]
    assert torch.equal(grad.isnan().all(1), losses.isnan()) and torch.equal(grad.isnan().any(1), losses.isnan())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", NARROW)
def test_the_gradient_can_be_written_into_a_given_tensor(each_backend, loss, dtype):
    student, teacher = (x.to(dtype) for x in random_normal((5, 37), (2, 5, 37), seed=3))
    call = function_of(loss, "_with_grad")
    logits = (student,) if loss == "entropy" else (student, teacher)
    expected = call(*logits)
    out = torch.full_like(student, torch.nan)
    value, grad = call(*logits, out=out)
    assert grad is out
    assert torch.equal(out, expected[1]) and torch.equal(value, expected[0])


@pytest.mark.parametrize("loss", (*BETA, "entropy"))
@pytest.mark.parametrize("dtype", (*NARROW, torch.float64))
@pytest.mark.parametrize("columns", (37, 2053))
@pytest.mark.parametrize("teachers", (1, 3))
def test_the_gradient_can_take_the_place_of_the_logits(each_level, loss, dtype, columns, teachers):
    args = arguments(loss, 5, columns, teachers, student=dtype, teacher=dtype)
    expected = run(*args)
    student = args[0].clone()
    losses = torch.ops.samerge.softmax_kl_grad_out(student, *args[1:5], student, *args[5:])
    assert torch.equal(losses, expected[0]) and torch.equal(student, expected[1])


@pytest.mark.parametrize("columns", (64, 2048))
@pytest.mark.parametrize("loss", LOSSES)
def test_where_the_gradient_lies_does_not_matter(each_backend, loss, columns):
    """One that begins between 16 bytes is written number by number; the logits are read, and summed, as before."""
    student, teacher = random_normal((5, columns), (2, 5, columns), seed=3)
    call = function_of(loss, "_with_grad")
    logits = (student,) if loss == "entropy" else (student, teacher)
    value, grad = call(*logits)
    shifted = torch.full((5 * columns + 1,), torch.nan)[1:].view(5, columns)
    shifted_value, _ = call(*logits, out=shifted)
    assert torch.equal(shifted_value, value) and torch.equal(shifted, grad)


def test_a_tensor_for_the_gradient_that_does_not_fit_is_refused():
    student = torch.randn(5, 37)
    for out, problem in (
        (torch.empty(5, 36), r"shape \[5, 36\]"),
        (torch.empty(37, 5).T, r"stride \(1, 5\)"),
        (torch.empty(5, 37, dtype=torch.bfloat16), "bfloat16"),
        (torch.empty(5, 37, requires_grad=True), "requires grad"),
    ):
        with pytest.raises(ValueError, match=problem):
            sm.entropy_with_grad(student, out=out)


@pytest.mark.parametrize("given", (False, True))
def test_with_grad_compiles_into_one_graph(each_backend, given):
    student, teacher = random_normal((4, 33), (4, 33), seed=5)
    out = torch.zeros_like(student) if given else None
    expected = sm.softmax_kl_with_grad(student, teacher)
    compiled = torch.compile(lambda s, t: sm.softmax_kl_with_grad(s, t, out=out), fullgraph=True, backend="eager")
    for result, value in zip(compiled(student, teacher), expected, strict=True):
        assert torch.equal(result, value)
