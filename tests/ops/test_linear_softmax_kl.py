import json
import subprocess
import sys

import pytest
import torch
from helpers import INTERPRETED, NARROW, ROOT, THREADS, assert_close, random_normal
from torch.library import opcheck
from torch.nn.functional import linear

import samerge_ext as sm
from samerge_ext import backend, reference
from samerge_ext.ops import chunked_rows, head_products

BETA = {"kl": 0.0, "reverse_kl": 1.0, "jsd": 0.25}
LOSSES = (*BETA, "cross_entropy", "entropy")
OPS = (torch.ops.samerge.linear_softmax_kl.default, torch.ops.samerge.linear_softmax_kl_sum.default)
ALL = (True, True, True)


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch):
    """So that small heads have several."""
    monkeypatch.setattr(head_products, "SLAB", {"cpu": 1500, "cuda": 1500})


def arguments(loss, rows, width, classes, teachers=1, hidden=torch.float32, head=torch.float32, scale=2.0):
    """What an operator takes up to row_scale, and the settings up to beta; teacher k's hidden states are k + 1 wider."""
    wide = torch.float64 if hidden == torch.float64 else torch.float32
    shapes = [(rows, width), (classes, width), (classes,)]
    for k in range(teachers if loss != "entropy" else 0):
        shapes += [(rows, width + 1 + k), (classes, width + 1 + k), (classes,)]
    numbers = random_normal(*shapes, seed=0, dtype=wide)
    for i, x in enumerate(numbers):
        is_head = i % 3 == 1
        numbers[i] = (x * (scale / x.shape[1] ** 0.5 if is_head else 1)).to(hidden if i % 3 == 0 else head)
    weights = random_normal((teachers, rows), seed=1, dtype=wide)[0].abs() + 0.5 if loss != "entropy" else None
    given = (*numbers[:3], numbers[3::3], numbers[4::3], numbers[5::3], weights, None, torch.linspace(-1, 2, rows, dtype=wide))
    return given, ("kl" if loss in BETA else loss, 2.0, 1.5, BETA.get(loss, 0.0))


def workspace(rows, given, loss):
    """Bytes that hold so many rows and not one more, as long as they are few."""
    heads = [chunked_rows.Head(w, None, x) for w, x in zip((given[1], *given[4]), (given[0], *given[3]))]
    matrices = len(heads) + (loss == "cross_entropy")
    of_row = matrices * len(given[1]) * heads[0].wide.itemsize + sum(head.row_bytes for head in heads)
    return int((of_row * (rows + 0.5) + max(head.slab_bytes for head in heads)) / (1 - chunked_rows._KEPT_BACK))


def run(given, settings, rows_at_once=3):
    """Losses and gradients by hidden, head and bias from both operators, which must agree."""
    room = workspace(rows_at_once, given, settings[0])
    leaves = [x.detach().requires_grad_() for x in given[:3]]
    losses = OPS[0](*leaves, *given[3:8], *settings, room)
    losses.backward(given[8])
    total, again, *grads = OPS[1](*given, *settings, room, ALL)
    torch.testing.assert_close(again, losses, rtol=0, atol=0, equal_nan=True)
    for leaf, grad in zip(leaves, grads, strict=True):
        torch.testing.assert_close(leaf.grad, grad, rtol=0, atol=0, equal_nan=True)
    assert_close(total, (losses.double() * given[8].double()).sum(), "total", losses.norm().item())
    return losses.detach(), *grads


def truth(given, settings):
    widened = lambda x: x.double() if torch.is_tensor(x) and x.is_floating_point() else x
    wide = [[widened(x) for x in some] if isinstance(some, list) else widened(some) for some in given]
    return reference.linear_softmax_kl(*wide, *settings)


def check(given, settings, rows_at_once=3):
    results, expected = run(given, settings, rows_at_once), truth(given, settings)
    for name, actual, value, of in zip(("losses", "hidden", "head", "bias"), results, expected, (None, *given[:3]), strict=True):
        assert of is None or actual.dtype == of.dtype
        assert_close(actual, value, name, rounding(given, settings) if of is None else 0.0)


def rounding(given, settings):
    """The norm of what a loss is a difference of, −log q and −log p: logits are rounded to the size of their products."""
    hidden, head, bias = (x.double() for x in given[:3])
    return (linear(hidden, head, bias) / settings[1]).log_softmax(-1).abs().mean(-1).norm().item()


@pytest.mark.parametrize("loss", LOSSES)
def test_the_truth_is_the_unfused_computation(loss):
    given, settings = arguments(loss, 4, 3, 7, teachers=2, hidden=torch.float64, head=torch.float64)
    leaves = [x.clone().requires_grad_() for x in given[:3]]
    q = torch.distributions.Categorical(logits=linear(*leaves) / 2.0)
    if loss == "entropy":
        expected = q.entropy()
    else:
        teachers = torch.stack([linear(*parts) for parts in zip(*given[3:6])])
        p = torch.distributions.Categorical(logits=teachers / 1.5)
        m = torch.distributions.Categorical(probs=0.25 * p.probs + 0.75 * q.probs)
        kl = torch.distributions.kl_divergence
        of_loss = {"kl": kl(p, q), "reverse_kl": kl(q, p), "jsd": 0.25 * kl(p, m) + 0.75 * kl(q, m)}
        of_loss["cross_entropy"] = -q.log_prob(teachers.argmax(-1))
        expected = (given[6] * of_loss[loss]).sum(0)
    (expected * given[8]).sum().backward()
    losses, *grads = reference.linear_softmax_kl(*given, *settings)
    assert_close(losses, expected)
    for grad, leaf in zip(grads, leaves, strict=True):
        assert_close(grad, leaf.grad)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("rows, width, classes", ((1, 1, 2), (7, 5, 33), (8, 16, 512), (5, 3, 1300)))
def test_any_shape_in_chunks(each_backend, loss, rows, width, classes):
    check(*arguments(loss, rows, width, classes, teachers=2))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("hidden", NARROW)
@pytest.mark.parametrize("head", NARROW)
def test_dtypes_mix(each_backend, loss, hidden, head):
    check(*arguments(loss, 6, 20, 133, teachers=2, hidden=hidden, head=head))


@pytest.mark.parametrize("loss", LOSSES)
def test_double(each_backend, loss):
    check(*arguments(loss, 5, 9, 600, teachers=3, hidden=torch.float64, head=torch.float64))


@pytest.mark.parametrize("loss", LOSSES)
def test_masked_rows_cost_nothing(each_backend, loss):
    """Whatever they hold: the results are those of the other rows alone."""
    given, settings = arguments(loss, 9, 5, 40, teachers=2)
    mask = torch.tensor([1, 0, 0, 1, 1, 1, 0, 1, 1]).bool()
    kept = [given[0][mask], *given[1:3], [x[mask] for x in given[3]], *given[4:6]]
    kept += [None if given[6] is None else given[6][:, mask], None, given[8][mask]]
    expected = truth(kept, settings)
    for x in (given[0], *given[3]):
        x[~mask] = torch.nan
    losses, hidden_grad, *grads = run((*given[:7], mask, given[8]), settings)
    assert_close(losses[mask], expected[0], at_least=rounding(kept, settings))
    assert_close(hidden_grad[mask], expected[1])
    assert not losses[~mask].any() and not hidden_grad[~mask].any()
    for grad, value in zip(grads, expected[2:], strict=True):
        assert_close(grad, value)


@pytest.mark.parametrize("rows", (0, 4))
def test_no_row_counts(each_backend, rows):
    hidden, head, teacher = (x.requires_grad_() for x in random_normal((rows, 5), (9, 5), (rows, 5), seed=1))
    mask = torch.zeros(rows, dtype=torch.bool)
    loss = sm.linear_softmax_kl(hidden, head, teacher.detach(), mask=mask)
    loss.backward()
    assert loss == 0 and not hidden.grad.any() and not head.grad.any()
    assert sm.linear_softmax_kl(hidden, head, teacher.detach(), mask=mask, reduction="none").tolist() == [0] * rows


def test_reductions_weights_and_masks(each_backend):
    (hidden, head, _, teachers, heads, _, *_), _ = arguments("kl", 6, 5, 30, teachers=3)
    rows, v, mask = torch.rand(6), torch.tensor([0.2, 0.5, 0.3]), torch.tensor([1, 1, 0, 1, 1, 1]).bool()
    options = {"row_weights": rows, "teacher_weights": v, "student_temperature": 1.5, "teacher_temperature": 3.0, "mask": mask}
    of_rows = v[:, None].expand(-1, 6)
    expected, *grads = truth((hidden, head, None, teachers, heads, [], of_rows, mask, rows), ("kl", 1.5, 3.0, 0.0))
    values = {"none": expected * rows, "sum": (expected * rows).sum(), "batchmean": (expected * rows).sum() / 5}
    for reduction, value in values.items():
        leaves = [x.clone().requires_grad_() for x in (hidden, head, rows)]
        loss = sm.linear_softmax_kl(*leaves[:2], teachers, heads, **options | {"row_weights": leaves[2]}, reduction=reduction)
        assert_close(loss, value, reduction)
        (2.5 * loss).sum().backward()
        factor = 2.5 / 5 if reduction == "batchmean" else 2.5
        for leaf, grad in zip(leaves, (*grads[:2], expected), strict=True):
            assert_close(leaf.grad, grad * factor, reduction)


def test_teachers_as_they_may_be_given(each_backend):
    """A tensor or a list, heads of their own, one for all, or the student's with its bias."""
    hidden, head, bias, *teachers = random_normal((6, 5), (30, 5), (30,), (6, 5), (6, 5), seed=2)
    of_student = truth((hidden, head, bias, teachers, [head] * 2, [bias] * 2, None, None, None), ("kl", 2.0, 2.0, 0.0))[0].mean()
    without = truth((hidden, head, bias, teachers, [head] * 2, [], None, None, None), ("kl", 2.0, 2.0, 0.0))[0].mean()
    for given in (teachers, tuple(teachers), torch.stack(teachers)):
        assert_close(sm.linear_softmax_kl(hidden, head, given, bias=bias), of_student)
        assert_close(sm.linear_softmax_kl(hidden, head, given, head, bias=bias, teacher_bias=bias), of_student)
        assert_close(sm.linear_softmax_kl(hidden, head, given, head, bias=bias), without)
        assert_close(sm.linear_softmax_kl(hidden, head, given, [head, head], bias=bias), without)
    alone = truth((hidden, head, None, teachers[:1], [head], [], None, None, None), ("kl", 2.0, 2.0, 0.0))[0].mean()
    assert_close(sm.linear_softmax_kl(hidden, head, teachers[0]), alone)


def test_siblings(each_backend):
    given, _ = arguments("kl", 6, 5, 30)
    hidden, head, bias, (teacher,), (teacher_head,), _, *_ = given
    losses, *grads = truth((hidden, head, bias, [], [], [], None, None, torch.full((6,), 1 / 6)), ("entropy", 1.5, 1.0, 0.0))
    leaf = hidden.clone().requires_grad_()
    value = sm.linear_entropy(leaf, head, bias=bias, temperature=1.5)
    value.backward()
    assert_close(value, losses.mean())
    assert_close(leaf.grad, grads[0])
    of_teacher = (hidden, head, None, [teacher], [teacher_head], [], None, None, torch.full((6,), 1 / 6))
    losses, *grads = truth(of_teacher, ("cross_entropy", 1.0, 1.0, 0.0))
    leaf = hidden.clone().requires_grad_()
    value = sm.linear_argmax_cross_entropy(leaf, head, teacher, teacher_head)
    value.backward()
    assert_close(value, losses.mean())
    assert_close(leaf.grad, grads[0])


@pytest.mark.parametrize("beta", (0.25, 1.0))
@pytest.mark.parametrize("reduction", ("batchmean", "none"))
def test_beta_chooses_the_divergence(each_backend, beta, reduction):
    hidden, head, _, teachers, heads, *_ = arguments("kl", 6, 5, 30, teachers=2)[0]
    given = (hidden, head, None, teachers, heads, [], None, None, torch.full((6,), 1 / 6))
    losses, *grads = truth(given, ("kl", 1.5, 1.5, beta))
    leaves = [x.clone().requires_grad_() for x in (hidden, head)]
    options = {"student_temperature": 1.5, "teacher_temperature": 1.5, "reduction": reduction}
    loss = sm.linear_softmax_kl(*leaves, teachers, heads, beta=beta, **options)
    loss.mean().backward()
    assert_close(loss, losses if reduction == "none" else losses.mean())
    for leaf, grad in zip(leaves, grads[:2], strict=True):
        assert_close(leaf.grad, grad)


def test_only_wanted_gradients_are_computed(each_backend):
    given, settings = arguments("kl", 4, 5, 30)
    _, _, *grads = OPS[1](*given, *settings, None, (False, True, False))
    assert [grad.numel() for grad in grads] == [0, 30 * 5, 0]


def test_what_depends_on_how_rows_are_cut_is_rounding(each_backend):
    given, settings = arguments("kl", 7, 5, 520, teachers=2)
    whole = run(given, settings, 100)
    for rows in (1, 3):
        for cut, once in zip(run(given, settings, rows), whole, strict=True):
            assert_close(cut, once.double(), at_least=rounding(given, settings))


@pytest.mark.skipif(backend.available()["cpu"] is not None, reason="needs the extension; a library's order of sums is its own")
@pytest.mark.parametrize("loss", LOSSES)
def test_on_a_cpu_threads_and_the_workspace_change_no_bit(loss, threads):
    """Of the loss and of its gradient by hidden states."""
    given, settings = arguments(loss, 40, 16, 1100)
    wanted = (True, False, False)
    once = OPS[1](*given, *settings, None, wanted)[:2]
    for count in THREADS:
        threads(count)
        for rows in (1, 17, 40):
            found = OPS[1](*given, *settings, workspace(rows, given, loss), wanted)[:2]
            assert all(torch.equal(*pair) for pair in zip(found, once, strict=True)), (count, rows)


def test_as_many_rows_at_once_as_fit(monkeypatch):
    """And as few chunks as there can be, of nearly the same size."""
    given, settings = arguments("kl", 11, 5, 700)
    seen, kernel = [], backend.kernel("softmax_kl", given[0])
    monkeypatch.setattr(backend, "kernel", lambda *_: lambda student, *rest: seen.append(len(student)) or kernel(student, *rest))
    for rows, expected in ((11, [11]), (10, [6, 5]), (5, [4, 4, 3]), (1, [1] * 11)):
        seen.clear()
        OPS[0](*given[:8], *settings, workspace(rows, given, "kl"))
        assert seen == expected


def test_repeats_agree_to_the_bit(each_backend):
    given, settings = arguments("kl", *((6, 5, 600) if INTERPRETED else (40, 16, 1100)), teachers=2)
    results = [run(given, settings, 5) for _ in range(3)]
    assert all(torch.equal(*pair) for result in results for pair in zip(results[0], result, strict=True))


def test_memory_is_the_workspace_and_the_results():
    """The default 64 MiB, in a process of its own; student and teacher logits would take 480 MiB, their softmax as much again."""
    script = ROOT / "tests" / "support" / "linear_memory.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name, (rise, results, logits) in found.items():
        assert rise <= 64 * 2**20 + results, (name, found)
        assert logits > 6 * 64 * 2**20


def test_autocast_changes_nothing():
    given, _ = arguments("kl", 6, 5, 30)
    hidden, head, _, teachers, heads, *_ = given
    results = []
    for enabled in (False, True):
        leaf = hidden.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = sm.linear_softmax_kl(leaf, head, teachers, heads)
        loss.backward()
        results.append((loss, leaf.grad))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(each_backend, loss):
    given, settings = arguments(loss, 3, 4, 5, 2, hidden=torch.float64, head=torch.float64)
    leaves = [x.requires_grad_() for x in given[:3]]
    scale = torch.rand(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: OPS[0](*x, *given[3:8], *settings, None), leaves)
    of_sum = lambda *x: OPS[1](*x[:3], *given[3:8], x[3], *settings, None, ALL)[0]
    assert torch.autograd.gradcheck(of_sum, (*leaves, scale))
    for value in (OPS[0](*leaves, *given[3:8], *settings, None).sum(), of_sum(*leaves, scale)):
        grad = torch.autograd.grad(value, leaves[0], create_graph=True)[0]
        with pytest.raises(RuntimeError, match="second derivative"):
            grad.sum().backward()


@pytest.mark.parametrize("loss", LOSSES)
def test_opcheck(each_backend, loss):
    given, settings = arguments(loss, 3, 4, 5, teachers=2)
    mask = torch.tensor([True, False, True])
    leaves = [x.clone().requires_grad_() for x in given[:3]]
    opcheck(OPS[0], (*given[:7], mask, *settings, None))
    opcheck(OPS[0], (*leaves, *given[3:8], *settings, None))
    opcheck(OPS[1], (*given, *settings, None, ALL))
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")  # the other one asks for second derivatives
    opcheck(OPS[1], (*leaves, *given[3:], *settings, None, (True, False, True)), test_utils=tests)


def test_compile(each_backend):
    given, _ = arguments("kl", 6, 5, 30, teachers=2)
    hidden, head, bias, teachers, heads, biases, *_ = given
    mask = torch.tensor([1, 1, 0, 1, 0, 1]).bool()

    def step(hidden, head):
        options = {"bias": bias, "mask": mask}
        loss = sm.linear_softmax_kl(hidden, head, teachers, heads, teacher_bias=biases, **options)
        loss = loss + sm.linear_argmax_cross_entropy(hidden, head, teachers, heads, **options)
        loss = loss + sm.linear_softmax_kl(hidden, head, teachers, heads, beta=0.25, **options)
        return loss + sm.linear_entropy(hidden, head, **options, reduction="none").sum()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in (hidden, head)]
        loss = function(*leaves)
        loss.backward()
        results.append((loss, *(leaf.grad for leaf in leaves)))
    for compiled, eager in zip(results[1], results[0]):
        assert_close(compiled, eager.double())


def test_errors_name_the_argument(each_backend):
    hidden, head, teacher = random_normal((4, 5), (9, 5), (4, 5), seed=3)
    own, two = torch.ones(9, 5), [teacher, teacher]
    cases = [
        (ValueError, r"hidden has shape \[2, 2, 5\]; it must be \[R, H\]: flatten", (hidden.view(2, 2, 5), head, teacher), {}),
        (ValueError, r"head has shape \[9, 4\]; with hidden of \[4, 5\]", (hidden, head[:, :4], teacher), {}),
        (ValueError, r"head has shape \[0, 5\]", (hidden, head[:0], teacher), {}),
        (ValueError, r"teacher_hidden\[0\] has shape \[3, 5\]", (hidden, head, teacher[:3]), {}),
        (ValueError, r"teacher_head\[0\] has shape \[9, 5\]; with teacher_hidden", (hidden, head, teacher[:, :3]), {}),
        (ValueError, r"teacher_head\[0\] has 8 rows and head 9; .* align the vocab", (hidden, head, teacher, own[:8]), {}),
        (ValueError, r"teacher_head has 2 entries and teacher_hidden 1", (hidden, head, teacher, [own, own]), {}),
        (ValueError, r"teacher_bias has 1 entries and teacher_hidden 2", (hidden, head, two, own), {"teacher_bias": [own[:, 0]]}),
        (ValueError, r"teacher_bias is given without teacher_head", (hidden, head, teacher), {"teacher_bias": own[:, 0]}),
        (ValueError, r"teacher_bias\[0\] has shape \[8\]", (hidden, head, teacher, own), {"teacher_bias": own[:8, 0]}),
        (ValueError, r"teacher_hidden holds no teacher", (hidden, head, []), {}),
        (ValueError, r"^bias has shape \[8\]; .* it must be \[9\]", (hidden, head, teacher), {"bias": own[:8, 0]}),
        (TypeError, r"head is torch.float64 but hidden is torch.float32", (hidden, head.double(), teacher), {}),
        (TypeError, r"teacher_hidden\[0\] is torch.float64", (hidden, head, teacher.double()), {}),
        (TypeError, r"hidden is torch.int64", (hidden.long(), head, teacher), {}),
        (ValueError, r"teacher_hidden\[0\] requires grad", (hidden, head, teacher.clone().requires_grad_()), {}),
        (ValueError, r"teacher_head\[0\] requires grad", (hidden, head, teacher, own.clone().requires_grad_()), {}),
        (ValueError, r"teacher_weights has shape \[3\]", (hidden, head, teacher), {"teacher_weights": torch.ones(3)}),
        (TypeError, r"row_weights is torch.float64", (hidden, head, teacher), {"row_weights": torch.ones(4).double()}),
        (TypeError, r"mask is torch.int64; it must be bool", (hidden, head, teacher), {"mask": torch.ones(4).long()}),
        (ValueError, r"mask has shape \[3\]", (hidden, head, teacher), {"mask": torch.ones(3).bool()}),
        (ValueError, r"student's temperature is 0", (hidden, head, teacher), {"student_temperature": 0}),
        (ValueError, r"beta is -1; it must lie in 0 … 1", (hidden, head, teacher), {"beta": -1}),
        (ValueError, r"unknown reduction 'mean'", (hidden, head, teacher), {"reduction": "mean"}),
    ]
    if each_backend != "reference":  # which has all logits at once
        message = r"workspace_bytes is 99, .* 2 times 9 logits .* take \d+ bytes"
        cases.append((ValueError, message, (hidden, head, teacher), {"workspace_bytes": 99}))
    for error, message, inputs, options in cases:
        with pytest.raises(error, match=message):
            sm.linear_softmax_kl(*inputs, **options)
