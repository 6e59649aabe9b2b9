"""Quantised task vectors from packing to a merge: what is stored, teachers, methods, memory."""

import packing_memory
import pytest
import tiny
import torch
from helpers import MOMENTS_TOLERANCE_FP32, QUANTISED_LOSS, SIGMA_TOLERANCE, assert_close
from safetensors.torch import save_file

import samerge_ext as sm
from samerge_ext.budget.plan import plan
from samerge_ext.learning.calibration import Calibration
from samerge_ext.learning.teachers import teacher_logits
from samerge_ext.packing.quantised import FORMATS, QuantisedTaskVectors
from samerge_ext.statistics.features import weights_digest

FORMS = tuple(FORMATS)


@pytest.fixture
def base():
    return tiny.make(0, torch.float32)


@pytest.fixture
def experts(base):
    return tiny.make_experts(base)


def save(base, experts, folder):
    """Base and experts as model folders."""
    for name, module in {"base": base, **experts}.items():
        (folder / name).mkdir()
        tensors = {n: t.clone() for n, t in module.state_dict().items() if n != "tied.weight"}
        save_file(tensors, folder / name / "model.safetensors")
    return folder / "base", {task: folder / task for task in experts}


@pytest.mark.parametrize("form", FORMS)
def test_packing_quantises_what_packing_in_fp32_holds(base, experts, form):
    exact = sm.PackedWeights.from_modules(base, experts)
    stored = sm.PackedWeights.from_modules(base, experts, task_vector_dtype=form).task_vectors
    whole = QuantisedTaskVectors.of(exact.task_vectors, form)
    assert torch.equal(stored.dequantise(), whole.dequantise())
    assert stored.shape == exact.task_vectors.shape


@pytest.mark.parametrize("form", FORMS)
def test_teachers_are_the_experts_themselves(base, experts, form, tmp_path):
    """Not their quantised task vectors: packed from modules, from state dicts and from folders."""
    heads, batches = tiny.make_heads(torch.float32), tiny.make_batches(dtype=torch.float32)
    states = {task: expert.state_dict() for task, expert in experts.items()}
    folders = save(base, experts, tmp_path)
    for weights in (
        sm.PackedWeights.from_modules(base, experts, task_vector_dtype=form),
        sm.PackedWeights.from_state_dicts(base.state_dict(), states, task_vector_dtype=form),
        sm.PackedWeights.from_folders(*folders, task_vector_dtype=form),
        sm.PackedWeights.from_folders(*folders, task_vector_dtype=form, file=tmp_path / "packed"),
    ):
        for streamed in (False, True):
            held = weights if streamed else weights.in_memory()
            model = sm.MergedModel(tiny.make(1, torch.float32), held, streamed=streamed)
            before = model(batches["red"][0])
            found = teacher_logits(model, Calibration(batches, weights.tasks), tiny.plain(heads), "fp32")
            for task, expert in experts.items():
                with torch.no_grad():
                    for batch, logits in zip(batches[task], found[task], strict=True):
                        assert_close(logits, (expert(batch) @ heads[task]).double())
            assert torch.equal(model(batches["red"][0]), before), "merged again"


def test_without_its_expert_a_teacher_is_what_is_stored(base, experts):
    packed = sm.PackedWeights.from_modules(base, experts, task_vector_dtype="int4")
    packed.experts = {}
    model = sm.MergedModel(tiny.make(1, torch.float32), packed)
    with model.teacher("blue"):
        assert torch.equal(model.merged, packed.merge(packed.one_hot("blue")))


def test_an_expert_that_is_no_longer_there_is_named(base, experts, tmp_path):
    packed = sm.PackedWeights.from_folders(*save(base, experts, tmp_path), task_vector_dtype="int8")
    model = sm.MergedModel(tiny.make(1, torch.float32), packed)
    shape = {n: torch.zeros(2) for n in base.state_dict()}
    save_file(shape, tmp_path / "red/model.safetensors")
    changed = r"expert 'red'.*'first.bias' was \[8\] when packed and is \[2\] now"
    with pytest.raises(ValueError, match=changed), model.teacher("red"):
        pass
    (tmp_path / "red/model.safetensors").unlink()
    with pytest.raises(ValueError, match="red"), model.teacher("red"):
        pass


@pytest.mark.parametrize("method", ("samerging", "adamerging", "statsmerging"))
@pytest.mark.parametrize("form", FORMS)
def test_learned_methods_run_and_learn_nearly_the_same(base, experts, form, method):
    heads, batches = tiny.make_heads(torch.float32), tiny.make_batches(dtype=torch.float32)
    names = {"samerging": "SAMerging", "adamerging": "AdaMerging", "statsmerging": "StatsMerging"}
    config = getattr(sm, f"{names[method]}Config")
    found = {}
    for dtype in (torch.float32, form):
        packed = sm.PackedWeights.from_modules(base, experts, task_vector_dtype=dtype)
        settings = config(steps=5, learning_rate=1e-2, progress=False)
        logits = tiny.shared_encoder(heads)
        result = getattr(sm, method)(tiny.make(1, torch.float32), packed, batches, logits, config=settings)
        found[dtype] = result.history[-1]["loss"]
    assert abs(found[form] - found[torch.float32]) < QUANTISED_LOSS[form] * abs(found[torch.float32])


@pytest.mark.parametrize("form", FORMS)
def test_codes_in_a_file_give_the_merge_of_codes_in_memory(base, experts, form, tmp_path):
    folders, heads = save(base, experts, tmp_path), tiny.make_heads(torch.float32)
    batches, logits = tiny.make_batches(dtype=torch.float32), tiny.shared_encoder(heads)
    config = sm.SAMergingConfig(steps=4, learning_rate=1e-2, progress=False, streamed=True)
    found = []
    for file in (None, tmp_path / "packed"):
        packed = sm.PackedWeights.from_folders(*folders, task_vector_dtype=form, file=file)
        found.append(sm.samerging(tiny.make(1, torch.float32), packed, batches, logits, config=config).coefficients)
    assert torch.equal(*found) and not torch.equal(found[0], packed.coefficients(0.3))
    assert packed.task_vectors.nbytes == packed.in_memory().task_vectors.nbytes
    ways = plan(tiny.make(1, torch.float32), packed, batches, logits, config).ways
    assert "file" in [way.store for way in ways]


def test_a_run_does_not_continue_on_task_vectors_of_another_form(base, experts, tmp_path):
    heads, batches = tiny.make_heads(torch.float32), tiny.make_batches(dtype=torch.float32)
    config = sm.AdaMergingConfig(steps=1, progress=False, checkpoint_dir=tmp_path)
    for form in ("int8", "int8"):
        packed = sm.PackedWeights.from_modules(base, experts, task_vector_dtype=form)
        sm.adamerging(tiny.make(1, torch.float32), packed, batches, tiny.plain(heads), config=config)
    packed = sm.PackedWeights.from_modules(base, experts, task_vector_dtype="int4")
    with pytest.raises(ValueError, match="another run: dtypes differ"):
        sm.adamerging(tiny.make(1, torch.float32), packed, batches, tiny.plain(heads), config=config)


@pytest.mark.parametrize("form", FORMS)
def test_data_free_methods_and_statistics(base, experts, form):
    exact = sm.PackedWeights.from_modules(base, experts)
    packed = sm.PackedWeights.from_modules(base, experts, task_vector_dtype=form)
    stored = sm.PackedWeights(packed.layout, packed.tasks, packed.base, packed.task_vectors.dequantise(), packed.unchanged)
    assert_close(sm.average(packed).merged, sm.average(stored).merged.double())
    assert torch.equal(sm.ties(packed).merged, sm.ties(stored).merged)
    assert torch.equal(sm.dare(packed).merged, sm.dare(stored).merged)
    for change in (sm.trimmed, sm.align_norms):
        with pytest.raises(ValueError, match=f"without task_vector_dtype='{form}'"):
            change(packed)
    assert_close(sm.task_arithmetic(packed, 0.4).merged, sm.task_arithmetic(stored, 0.4).merged.double())
    for of in ("experts", "task_vectors"):
        expected = sm.layer_stats(stored, of=of)
        assert torch.allclose(sm.layer_stats(packed, of=of), expected, rtol=SIGMA_TOLERANCE, atol=MOMENTS_TOLERANCE_FP32)
    assert weights_digest(packed) != weights_digest(exact)


def test_what_cannot_be_packed_is_named(base, experts):
    with pytest.raises(ValueError, match="task_vector_dtype='int3'; choose a torch.dtype or one of int8, int4, int4-residual"):
        sm.PackedWeights.from_modules(base, experts, task_vector_dtype="int3")
    largest = torch.finfo(torch.float32).max
    for form, where in {"int8": "expert 'a'", "int4-residual": "the experts' mean"}.items():
        with pytest.raises(ValueError, match=f"{where}: 'w' minus the base's cannot be quantised.*Inf"):
            tensors = {"w": torch.full((3,), -largest)}, {"a": {"w": torch.full((3,), largest)}}
            sm.PackedWeights.from_state_dicts(*tensors, task_vector_dtype=form)
    experts["blue"].second.weight.data[1, 2] = torch.nan
    with pytest.raises(ValueError, match="expert 'blue': 'second.weight' holds NaN"):
        sm.PackedWeights.from_modules(base, experts, task_vector_dtype="int4")


def test_packing_never_holds_the_task_vectors_in_fp32(tmp_path):
    """Peak memory is the quantised store, the base, and a few tensors."""
    packing_memory.write_models(tmp_path)
    for form in ("int8", "int4-residual"):
        beyond = packing_memory.beyond_the_store(tmp_path, form)
        assert beyond < 10 * packing_memory.TENSOR, f"{form}: {beyond:.0f} MiB beyond the store; a task vector has 128"
