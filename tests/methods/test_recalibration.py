"""Subspace boosting and singular value calibration beside their definitions, written with torch.linalg.svd in fp64."""

from functools import partial

import pytest
import torch
from helpers import assert_close
from matrices import MATRICES, assert_near, change_of, models, packed_of, task_vectors
from tiny import make_problem

import samerge_ext as sm

svd = partial(torch.linalg.svd, full_matrices=False)


def boosted(merged, beta):
    u, s, vh = svd(merged)
    k = int((s.cumsum(0) / s.sum() >= beta).nonzero()[0])
    return u @ torch.diag(s.clamp(min=s[k])) @ vh


def calibrated(merged, vectors, alpha):
    u, s, vh = svd(merged)
    factors = []
    for r in range(len(s)):
        along = []
        for tau in vectors:
            whole, own = u[:, r] @ merged, u[:, r] @ tau
            along.append(max(alpha, float(whole @ own / (own @ own))))
        factors.append(len(vectors) / sum(along))
    return u @ torch.diag(torch.tensor(factors, dtype=s.dtype) * s) @ vh


def merged_by(merge, packed, base, name):
    return change_of(merge(packed), base, name)


MERGES = {"task_arithmetic": sm.task_arithmetic, "ties": partial(sm.ties, density=0.5), "tsv_m": sm.tsv_m}
METHODS = (sm.subspace_boosting, sm.svc)


@pytest.mark.parametrize("merge", [MERGES["task_arithmetic"], MERGES["ties"]], ids=["task_arithmetic", "ties"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.7, 0.95])
def test_small_values_are_raised(merge, beta):
    base, experts = models()
    packed = packed_of(base, experts)
    found = sm.subspace_boosting(packed, beta, merge=merge)
    for name in MATRICES:
        assert_near(change_of(found, base, name), boosted(merged_by(merge, packed, base, name), beta), name, 1e-10)


def test_what_has_no_length_is_not_raised():
    base, experts = models(rank=1)
    packed = packed_of(base, experts)
    u, s, vh = svd(change_of(sm.task_arithmetic(packed), base, "square"))
    raised = change_of(sm.subspace_boosting(packed, 0.0), base, "square")
    assert_near(raised, s[0] * u[:, :3] @ vh[:3], "square")


def test_all_of_the_values_leave_them_as_they_are():
    base, experts = models()
    packed = packed_of(base, experts)
    whole, plain = sm.subspace_boosting(packed, 1.0), sm.task_arithmetic(packed)
    for name in base:
        assert_near(change_of(whole, base, name), change_of(plain, base, name), name)


@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_directions_count_once(merge, alpha):
    base, experts = models()
    packed = packed_of(base, experts)
    found = sm.svc(packed, alpha, merge=merge)
    for name in MATRICES:
        truth = calibrated(merged_by(merge, packed, base, name), task_vectors(base, experts, name), alpha)
        assert_near(change_of(found, base, name), truth, name, 1e-10)


def test_a_sum_of_equal_experts_is_calibrated_to_one():
    base, experts = models(tasks=1)
    same = {f"task{t}": experts["task0"] for t in range(4)}
    found = sm.svc(packed_of(base, same), merge=partial(sm.task_arithmetic, scale=1.0))
    for name in MATRICES:
        assert_near(change_of(found, base, name), task_vectors(base, experts, name)[0], name, 1e-10)


def test_a_task_that_changed_nothing_counts_as_alpha():
    base, experts = models(tasks=2)
    experts["task1"]["tall"] = base["tall"].clone()
    found = sm.svc(packed_of(base, experts), 0.5, merge=partial(sm.task_arithmetic, scale=1.0))
    tau = task_vectors(base, experts, "tall")[0]
    assert_near(change_of(found, base, "tall"), tau * 2 / (1.0 + 0.5), "tall", 1e-10)


def test_directions_are_those_of_the_outputs():
    base, experts = models()
    turned = lambda model: {"turned": model["wide"].mT.contiguous(), **model}
    packed = packed_of(turned(base), {task: turned(model) for task, model in experts.items()})
    found = sm.svc(packed, 0.1, transposed="turn*")
    truth = change_of(found, turned(base), "wide")
    assert_near(change_of(found, turned(base), "turned").mT, truth, "turned")
    assert (change_of(sm.svc(packed, 0.1), turned(base), "turned").mT - truth).norm() > 0.01 * truth.norm()


@pytest.mark.parametrize("method", METHODS)
def test_all_else_stays_as_it_was_merged(method):
    base, experts = models()
    packed = packed_of(base, experts)
    plain = sm.ties(packed, density=0.5)
    found = method(packed, merge=MERGES["ties"], left_out=["squ*", "kernel"])
    assert found.method == f"ties+{method.__name__}" and found.coefficients is None
    for name in ("bias", "square", "kernel"):
        assert_near(change_of(found, base, name), change_of(plain, base, name), name)
    assert (change_of(found, base, "tall") - change_of(plain, base, "tall")).norm() > 0.01


def test_a_merge_is_not_rounded_before():
    """Rounded to the weights' bf16, experts of low rank would have all directions, of no length, to be raised."""
    base, experts = models(rank=1)
    exact = packed_of(base, experts)
    stored = packed_of(base, experts, torch.bfloat16, task_vector_dtype=torch.float32)
    stored.task_vectors.copy_(exact.task_vectors)
    for packed in (exact, stored):
        packed.base.zero_()
    found = sm.subspace_boosting(stored, 0.0).merged
    assert found.dtype == torch.bfloat16
    assert_close(found, sm.subspace_boosting(exact, 0.0).merged, "boosted")


@pytest.mark.parametrize("method", METHODS)
def test_a_module_takes_the_weights_on(method):
    base, _, packed, *_ = make_problem()
    result = method(packed, module=base)
    assert torch.equal(base.second.weight, packed.layout.views(result.merged)["second.weight"])
    views = [packed.layout.views(row)["second.bias"] for row in (result.merged, sm.task_arithmetic(packed).merged)]
    torch.testing.assert_close(*views, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("method", METHODS)
def test_what_it_cannot_merge_is_refused(method):
    base, experts = models()
    with pytest.raises(ValueError, match="pattern 'c_attn' fits no matrix; the last are"):
        method(packed_of(base, experts), left_out=["tall", "c_attn"])
    broken = packed_of(base, experts)
    broken.layout.views(broken.task_vectors[1])["tall"][2, 3] = torch.inf
    with pytest.raises(ValueError, match="'tall' of the merge or a task vector holds NaN or Inf"):
        method(broken)


def test_settings_and_stores_that_do_not_fit_are_refused():
    base, experts = models()
    for beta in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="beta=.* is not a share from 0 to 1"):
            sm.subspace_boosting(packed_of(base, experts), beta)
    for alpha in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="alpha=.*; it must be positive and finite"):
            sm.svc(packed_of(base, experts), alpha)
    quantised = packed_of(base, experts, torch.float32, task_vector_dtype="int8")
    with pytest.raises(ValueError, match="svc needs task vectors that are not quantised"):
        sm.svc(quantised)
    assert sm.subspace_boosting(quantised).method == "task_arithmetic+subspace_boosting"
