"""Merges without data on the GPU are the CPU's."""

from functools import partial

import pytest
import tiny
import torch
from helpers import assert_close

import samerge_ext as sm
from samerge_ext.elementwise import piecewise
from samerge_ext.methods.dare import Dare
from samerge_ext.methods.ties import Ties

pytestmark = pytest.mark.gpu


MERGES = {
    "average": sm.average,
    "task_arithmetic": lambda packed: sm.task_arithmetic(packed, [0.5, 0.25, -1.0]),
    "ties": lambda packed: sm.ties(packed, [0.3, 1.0, 0.0], 0.7),
    "ties, whole": lambda packed: sm.ties(packed, 0.1, 0.7, weights=[1.0, 0.5, 2.0], trim="vector"),
    "dare": lambda packed: sm.dare(packed, [0.3, 0.0, 1.0], 0.7, seed=5),
    "dare, elected": lambda packed: sm.dare(packed, 0.9, rule="ties", normalize=True),
    "emr": lambda packed: sm.emr(packed).merge("b"),
    "adamerging++": lambda packed: sm.task_arithmetic(sm.trimmed(packed, 0.2), 0.3),
    "adamerging++, whole": lambda packed: sm.task_arithmetic(sm.trimmed(packed, [0.2, 0.9, 0.0], trim="vector"), 0.3),
}


def large(dtype, device, form=None):
    """Layers of one number, of more than a tile and of more than a stretch; the second expert changes half of one."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)
    base = {"bias": draw(1), "wide": draw(70, 1001), "norm": draw(300), "same": draw(40)}
    experts = {t: {n: x + 0.1 * draw(*x.shape) * (n != "same") for n, x in base.items()} for t in "abc"}
    experts["b"]["wide"][:35] = base["wide"][:35]
    return sm.PackedWeights.from_state_dicts(base, experts, dtype=dtype, task_vector_dtype=form, device=device)


EXACT, QUANTISED = (None,), (None, "int8", "int4-residual")  # how task vectors are stored


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize(
    ("merge", "form"), [(merge, form) for merge in MERGES for form in (EXACT if "++" in merge else QUANTISED)]
)
def test_merges_without_data_are_the_cpus(on_gpu_by_name, merge, form, dtype):
    """The same numbers kept or dropped; sums in another order, rounded as fp32 or bf16 are."""
    result = MERGES[merge](large(dtype, "cuda", form)).merged
    assert result.is_cuda
    with sm.use_backend("auto"):
        on_cpu = large(dtype, "cpu", form)
        expected = MERGES[merge](on_cpu).merged
    if merge.startswith(("ties", "dare")):
        changed = lambda merged: merged.cpu() != on_cpu.base
        assert torch.equal(changed(result), changed(expected))
    assert_close(result.cpu(), expected.double())


def test_selected_task_vectors_are_the_cpus_to_the_bit(on_gpu_by_name):
    for trim in ("tensor", "vector"):
        trimmed = sm.trimmed(large(torch.float32, "cuda"), [0.2, 0.9, 0.0], trim=trim).task_vectors
        with sm.use_backend("auto"):
            expected = sm.trimmed(large(torch.float32, "cpu"), [0.2, 0.9, 0.0], trim=trim).task_vectors
        assert torch.equal(trimmed.cpu(), expected)


def test_pieces_do_not_matter(on_gpu_by_name, monkeypatch):
    packed_weights = large(torch.bfloat16, "cuda")
    expected = {merge: MERGES[merge](packed_weights).merged for merge in ("ties", "ties, whole", "dare")}
    monkeypatch.setattr(piecewise, "GPU_PIECE_BYTES", 1)  # pieces of 65,536 numbers
    for merge, merged in expected.items():
        assert torch.equal(MERGES[merge](packed_weights).merged, merged), merge


@pytest.mark.parametrize("merge", ("ties", "dare", "dare, elected"))
def test_pieces_do_not_wait_for_the_device(on_gpu_by_name, monkeypatch, merge):
    """Once a rule knows all that it must, and after a first merge, which makes what is made once."""
    packed_weights = large(torch.float32, "cuda")
    expected = MERGES[merge](packed_weights).merged
    monkeypatch.setattr(piecewise, "GPU_PIECE_BYTES", 1)
    merges = {cls: cls.merge for cls in (Ties, Dare)}

    def without_waiting(self, piece):
        torch.cuda.set_sync_debug_mode("error" if piece.start else "default")
        try:
            return merges[type(self)](self, piece)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    for cls in merges:
        monkeypatch.setattr(cls, "merge", without_waiting)
    assert torch.equal(MERGES[merge](packed_weights).merged, expected)


SPECTRAL = {
    "tsv_m": sm.tsv_m,
    "iso_c": sm.iso_c,
    "iso_cts": sm.iso_cts,
    "knots": sm.knots,
    "subspace_boosting": partial(sm.subspace_boosting, beta=0.5),
    "svc": sm.svc,
}


@pytest.mark.parametrize("name", SPECTRAL)
def test_singular_values_are_those_of_the_cpu(on_gpu_by_name, name):
    base = tiny.make(0)
    experts = tiny.make_experts(base)
    packed_on = lambda device: sm.PackedWeights.from_modules(base, experts, dtype=torch.float64, device=device)
    on_cpu, on_device = packed_on("cpu"), packed_on("cuda")
    found = SPECTRAL[name](on_device).merged
    with sm.use_backend("reference"):
        expected = SPECTRAL[name](on_cpu).merged
    assert found.device.type == "cuda"
    assert (found.cpu() - expected).norm() < 1e-11 * expected.norm()
