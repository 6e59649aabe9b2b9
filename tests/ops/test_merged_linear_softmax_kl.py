import json
import subprocess
import sys

import pytest
import torch
from helpers import NARROW, ROOT, assert_close, random_normal
from torch.library import opcheck
from torch.nn.functional import linear

import samerge_ext as sm
from samerge_ext import reference

OP = torch.ops.samerge.merged_linear_softmax_kl.default
CLASSES, WIDTH, ROWS = 37, 5, 6
BETAS = (0.0, 0.25, 1.0)
SOME_CLASSES = 4 * (6 * ROWS + 3 * 7) * 10  # a workspace for so few that they come in several slabs


def problem(tasks=3, teachers=2, dtype=torch.float32, head=torch.float32):
    """hidden, base, task_vectors, coefficients, teacher_hidden and teacher_head."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = [(ROWS, WIDTH), (CLASSES, WIDTH), (tasks, CLASSES, WIDTH), (tasks,)]
    shapes += [(ROWS, WIDTH + 1 + k) for k in range(teachers)] + [(CLASSES, WIDTH + 1 + k) for k in range(teachers)]
    hidden, base, task_vectors, coefficients, *others = random_normal(*shapes, seed=4, dtype=wide)
    states, heads = [x.to(dtype) for x in others[:teachers]], [x.to(head) for x in others[teachers:]]
    return hidden.to(dtype), base.to(head), task_vectors.to(head), coefficients, states, heads


def truth(
    hidden, base, task_vectors, coefficients, states, heads, scale, weights=None, mask=None, temperatures=(2.0, 2.0), beta=0.0
):
    """The loss and its gradients by hidden states and coefficients, from the merged head and its gradient in fp64."""
    head = base.double() + torch.tensordot(coefficients.double(), task_vectors.double(), 1)
    of_teachers = ([x.double() for x in states], [x.double() for x in heads], [], weights, mask)
    losses, hidden_grad, head_grad, _ = reference.linear_softmax_kl(
        hidden.double(), head, None, *of_teachers, scale.double(), "kl", *temperatures, beta
    )
    return (losses * scale).sum(), hidden_grad, (task_vectors.double() * head_grad).sum((1, 2)), losses


def rounding(given):
    """What ⟨Gᵀ hidden, τ_t⟩ is a sum of, which may cancel."""
    hidden, _, task_vectors, *_ = given
    return (hidden.double().norm() * task_vectors.double().flatten(1).norm(dim=1)).norm().item() / len(hidden) ** 0.5


def check(given, beta):
    leaves = [given[0].clone().requires_grad_(), given[3].clone().requires_grad_()]
    loss = sm.merged_linear_softmax_kl(leaves[0], *given[1:3], leaves[1], *given[4:], workspace_bytes=SOME_CLASSES * 2, beta=beta)
    (3 * loss).backward()
    expected = truth(*given, torch.full((ROWS,), 1 / ROWS, dtype=torch.float64), beta=beta)
    assert_close(loss, expected[0], at_least=1.0)
    assert leaves[0].grad.dtype == given[0].dtype
    assert_close(leaves[0].grad, 3 * expected[1])
    assert_close(leaves[1].grad, 3 * expected[2], at_least=rounding(given))


@pytest.mark.parametrize("hidden", NARROW)
@pytest.mark.parametrize("head", NARROW)
@pytest.mark.parametrize("beta", BETAS)
def test_equals_the_merged_head_and_its_contracted_gradient(each_backend, hidden, head, beta):
    check(problem(dtype=hidden, head=head), beta)


@pytest.mark.parametrize("beta", BETAS)
def test_double(each_backend, beta):
    check(problem(dtype=torch.float64, head=torch.float64), beta)


@pytest.mark.parametrize("beta", BETAS)
def test_slabs_change_rounding_only(each_backend, beta):
    given = problem(dtype=torch.float64, head=torch.float64)
    results = []
    for workspace in (SOME_CLASSES // 4, SOME_CLASSES, None):  # one class at a time, some, all
        leaves = [x.clone().requires_grad_() for x in (given[0], given[3])]
        loss = sm.merged_linear_softmax_kl(leaves[0], *given[1:3], leaves[1], *given[4:], workspace_bytes=workspace, beta=beta)
        loss.backward()
        results.append((loss, *(leaf.grad for leaf in leaves)))
    for cut in results[:2]:
        for one, whole in zip(cut, results[2], strict=True):
            assert_close(one, whole)


@pytest.mark.parametrize("beta", BETAS)
def test_weights_masks_and_temperatures(each_backend, beta):
    hidden, base, task_vectors, coefficients, states, heads = given = problem()
    mask, rows, v = torch.tensor([1, 1, 0, 1, 0, 1]).bool(), torch.rand(ROWS), torch.tensor([0.2, 0.8])
    expected = truth(*given, mask * rows / 4, v[:, None].expand(-1, ROWS), mask, (1.5, 3.0), beta)
    for x in (hidden, *states):
        x[~mask] = torch.nan
    leaves = [x.clone().requires_grad_() for x in (hidden, coefficients, rows)]
    options = {"mask": mask, "row_weights": leaves[2], "teacher_weights": v}
    options |= {"beta": beta, "student_temperature": 1.5, "teacher_temperature": 3.0, "workspace_bytes": SOME_CLASSES}
    loss = sm.merged_linear_softmax_kl(leaves[0], base, task_vectors, leaves[1], states, heads, **options)
    loss.backward()
    assert_close(loss, expected[0], at_least=1.0)
    assert_close(leaves[0].grad[mask], expected[1][mask])
    assert not leaves[0].grad[~mask].any()
    assert_close(leaves[1].grad, expected[2], at_least=rounding((hidden[mask], base, task_vectors)))
    assert_close(leaves[2].grad, expected[3] * mask / 4, at_least=1.0)


@pytest.mark.parametrize("beta", BETAS)
def test_classes_that_do_not_exist(each_backend, beta):
    """A bias of −inf takes a class from the teacher: its probability is 0, and so is its part of KL, but not of reverse KL."""
    hidden, base, task_vectors, coefficients, states, heads = problem(teachers=1)
    bias = torch.zeros(CLASSES)
    bias[3:20] = -torch.inf
    loss = sm.merged_linear_softmax_kl(
        hidden, base, task_vectors, coefficients, states, heads, teacher_bias=bias, workspace_bytes=SOME_CLASSES, beta=beta
    )
    head = base + torch.tensordot(coefficients, task_vectors, 1)
    expected = sm.softmax_kl(linear(hidden, head).double(), linear(states[0], heads[0], bias).double(), beta=beta)
    assert_close(loss, expected, at_least=1.0)


def test_task_vectors_may_lie_in_a_packed_matrix(each_backend):
    hidden, base, task_vectors, *others = problem()
    packed = torch.full((3, 1000), torch.nan)
    packed[:, 100 : 100 + CLASSES * WIDTH] = task_vectors.flatten(1)
    lying = packed.narrow(1, 100, CLASSES * WIDTH).unflatten(1, (CLASSES, WIDTH))
    losses = [sm.merged_linear_softmax_kl(hidden, base, vectors, *others) for vectors in (lying, task_vectors)]
    assert torch.equal(*losses)


@pytest.mark.parametrize("beta", BETAS)
def test_gradcheck(each_backend, beta):
    hidden, base, task_vectors, coefficients, states, heads = problem(dtype=torch.float64, head=torch.float64)
    leaves = [x.requires_grad_() for x in (hidden, coefficients, torch.rand(ROWS, dtype=torch.float64))]

    def loss(hidden, coefficients, rows):
        return sm.merged_linear_softmax_kl(hidden, base, task_vectors, coefficients, states, heads, row_weights=rows, beta=beta)

    assert torch.autograd.gradcheck(loss, leaves)
    grad = torch.autograd.grad(loss(*leaves), coefficients, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


def test_opcheck_and_compile(each_backend):
    hidden, base, task_vectors, coefficients, states, heads = problem()
    leaves = [x.clone().requires_grad_() for x in (hidden, coefficients)]
    arguments = (states, heads, [], None, torch.ones(ROWS).bool(), torch.ones(ROWS), 2.0, 1.5, 0.25, None)
    opcheck(OP, (hidden, base, task_vectors, coefficients, *arguments))
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")  # the other one asks for second derivatives
    opcheck(OP, (leaves[0], base, task_vectors, leaves[1], *arguments), test_utils=tests)
    step = lambda *x: sm.merged_linear_softmax_kl(x[0], base, task_vectors, x[1], states, heads, beta=0.25)
    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves)
    loss.backward()
    assert_close(loss, step(*leaves).double())
    assert_close(leaves[1].grad, torch.autograd.grad(step(*leaves), leaves[1])[0].double())


def test_memory_is_the_workspace_and_the_results():
    """The default 64 MiB, in a process of its own, where the merged head would take 184 MiB and its gradient as much."""
    script = ROOT / "tests" / "support" / "merged_linear_memory.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rise, results, head = json.loads(done.stdout)
    assert head > 2 * 64 * 2**20
    assert rise <= 64 * 2**20 + results


def test_errors_name_the_argument(each_backend):
    hidden, base, task_vectors, coefficients, states, heads = problem()
    given = {"hidden": hidden, "base": base, "task_vectors": task_vectors, "coefficients": coefficients}
    cases = [
        (ValueError, r"task_vectors has shape \[3, 37, 4\]; .* must be \[T, 37, 5\]", {"task_vectors": task_vectors[..., :4]}),
        (ValueError, r"coefficients has shape \[2\]; .* must be \[3\]", {"coefficients": coefficients[:2]}),
        (TypeError, r"coefficients is torch.float64", {"coefficients": coefficients.double()}),
        (TypeError, r"task_vectors is torch.float64", {"task_vectors": task_vectors.double()}),
        (ValueError, r"base requires grad", {"base": base.clone().requires_grad_()}),
        (ValueError, r"task_vectors requires grad", {"task_vectors": task_vectors.clone().requires_grad_()}),
        (ValueError, r"beta is 2; it must lie in 0 … 1", {"beta": 2}),
        (ValueError, r"reduction 'none'", {"reduction": "none"}),
        (ValueError, r"head has shape \[37, 4\]", {"base": base[:, :4]}),
        (ValueError, r"workspace_bytes is 99, too little for one class of 6 rows: give \d+", {"workspace_bytes": 99}),
    ]
    for error, message, options in cases:
        with pytest.raises(error, match=message):
            sm.merged_linear_softmax_kl(**given | options, teacher_hidden=states, teacher_head=heads)
