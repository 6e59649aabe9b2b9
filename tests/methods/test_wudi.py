"""WUDI in closed form against its definition."""

from dataclasses import replace

import pytest
import torch
from folders import read_all
from helpers import assert_close
from merges import TASKS, write
from tiny import make_problem

import samerge_ext as sm
from samerge_ext.checkpoints.saving import save_checkpoint
from samerge_ext.elementwise import file_pieces
from samerge_ext.elementwise.file_merge import merge_files
from samerge_ext.methods import wudi
from samerge_ext.packing.factors import FactoredTaskVectors
from samerge_ext.recipes.data_free import file_merge

SHAPES = {"tall": (7, 5), "wide": (4, 9), "kernel": (6, 2, 3, 3), "bias": (7,)}


def models(tasks=3, seed=0):
    """Base and experts as state dicts in fp64; the last task leaves one matrix as it is."""
    generator = torch.Generator().manual_seed(seed)
    drawn = lambda: {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
    base, changes = drawn(), [drawn() for _ in range(tasks)]
    changes[-1]["wide"].zero_()
    return base, {f"task{t}": {name: base[name] + change[name] for name in base} for t, change in enumerate(changes)}


def packed_of(base, experts, dtype=torch.float64):
    return sm.PackedWeights.from_state_dicts(base, experts, dtype=dtype)


def task_vectors(base, experts, name):
    return [expert[name].flatten(1) - base[name].flatten(1) for expert in experts.values()]


def objective(merged, vectors, ridge):
    """As the module's docstring has it."""
    changed = [tau for tau in vectors if tau.square().sum() > 0]
    gram = sum(tau.mT @ tau / tau.square().sum() for tau in changed)
    away = sum(((merged - tau) @ tau.mT).square().sum() / tau.square().sum() for tau in changed)
    return away + ridge * gram.diagonal().mean() * (merged - sum(vectors)).square().sum()


@pytest.mark.parametrize("ridge", [0.01, 0.3, 10.0])
@pytest.mark.parametrize("name", ["tall", "wide", "kernel"])
def test_nothing_is_nearer_to_all_tasks(name, ridge):
    base, experts = models()
    result = sm.wudi(packed_of(base, experts), ridge)
    merged = (result.state_dict()[name] - base[name]).flatten(1).requires_grad_()
    vectors = task_vectors(base, experts, name)
    objective(merged, vectors, ridge).backward()
    scale = (merged @ vectors[0].mT @ vectors[0]).norm()
    assert merged.grad.norm() < 1e-12 * scale


def test_its_parts_are_one_for_each_task():
    base, experts = models()
    packed = packed_of(base, experts)
    found = sm.preconditioned(packed, 0.3)
    assert found.base is packed.base and found.tasks == packed.tasks
    summed = found.layout.views(found.merge(found.coefficients(1.0)))
    for name, merged in found.layout.views(sm.wudi(packed, 0.3).merged).items():
        torch.testing.assert_close(merged, summed[name], rtol=1e-12, atol=1e-12)
    parts = [found.layout.views(row) for row in found.task_vectors]
    assert parts[-1]["wide"].count_nonzero() == 0
    vectors = task_vectors(base, experts, "tall")
    gram = sum(tau.mT @ tau / tau.square().sum() for tau in vectors)
    mu = 0.3 * gram.diagonal().mean()
    inverse = torch.linalg.inv(gram + mu * torch.eye(5, dtype=torch.float64))
    for part, tau in zip(parts, vectors, strict=True):
        assert_close(part["tall"], (tau @ tau.mT @ tau / tau.square().sum() + mu * tau) @ inverse, "part")


def test_vectors_are_added_up_and_so_is_all_for_a_large_ridge():
    base, experts = models()
    summed = {name: base[name] + sum(expert[name] - base[name] for expert in experts.values()) for name in base}
    assert_close(sm.wudi(packed_of(base, experts)).state_dict()["bias"], summed["bias"], "bias")
    far = sm.wudi(packed_of(base, experts), 1e9).state_dict()
    for name in base:
        torch.testing.assert_close(far[name], summed[name], rtol=1e-7, atol=1e-7)


def test_one_expert_is_itself():
    base, experts = models(tasks=1)
    experts = {"task0": {name: tensor + 1 for name, tensor in base.items()}}
    merged = sm.wudi(packed_of(base, experts)).state_dict()
    for name in base:
        torch.testing.assert_close(merged[name], experts["task0"][name], rtol=1e-12, atol=1e-12)


def test_matrices_may_be_stored_the_other_way_round():
    base, experts = models()
    turned = lambda model: {"turned": model["tall"].mT.contiguous(), "tall": model["tall"]}
    packed = packed_of(turned(base), {task: turned(model) for task, model in experts.items()})
    merged = sm.wudi(packed, transposed="turn*").state_dict()
    torch.testing.assert_close(merged["turned"].mT, merged["tall"], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(sm.wudi(packed).state_dict()["turned"].mT, merged["tall"])


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_other_types_are_as_exact_as_they_can_be(dtype, rtol):
    base, experts = models()
    stored = packed_of(base, experts, dtype)
    exact = sm.PackedWeights.from_state_dicts(base, experts, dtype=torch.float64)
    exact.base.copy_(stored.base)
    exact.task_vectors.copy_(stored.task_vectors)
    found, truth = sm.preconditioned(stored), sm.preconditioned(exact)
    assert found.task_vectors.dtype == dtype
    assert (found.task_vectors.double() - truth.task_vectors).norm() < rtol * truth.task_vectors.norm()


def test_teachers_are_the_experts_as_they_were():
    base, experts, packed, *_ = make_problem()
    found = sm.preconditioned(packed)
    assert not torch.equal(found.task_vectors, packed.task_vectors)
    model = sm.MergedModel(base, found, found.coefficients(1.0))
    for task, expert in experts.items():
        with model.teacher(task) as teacher:
            for (name, parameter), tensor in zip(teacher.named_parameters(), expert.parameters(), strict=True):
                assert_close(parameter.detach(), tensor.detach(), name)


RANKS = (2, 1, 3)


def of_factors(own_tensor=False, seed=5):
    """The same weights in fp64 as a tensor and as factors; of one matrix a task changes nothing, or has its own tensor."""
    generator = torch.Generator().manual_seed(seed)
    drawn = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    base = {name: drawn(*shape) for name, shape in SHAPES.items()}
    changes = {name: [] for name in SHAPES}
    for name, shape in SHAPES.items():
        for task, rank in enumerate(RANKS):
            change = (drawn(shape[0], rank), drawn(rank, torch.Size(shape[1:]).numel()))
            if len(shape) == 1:
                change = drawn(*shape)
            elif name == "wide" and task == 1:
                change = drawn(*shape) if own_tensor else None
            changes[name].append(change)

    def tuned(name, change):
        product = change[0] @ change[1] if isinstance(change, tuple) else change
        return base[name] if change is None else base[name] + product.view(SHAPES[name])

    experts = {f"task{t}": {name: tuned(name, changes[name][t]) for name in base} for t in range(len(RANKS))}
    packed = packed_of(base, experts)
    stored = {layer: tuple(changes[name]) for layer, name in enumerate(packed.layout.names)}
    factors = FactoredTaskVectors(packed.layout, stored, len(RANKS), torch.float64)
    return packed, replace(packed, task_vectors=factors)


def test_matrices_may_be_added_up_as_vectors_are():
    packed, factored = of_factors()
    summed, solved = (packed.layout.views(sm.wudi(packed, 0.2, summed=out).merged) for out in ("wi*", ()))
    plain = packed.layout.views(packed.merge(packed.coefficients(1.0)))
    torch.testing.assert_close(summed["wide"], plain["wide"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(summed["tall"], solved["tall"], rtol=0, atol=0)
    assert not torch.allclose(solved["wide"], plain["wide"])
    for name, found in packed.layout.views(sm.wudi(factored, 0.2, summed="wi*").merged).items():
        torch.testing.assert_close(found, summed[name], rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="'embed' fits no matrix"):
        sm.wudi(packed, summed="embed")


@pytest.mark.parametrize("transposed", [(), "*ll"])
@pytest.mark.parametrize("own_tensor", [False, True])
def test_factors_are_solved_for_as_factors(own_tensor, transposed):
    packed, factored = of_factors(own_tensor)
    expected, found = (sm.preconditioned(p, 0.2, transposed=transposed) for p in (packed, factored))
    torch.testing.assert_close(found.in_memory().task_vectors, expected.task_vectors, rtol=1e-10, atol=1e-10)
    for layer, name in enumerate(packed.layout.names):
        for change, before in zip(found.task_vectors.changes[layer], factored.task_vectors.changes[layer], strict=True):
            if isinstance(change, tuple):
                assert change[0].shape[1] == (0 if before is None else before[0].shape[1]) and name != "bias"
    torch.testing.assert_close(
        sm.wudi(factored, 0.2, 0.7, transposed=transposed).merged,
        sm.wudi(packed, 0.2, 0.7, transposed=transposed).merged,
        rtol=1e-10, atol=1e-10,
    )  # fmt: skip
    with found.expert_source("task1") as expert, expected.expert_source("task1") as dense:
        for name in SHAPES:
            torch.testing.assert_close(expert.read(name), dense.read(name), rtol=1e-12, atol=1e-12)


def test_factors_that_hold_nan_and_patterns_that_fit_none_of_them_are_refused():
    _, factored = of_factors()
    with pytest.raises(ValueError, match="'c_attn' fits no matrix; the last are"):
        sm.wudi(factored, transposed="c_attn")
    factored.task_vectors.changes[0][1][0][1, 0] = torch.nan
    with pytest.raises(ValueError, match="'tall' of a task vector holds NaN or Inf"):
        sm.preconditioned(factored)


def of_files(models, out, **parameters):
    experts = [(task, models / task, {}) for task in TASKS]
    return read_all(merge_files(file_merge("wudi", experts, models / "base", parameters, identity={}), out))


TURNED = {"transposed": [{"filter": "layers.1.w", "value": True}, {"value": False}]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_give_what_packed_weights_give(tmp_path, monkeypatch, dtype):
    """Also where a matrix comes in many pieces of whole rows, and of one that is stored the other way round."""
    monkeypatch.setitem(file_pieces.BUFFER_BYTES, "cpu", 1)
    shapes = {"embed": (900, 300), "layers.0.w": (40, 50), "layers.0.b": (50,), "layers.1.w": (40, 50), "kernel": (8, 3, 5, 5)}
    models = write(tmp_path, shapes, dtype)
    found = of_files(models, tmp_path / "out", ridge=0.2, **{"lambda": 0.8}, **TURNED)
    packed = sm.PackedWeights.from_folders(models / "base", {task: models / task for task in TASKS}, dtype=torch.float64)
    expected = sm.wudi(packed, 0.2, 0.8, transposed="layers.1.w").state_dict()
    for name, tensor in found.items():
        assert tensor.dtype == dtype
        assert_close(tensor, expected[name].double(), name)


def test_files_are_merged_one_matrix_at_a_time(tmp_path, monkeypatch):
    """What is held of a matrix is let go when it is merged, and no two are merged at once."""
    held, most = set(), []
    factor = wudi.Wudi.next_round
    merge = wudi.Wudi.merge

    def next_round(rule):
        factor(rule)
        held.add(rule)
        most.append(len(held))

    def merged(rule, piece):
        result = merge(rule, piece)
        if rule._grams is None and rule._factor is None:
            held.discard(rule)
        return result

    monkeypatch.setattr(wudi.Wudi, "next_round", next_round)
    monkeypatch.setattr(wudi.Wudi, "merge", merged)
    of_files(write(tmp_path), tmp_path / "out")
    assert most == [1, 1, 1] and not held


def test_files_that_hold_nan_are_named(tmp_path):
    models = write(tmp_path, dtype=torch.float32)
    broken = read_all(models / "spam")
    broken["layers.0.w"][3, 4] = torch.nan
    save_checkpoint(models / "spam", broken, overwrite=True, companions_from=models / "spam")
    with pytest.raises(ValueError, match=r"spam.*layers\.0\.w"):
        of_files(models, tmp_path / "out")


def test_what_it_cannot_solve_is_refused():
    base, experts = models()
    for ridge in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="ridge=.* must be positive and finite"):
            sm.wudi(packed_of(base, experts), ridge)
    with pytest.raises(ValueError, match="'c_attn' fits no matrix; the last are"):
        sm.wudi(packed_of(base, experts), transposed=["tall", "c_attn"])
    broken = packed_of(base, experts)
    broken.layout.views(broken.task_vectors[1])["tall"][2, 3] = torch.nan
    for method in (sm.preconditioned, sm.wudi):
        with pytest.raises(ValueError, match="'tall' of a task vector holds NaN or Inf"):
            method(broken)
    few = {name: tensor.expand(9, 9).clone() for name, tensor in {"w": torch.ones(1, 1, dtype=torch.float64)}.items()}
    with pytest.raises(ValueError, match="'w': the equations are singular.*raise ridge"):
        sm.wudi(packed_of({"w": torch.zeros(9, 9, dtype=torch.float64)}, {"a": few}), 1e-300)
    quantised = sm.PackedWeights.from_state_dicts(base, experts, dtype=torch.float32, task_vector_dtype="int8")
    for method in (sm.preconditioned, sm.wudi):
        with pytest.raises(ValueError, match="needs task vectors that are not quantised"):
            method(quantised)


def test_its_scale_is_that_of_the_sum():
    packed = make_problem()[2]
    whole, half = sm.wudi(packed), sm.wudi(packed, scale=0.5)
    assert half.method == "wudi" and half.coefficients is None
    assert_close(half.merged - packed.base, 0.5 * (whole.merged - packed.base), "half")
