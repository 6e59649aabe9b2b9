"""TSV-Merge, Iso-C and Iso-CTS beside their definitions, written with torch.linalg.svd in fp64."""

from functools import partial

import pytest
import torch
from helpers import assert_close
from matrices import MATRICES, adapters, assert_near, change_of, models, packed_of, task_vectors, whole_vectors
from tiny import make_problem

import samerge_ext as sm

svd = partial(torch.linalg.svd, full_matrices=False)


def polar(matrix):
    u, _, vh = svd(matrix)
    return u @ vh


def literal_tsv_m(vectors):
    kept = max(1, min(vectors[0].shape) // len(vectors))
    parts = [svd(tau) for tau in vectors]
    u = polar(torch.cat([u[:, :kept] for u, _, _ in parts], 1))
    v = polar(torch.cat([vh[:kept] for _, _, vh in parts], 0))
    return u @ torch.diag(torch.cat([s[:kept] for _, s, _ in parts])) @ v


def literal_iso_c(vectors):
    u, s, vh = svd(sum(vectors))
    return u @ torch.diag(s.mean().expand(len(s))) @ vh


def literal_iso_cts(vectors, fraction):
    """As published: what is common is made smaller until the rest is the same for every task."""
    tasks, rank = len(vectors), min(vectors[0].shape)
    rest = round((rank - int(rank * fraction)) / tasks) * tasks
    common = rank - rest
    u, s, vh = svd(sum(vectors))
    us, ss, vhs = [u[:, :common]], [s[:common]], [vh[:common]]
    for tau in vectors:
        own_u, own_s, own_vh = svd(tau - us[0] @ us[0].mT @ tau)
        us.append(own_u[:, : rest // tasks])
        ss.append(own_s[: rest // tasks])
        vhs.append(own_vh[: rest // tasks])
    return torch.cat(ss).mean() * polar(torch.cat(us, 1)) @ polar(torch.cat(vhs, 0))


CASES = {
    "tsv_m": (sm.tsv_m, literal_tsv_m),
    "iso_c": (sm.iso_c, literal_iso_c),
    "iso_cts": (sm.iso_cts, partial(literal_iso_cts, fraction=0.8)),
    "iso_cts, half": (partial(sm.iso_cts, common=0.5), partial(literal_iso_cts, fraction=0.5)),
}
METHODS = (sm.tsv_m, sm.iso_c, sm.iso_cts)


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("tasks", [1, 2, 3])
@pytest.mark.parametrize("case", CASES)
def test_it_is_what_its_paper_says(case, tasks, name):
    method, literal = CASES[case]
    base, experts = models(tasks)
    truth = literal(task_vectors(base, experts, name))
    assert_near(change_of(method(packed_of(base, experts)), base, name), truth, name)


@pytest.mark.parametrize("method", METHODS)
def test_vectors_are_averaged_and_all_is_scaled(method):
    base, experts = models()
    whole, half = method(packed_of(base, experts)), method(packed_of(base, experts), 0.5)
    assert whole.method == method.__name__ and whole.coefficients is None
    mean = sum(task_vectors(base, experts, "bias")) / 3
    assert_near(change_of(whole, base, "bias"), mean, "bias")
    for name in base:
        assert_near(change_of(half, base, name), 0.5 * change_of(whole, base, name), name)


@pytest.mark.parametrize("method", METHODS)
def test_matrices_may_be_averaged_too(method):
    base, experts = models()
    averaged = method(packed_of(base, experts), averaged=["squ*", "kernel"])
    for name in ("square", "kernel"):
        assert_near(change_of(averaged, base, name), sum(task_vectors(base, experts, name)) / 3, name)
    whole = method(packed_of(base, experts))
    assert_near(change_of(averaged, base, "tall"), change_of(whole, base, "tall"), "tall")


def test_more_tasks_than_directions_keep_one_each():
    base, experts = models(tasks=9)
    result = sm.tsv_m(packed_of(base, experts))
    for name in MATRICES:
        assert_near(change_of(result, base, name), literal_tsv_m(task_vectors(base, experts, name)), name)


def test_one_expert_is_itself_and_isotropic_otherwise():
    base, experts = models(tasks=1)
    for name in MATRICES:
        (tau,) = task_vectors(base, experts, name)
        assert_near(change_of(sm.tsv_m(packed_of(base, experts)), base, name), tau, name)
        values = torch.linalg.svdvals(change_of(sm.iso_c(packed_of(base, experts)), base, name))
        torch.testing.assert_close(values, torch.linalg.svdvals(tau).mean().expand_as(values), rtol=1e-10, atol=0)


def test_experts_of_low_rank_add_no_directions():
    """Where LAPACK takes arbitrary vectors for those of no length, there are none."""
    base, experts = models(rank=1)
    packed = packed_of(base, experts)
    for name in ("square", "tall", "kernel"):
        vectors = task_vectors(base, experts, name)
        (u, s, vh), rank = svd(sum(vectors)), len(vectors)
        iso = s.sum() / len(s) * u[:, :rank] @ vh[:rank]  # the mean is over all directions, as in the paper
        assert_near(change_of(sm.iso_c(packed), base, name), iso, name)
        parts = [svd(tau) for tau in vectors]
        u, v = polar(torch.cat([u[:, :1] for u, _, _ in parts], 1)), polar(torch.cat([vh[:1] for _, _, vh in parts], 0))
        assert_near(change_of(sm.tsv_m(packed), base, name), u @ torch.diag(torch.stack([s[0] for _, s, _ in parts])) @ v, name)


def test_rounding_is_not_taken_for_directions_of_the_tasks():
    """Of experts of low rank all is common: what is left for their own is nothing but rounding."""
    base, experts = models(rank=1)
    for dtype in (torch.float64, torch.float32):
        packed = packed_of(base, experts, dtype)
        assert_close(sm.iso_cts(packed, common=0.5).merged, sm.iso_c(packed).merged.double(), str(dtype))


@pytest.mark.parametrize("case", CASES)
def test_factors_are_decomposed_as_they_are(tmp_path, case):
    """Adapters of rank 2, 3 and 2, the last without the second matrix: as whole matrices, but for their null directions."""
    method, _ = CASES[case]
    base, packed = adapters(tmp_path)
    vectors = whole_vectors(packed)
    base = {name: base[name].double() for name in vectors}
    experts = {task: {name: base[name] + taus[t] for name, taus in vectors.items()} for t, task in enumerate(packed.tasks)}
    whole = packed_of(base, experts)
    truth = method(whole).state_dict()
    found = method(packed).state_dict()
    for name in base:
        assert_close(found[name], truth[name], name)
        assert (truth[name] - base[name]).norm() > 1e-2


def test_what_two_experts_share_is_there_once():
    base, experts = models(tasks=1)
    twice = {"a": experts["task0"], "b": experts["task0"]}
    (u, s, vh), kept = svd(task_vectors(base, experts, "square")[0]), 6
    truth = u[:, :kept] * s[:kept] @ vh[:kept]
    assert_near(change_of(sm.tsv_m(packed_of(base, twice)), base, "square"), truth, "square")


def test_only_the_side_of_the_outputs_is_cleared_of_what_is_common():
    base, experts = models()
    turned = lambda model: {"turned": model["square"].mT.contiguous(), **model}
    packed = packed_of(turned(base), {task: turned(model) for task, model in experts.items()})
    merged = sm.iso_cts(packed, common=0.5, transposed="turn*")
    truth = change_of(merged, turned(base), "square")
    assert_near(change_of(merged, turned(base), "turned").mT, truth, "turned")
    assert (change_of(sm.iso_cts(packed, common=0.5), turned(base), "turned").mT - truth).norm() > 0.01 * truth.norm()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types_are_as_exact_as_they_can_be(method, dtype):
    base, experts = models()
    stored = packed_of(base, experts, dtype)
    exact = packed_of(base, experts)
    exact.base.copy_(stored.base)
    exact.task_vectors.copy_(stored.task_vectors)
    found = method(stored).merged
    assert found.dtype == dtype
    assert_close(found, method(exact).merged, method.__name__)


def test_a_module_takes_the_weights_on():
    base, _, packed, *_ = make_problem()
    result = sm.tsv_m(packed, module=base)
    assert result.module is base
    assert torch.equal(base.second.weight, packed.layout.views(result.merged)["second.weight"])


@pytest.mark.parametrize("method", METHODS)
def test_what_it_cannot_merge_is_refused(method):
    base, experts = models()
    with pytest.raises(ValueError, match="pattern 'c_attn' fits no matrix; the last are"):
        method(packed_of(base, experts), averaged=["tall", "c_attn"])
    with pytest.raises(ValueError, match="coefficients hold NaN or Inf"):
        method(packed_of(base, experts), float("nan"))
    broken = packed_of(base, experts)
    broken.layout.views(broken.task_vectors[1])["tall"][2, 3] = torch.inf
    with pytest.raises(ValueError, match="'tall' of a task vector holds NaN or Inf"):
        method(broken)
    quantised = packed_of(base, experts, torch.float32, task_vector_dtype="int8")
    with pytest.raises(ValueError, match=f"{method.__name__} needs task vectors that are not quantised"):
        method(quantised)


def test_a_share_is_one():
    base, experts = models()
    for common in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="common=.* is not a share from 0 to 1"):
            sm.iso_cts(packed_of(base, experts), common=common)
    for common in (0.0, 1.0):  # rounded up, what is the tasks' own would be more than there is
        for name in MATRICES:
            values = torch.linalg.svdvals(change_of(sm.iso_cts(packed_of(base, experts), common=common), base, name))
            torch.testing.assert_close(values, values[:1].expand_as(values), rtol=1e-9, atol=0)
