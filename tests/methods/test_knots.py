"""KnOTS beside its definition, written with torch.linalg.svd in fp64: on whole task vectors and on factors."""

import pytest
import torch
from helpers import assert_close, largest_kept
from matrices import SHAPES, adapters, assert_near, change_of, models, packed_of, task_vectors, whole_vectors
from tiny import make_problem

import samerge_ext as sm

NAMES = tuple(SHAPES)


def literal_knots(vectors, density, scale=1.0, weights=None):
    """vectors: name -> T matrices [m, n]. TIES over all coefficients of a task, as one vector."""
    bases, coefficients = {}, {}
    for name, taus in vectors.items():
        u, s, vh = torch.linalg.svd(torch.cat(taus, 1), full_matrices=False)
        u, s, vh = u[:, s > 1e-6 * s[0]], s[s > 1e-6 * s[0]], vh[s > 1e-6 * s[0]]
        bases[name], coefficients[name] = u, (torch.diag(s) @ vh).split(taus[0].shape[1], 1)
    tasks = len(next(iter(coefficients.values())))
    rows = [torch.cat([coefficients[name][t].flatten() for name in vectors]) for t in range(tasks)]
    kept = torch.stack([row * largest_kept(row, int(density * row.numel())) for row in rows])
    weights = torch.ones(tasks, dtype=kept.dtype) if weights is None else torch.tensor(weights, dtype=kept.dtype)
    agree = (kept.sign() == (weights[:, None] * kept).sum(0).sign()) * (kept != 0) * weights[:, None]
    merged = scale * (agree * kept).sum(0) / agree.sum(0).clamp(min=1e-300)
    parts = merged.split([coefficients[name][0].numel() for name in vectors])
    return {name: bases[name] @ part.view(-1, vectors[name][0].shape[1]) for name, part in zip(vectors, parts, strict=True)}


def vectors_of(base, experts):
    found = {name: task_vectors(base, experts, name) for name in base}
    return {name: [tau if tau.dim() > 1 else tau[None] for tau in taus] for name, taus in found.items()}


@pytest.mark.parametrize(("density", "weights"), [(1.0, None), (0.4, None), (0.4, [1.0, 2.0, 0.5])])
@pytest.mark.parametrize("rank", [None, 2])
def test_it_is_ties_in_a_shared_basis(density, weights, rank):
    base, experts = models(rank=rank)
    result = sm.knots(packed_of(base, experts), density, 0.7, weights=weights or 1.0)
    assert result.method == "knots" and result.coefficients is None
    truth = literal_knots(vectors_of(base, experts), density, 0.7, weights)
    for name in base:
        assert_near(change_of(result, base, name).view_as(truth[name]), truth[name], name)


def test_all_of_one_expert_is_itself():
    base, experts = models(tasks=1)
    result = sm.knots(packed_of(base, experts), 1.0)
    for name in base:
        assert_near(result.state_dict()[name], experts["task0"][name], name)


def test_matrices_may_be_stored_the_other_way_round():
    base, experts = models()
    turned = lambda model: {**model, "tall": model["tall"].mT.contiguous()}
    plain = sm.knots(packed_of(base, experts), 0.4)
    found = sm.knots(packed_of(turned(base), {t: turned(e) for t, e in experts.items()}), 0.4, transposed="tall")
    assert_near(found.state_dict()["tall"].mT, plain.state_dict()["tall"], "tall")


@pytest.mark.parametrize("transposed", [(), "second*"])
def test_factors_are_not_multiplied_out(tmp_path, monkeypatch, transposed):
    base, packed = adapters(tmp_path)
    vectors = {name: [tau if tau.dim() > 1 else tau[None] for tau in taus] for name, taus in whole_vectors(packed).items()}
    if transposed:
        vectors["second.weight"] = [tau.mT for tau in vectors["second.weight"]]
    truth = literal_knots(vectors, 0.4)
    monkeypatch.setattr(type(packed.task_vectors), "read_into", None)
    result = sm.knots(packed, 0.4, transposed=transposed)
    for name, merged in packed.layout.views(result.merged).items():
        change = truth[name].mT if transposed and name == "second.weight" else truth[name]
        expected = base[name].double() + change.reshape(base[name].shape)
        assert_close(merged, expected, name)
        assert (expected - base[name]).norm() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types_are_as_exact_as_they_can_be(dtype):
    base, experts = models()
    stored = packed_of(base, experts, dtype)
    exact = packed_of(base, experts)
    exact.base.copy_(stored.base)
    exact.task_vectors.copy_(stored.task_vectors)
    found = sm.knots(stored, 0.5).merged
    assert found.dtype == dtype
    assert_close(found, sm.knots(exact, 0.5).merged, "knots")


def test_a_module_takes_the_weights_on():
    base, _, packed, *_ = make_problem()
    result = sm.knots(packed, module=base)
    assert torch.equal(base.second.weight, packed.layout.views(result.merged)["second.weight"])


def test_what_it_cannot_merge_is_refused():
    base, experts = models()
    with pytest.raises(ValueError, match="density=1.5 is not a number from 0.0 to 1.0"):
        sm.knots(packed_of(base, experts), 1.5)
    with pytest.raises(ValueError, match="pattern 'c_attn' fits no matrix; the last are"):
        sm.knots(packed_of(base, experts), transposed=["tall", "c_attn"])
    broken = packed_of(base, experts)
    broken.layout.views(broken.task_vectors[1])["tall"][2, 3] = torch.inf
    with pytest.raises(ValueError, match="'tall' of a task vector holds NaN or Inf"):
        sm.knots(broken)
    quantised = packed_of(base, experts, torch.float32, task_vector_dtype="int8")
    with pytest.raises(ValueError, match="knots needs task vectors that are not quantised"):
        sm.knots(quantised)
