"""Losses of logits against their equations in fp64."""

import pytest
import torch
from helpers import INTERPRETED, NARROW, THREADS, assert_close
from softmax_losses import BETA, LOSSES, arguments, check, function_of, logits, run, settings_of, truth


@pytest.mark.parametrize("loss", LOSSES)
def test_the_truth_is_the_equation(loss):
    """One row at a time in torch.distributions, its gradient from autograd."""
    student, teacher, weights, _, scale, _, student_temperature, teacher_temperature, beta = args = arguments(
        loss, 4, 7, teachers=2, student=torch.float64, teacher=torch.float64
    )
    leaf = student.clone().requires_grad_()
    q = torch.distributions.Categorical(logits=leaf / student_temperature)
    if loss == "entropy":
        expected = q.entropy()
    else:
        p = torch.distributions.Categorical(logits=teacher / teacher_temperature)
        m = torch.distributions.Categorical(probs=beta * p.probs + (1 - beta) * q.probs)
        kl = torch.distributions.kl_divergence
        of_loss = {
            "kl": lambda: kl(p, q),
            "reverse_kl": lambda: kl(q, p),
            "jsd": lambda: beta * kl(p, m) + (1 - beta) * kl(q, m),  # arXiv 2306.13649, equation 1
            "cross_entropy": lambda: -q.log_prob(teacher.argmax(-1)),
        }
        expected = (weights * of_loss[loss]()).sum(0)
    (expected * scale).sum().backward()
    losses, grad = truth(*args)
    assert_close(losses, expected)
    assert_close(grad, leaf.grad)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("columns", (1, 2, 3, 17, 1000, 1024, 1041, 40000))
def test_any_number_of_classes(each_level, loss, columns):
    check(*arguments(loss, 3, columns, teachers=3 if columns < 1041 else 1), at_least=float(columns == 1))


@pytest.mark.parametrize("student", NARROW)
@pytest.mark.parametrize("teacher", NARROW)
def test_dtypes_mix(each_level, student, teacher):
    for loss in LOSSES:
        check(*arguments(loss, 6, 133, teachers=2, student=student, teacher=teacher))


@pytest.mark.parametrize("loss", LOSSES)
def test_double(each_level, loss):
    check(*arguments(loss, 5, 1100, teachers=2, student=torch.float64, teacher=torch.float64))


@pytest.mark.parametrize("loss", LOSSES)
def test_empty(each_backend, loss):
    losses, grad = run(*arguments(loss, 0, 5))
    assert losses.shape == (0,) and grad.shape == (0, 5)
    function = function_of(loss)
    inputs = (torch.empty(0, 5),) * (1 if loss == "entropy" else 2)
    assert function(*inputs) == 0 and function(*inputs, reduction="none").shape == (0,)


@pytest.mark.parametrize("loss", LOSSES)
def test_rows_with_fewer_classes(each_level, loss):
    """The result is that of each row cut to its classes, whatever the padding holds."""
    student, teacher, weights, _, scale, *settings = arguments(loss, 5, 1300, teachers=2)
    counts = torch.tensor([1, 17, 1024, 1025, 1300])
    expected = [torch.zeros(5, dtype=torch.float64), torch.zeros(5, 1300, dtype=torch.float64)]
    for r, n in enumerate(counts):
        cut = [None if x is None else x[..., r : r + 1, :n] for x in (student, teacher)]
        weight = None if weights is None else weights[:, r : r + 1]
        row = truth(*cut, weight, None, scale[r : r + 1], *settings)
        expected[0][r], expected[1][r, :n] = row[0][0], row[1][0]
    for junk in (torch.nan, torch.inf, 1e30):
        for r, n in enumerate(counts):
            for x in (student, teacher):
                if x is not None:
                    x[..., r, n:] = junk
        result = run(student, teacher, weights, counts, scale, *settings)
        assert_close(result[0], expected[0])
        assert_close(result[1], expected[1])
        assert all(not row[n:].any() for row, n in zip(result[1], counts))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("temperatures", ((1.0, 1.0), (2.0, 0.5)))
def test_huge_logits(each_level, loss, temperatures):
    student, teacher, weights, _, scale, *_ = arguments(loss, 8, 50, student=torch.bfloat16)
    student, teacher = student * 3e3, None if teacher is None else teacher * 3e3
    assert student.abs().max() > 1e4
    check(student, teacher, weights, None, scale, *settings_of(loss, *temperatures), at_least=1.0)  # entropies vanish


@pytest.mark.parametrize("loss", LOSSES)
def test_constant_offsets_do_not_matter(each_level, loss):
    student, teacher, weights, _, scale, *settings = arguments(loss, 4, 40)
    student = student.round()  # so that adding 10,000 is exact
    plain = run(student, teacher, weights, None, scale, *settings)
    shifted = run(student + 1e4, teacher, weights, None, scale, *settings)
    assert_close(shifted[0], plain[0].double())
    assert_close(shifted[1], plain[1].double())


@pytest.mark.parametrize("loss", LOSSES)
def test_masked_classes(each_level, loss):
    """-inf in student and teacher; in the teacher alone, where reverse KL is infinite; in the student alone, where KL is."""
    student, teacher, weights, _, scale, *settings = arguments(loss, 4, 2100)
    inf = torch.inf
    student[0, 3:9] = student[1, :1500] = -inf
    if teacher is not None:
        teacher[0, 0, 3:9] = teacher[0, 1, :1500] = -inf
        if loss != "reverse_kl":
            teacher[0, 2, :2099] = -inf
    check(student, teacher, weights, None, scale, *settings)
    if loss == "kl":
        student[3, 5] = -inf
        result = run(student, teacher, None, None, scale, *settings)
        assert result[0][3] == inf and result[0][:3].isfinite().all() and result[1].isfinite().all()
    if loss == "reverse_kl":
        teacher[0, 3, 5] = -inf
        result = run(student, teacher, None, None, scale, *settings)
        assert result[0][3] == inf and result[0][:3].isfinite().all() and result[1][:3].isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_nan_stays_in_its_row(each_level, loss):
    student, teacher, *rest = arguments(loss, 3, 1050)
    student[1, 1030] = torch.nan
    student[2] = -torch.inf
    losses, grad = run(student, teacher, *rest)
    assert losses.isnan().tolist() == [False, True, True]
    assert grad[1].isnan().all() and grad[0].isfinite().all()


@pytest.mark.parametrize("loss", BETA)
def test_a_close_student_keeps_its_digits(each_level, loss):
    """KL is of second order in a difference of 1e-3: sums of p · (log p − log q) would lose it to rounding."""
    if each_level == "reference":
        pytest.skip("plain PyTorch does not sum this form")
    teacher = logits(1, 16, 500)
    student = teacher[0] + 1e-3 * logits(16, 500, seed=2)
    settings = settings_of(loss, 2.0, 2.0)
    scale = torch.ones(16)
    losses, grad = run(student, teacher, None, None, scale, *settings)
    expected = truth(student, teacher, None, None, scale, *settings)
    assert expected[0].max() < 3e-6
    assert_close(losses, expected[0])
    assert (losses - expected[0]).abs().max() < 1e-4 * expected[0].min()
    same = run(teacher[0], teacher, None, None, scale, *settings)
    assert not same[0].any() and same[1].abs().max() < 1e-8


@pytest.mark.parametrize("loss", LOSSES)
def test_inputs_need_not_be_contiguous(each_level, loss):
    student, teacher, weights, counts, scale, *settings = arguments(loss, 5, 70, teachers=3)
    expected = truth(student, teacher, weights, counts, scale, *settings)
    spread = torch.full((5, 90), torch.nan)
    spread[:, 11:81] = student
    views = [(spread[:, 11:81], teacher), (student.t().contiguous().t(), teacher)]
    if teacher is not None:
        views += [(student, teacher.transpose(0, 1).contiguous().transpose(0, 1))]
        views += [(student, teacher.transpose(1, 2).contiguous().transpose(1, 2))]
        weights = weights.t().contiguous().t()
    for view in views:
        result = run(*view, weights, counts, scale.expand(2, -1).t()[:, 0], *settings)
        assert_close(result[0], expected[0])
        assert_close(result[1], expected[1])


@pytest.mark.parametrize("loss", LOSSES)
def test_threads_and_repeats_agree_to_the_bit(each_backend, threads, loss):
    args = arguments(loss, 4 if INTERPRETED else 64, 1100)
    results = []
    for count in THREADS:
        threads(count)
        results.append(run(*args))
    assert all(torch.equal(*pair) for result in results for pair in zip(results[0], result, strict=True))
