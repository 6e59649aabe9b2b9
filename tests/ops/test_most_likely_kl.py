"""The divergence from a teacher's most likely classes, against one class less after another in plain PyTorch, in fp64."""

import pytest
import torch
from helpers import assert_close
from torch.nn.functional import linear

from samerge_ext.ops import chunked_rows, most_likely_kl
from samerge_ext.ops.most_likely_kl import MostLikely, linear_most_likely_kl_with_grad, most_likely_kl_with_grad
from samerge_ext.ops.softmax_kl import softmax_kl_with_grad

ROWS, CLASSES, WIDTH, TAU = 7, 29, 5, 1.7


def numbers(*shape, seed, dtype=torch.float64):
    return (2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def literal(student, teacher, k, temperature, scale):
    """Differentiable in the student's logits; every row by itself."""
    total = 0.0
    for row, wanted, weight in zip(student, teacher, scale, strict=True):
        p, q = (wanted / 3.0).softmax(0), (row / temperature).softmax(0)
        kept = sorted(range(len(p)), key=lambda c: -p[c])[:k]
        others = [c for c in range(len(p)) if c not in kept]
        total = total + weight * (p[kept] * (p[kept] / q[kept]).log()).sum()
        if others:
            total = total + weight * p[others].sum() * (p[others].sum() / q[others].sum()).log()
    return total


@pytest.mark.parametrize("k", [1, 8, CLASSES - 1, CLASSES, 2 * CLASSES])
def test_loss_and_gradient_are_those_of_one_class_more(k):
    student = numbers(ROWS, CLASSES, seed=0).requires_grad_()
    teacher, scale = numbers(ROWS, CLASSES, seed=1), numbers(ROWS, seed=2).abs()
    expected = literal(student, teacher, k, TAU, scale)
    (gradient,) = torch.autograd.grad(expected, student)
    loss, found = most_likely_kl_with_grad(student.detach(), MostLikely.of(teacher, k, 3.0), TAU, scale)
    assert_close(loss, expected.detach())
    assert_close(found, gradient)


def test_with_all_classes_it_is_the_divergence_and_with_fewer_it_misses_the_rests_share():
    student, teacher = numbers(ROWS, CLASSES, seed=0), numbers(ROWS, CLASSES, seed=1)
    scale = torch.full((ROWS,), 1 / ROWS, dtype=torch.float64)
    whole, gradient = softmax_kl_with_grad(student, teacher, student_temperature=TAU, teacher_temperature=TAU)
    loss, found = most_likely_kl_with_grad(student, MostLikely.of(teacher, CLASSES, TAU), TAU, scale)
    assert_close(loss, whole)
    assert_close(found, gradient)
    kept = MostLikely.of(teacher, 4, TAU)
    loss, _ = most_likely_kl_with_grad(student, kept, TAU, scale)
    p, q = (teacher / TAU).softmax(1), (student / TAU).softmax(1)
    beyond = [x.scatter(1, kept.classes.long(), 0.0) for x in (p, q)]
    inner = [x / x.sum(1, keepdim=True) for x in beyond]
    missed = beyond[0].sum(1) * torch.where(inner[0] > 0, inner[0] * (inner[0] / inner[1]).log(), 0.0).sum(1)
    assert_close(loss + missed.mean(), whole)
    assert missed.mean() > 0.01 * whole


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_of_hidden_states_some_rows_at_a_time(frozen, with_bias, monkeypatch):
    hidden, head = numbers(ROWS, WIDTH, seed=0).requires_grad_(), numbers(CLASSES, WIDTH, seed=1).requires_grad_(not frozen)
    bias = numbers(CLASSES, seed=2).requires_grad_() if with_bias else None
    teacher_hidden, teacher_head, scale = numbers(ROWS, 3, seed=3), numbers(CLASSES, 3, seed=4), numbers(ROWS, seed=5).abs()
    taught = linear(teacher_hidden, teacher_head, bias).detach()
    expected = literal(linear(hidden, head, bias), taught, 4, TAU, scale)
    wanted = [x for x in (hidden, head, bias) if x is not None and x.requires_grad]
    gradients = torch.autograd.grad(expected, wanted)
    counts = []
    monkeypatch.setattr(chunked_rows, "_ON_CPU", 3 * (4 * CLASSES + 2 * WIDTH) * 8 * 8 // 7)  # three rows
    made = most_likely_kl.Head.logits
    monkeypatch.setattr(most_likely_kl.Head, "logits", lambda self, x, out: counts.append(len(x)) or made(self, x, out))
    with torch.no_grad():
        teacher = MostLikely.of_linear(teacher_hidden, teacher_head, None if bias is None else bias.detach(), 4, 3.0)
    loss, found = linear_most_likely_kl_with_grad(hidden, head, bias, teacher, TAU, scale)
    assert_close(loss, expected.detach())
    assert [x is not None for x in found] == [True, not frozen, with_bias]
    for x, gradient in zip((x for x in found if x is not None), gradients, strict=True):
        assert_close(x, gradient)
    assert max(counts) <= 3 and sum(counts) == 2 * ROWS


def test_narrow_heads_sum_in_fp32():
    hidden, head = numbers(ROWS, WIDTH, seed=0), numbers(CLASSES, WIDTH, seed=1)
    narrow = [x.to(torch.bfloat16).requires_grad_() for x in (hidden, head)]
    exact = [x.detach().double().requires_grad_() for x in narrow]
    logits, scale = numbers(ROWS, CLASSES, seed=2), torch.ones(ROWS)
    loss, found = linear_most_likely_kl_with_grad(*narrow, None, MostLikely.of(logits.float(), 4, TAU), TAU, scale)
    expected, gradients = linear_most_likely_kl_with_grad(*exact, None, MostLikely.of(logits, 4, TAU), TAU, scale.double())
    assert loss.dtype == torch.float32 and found[1].dtype == torch.bfloat16
    assert_close(loss, expected)
    for x, gradient in zip(found[:2], gradients[:2], strict=True):
        assert_close(x, gradient)


def test_of_no_rows():
    hidden, head = torch.zeros(0, WIDTH).requires_grad_(), torch.randn(CLASSES, WIDTH)
    with torch.no_grad():
        teacher = MostLikely.of_linear(hidden, head, None, 4, TAU)
    loss, (gradient, *_) = linear_most_likely_kl_with_grad(hidden, head, None, teacher, TAU, torch.zeros(0))
    assert loss == 0 and gradient.shape == (0, WIDTH) and teacher.classes.shape == (0, 4)
