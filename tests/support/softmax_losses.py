"""Losses of rows of logits: inputs, calls of both operators, and what they must give."""

from functools import partial

import torch
from helpers import assert_close, random_normal

import samerge_ext as sm
from samerge_ext import backend, reference

BETA = {"kl": 0.0, "reverse_kl": 1.0, "jsd": 0.25}
LOSSES = (*BETA, "cross_entropy", "entropy")
OPS = (torch.ops.samerge.softmax_kl.default, torch.ops.samerge.softmax_kl_grad.default)


def logits(*shape, seed=0, dtype=torch.float32, scale=3.0):
    return (random_normal(shape, seed=seed)[0] * scale).to(dtype)


def settings_of(loss, student_temperature, teacher_temperature):
    return "kl" if loss in BETA else loss, student_temperature, teacher_temperature, BETA.get(loss, 0.0)


def function_of(loss, suffix=""):
    if loss in BETA:
        return partial(getattr(sm, f"softmax_kl{suffix}"), beta=BETA[loss])
    return getattr(sm, {"cross_entropy": "argmax_cross_entropy", "entropy": "entropy"}[loss] + suffix)


def arguments(loss, rows, columns, teachers=1, student=torch.float32, teacher=torch.float32):
    """student, teacher, teacher_weights, num_classes, row_scale and the settings of an operator call."""
    wide = torch.float64 if student == torch.float64 else torch.float32
    scale = torch.linspace(-1, 2, rows, dtype=wide)
    others = (logits(teachers, rows, columns, seed=1, dtype=teacher), torch.rand(teachers, rows, dtype=wide))
    others = others if loss != "entropy" else (None, None)
    return logits(rows, columns, dtype=student), *others, None, scale, *settings_of(loss, 2.0, 1.5)


def run(student, teacher, teacher_weights, num_classes, row_scale, *settings):
    """Losses and gradient from both operators, which must agree."""
    losses, grad = OPS[1](student, teacher, teacher_weights, num_classes, row_scale, *settings)
    leaf = student.detach().requires_grad_()
    alone = OPS[0](leaf, teacher, teacher_weights, num_classes, *settings)
    alone.backward(row_scale)
    torch.testing.assert_close(alone, losses, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(leaf.grad, grad, rtol=0, atol=0, equal_nan=True)
    return losses, grad


def truth(*args):
    wide = [a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
    return reference.softmax_kl(*wide[:5], None, *wide[5:])


def check(*args, at_least=0.0):
    result, expected = run(*args), truth(*args)
    assert result[0].dtype == (torch.float64 if args[0].dtype == torch.float64 else torch.float32)
    assert result[1].dtype == args[0].dtype
    assert_close(result[0], expected[0], "losses", at_least)
    assert_close(result[1], expected[1], "grad", max(at_least, cancelling(*args)))


def cancelling(student, teacher, teacher_weights, num_classes, row_scale, loss, temperature, _, beta):
    """The norm of the terms whose difference is the entropy's gradient, q (−log q) − q H: the sum H over a row is rounded to H's
    size, by an order of summation that differs between processors, and the difference is smaller than H. In plain PyTorch
    q (log q − log m) of the Jensen–Shannon divergence is such a difference, too."""
    plain_jsd = 0 < beta < 1 and backend.active() == "reference"
    if not (loss == "entropy" or plain_jsd) or not student.shape[1]:
        return 0.0
    classes = torch.full((len(student),), student.shape[1]) if num_classes is None else num_classes
    rows = [row[:count].double().softmax(0) for row, count in zip(student / temperature, classes, strict=True)]
    terms = [torch.special.entr(q).sum() * q * scale / temperature for q, scale in zip(rows, row_scale.double(), strict=True)]
    return torch.cat(terms).norm().item() if terms else 0.0
