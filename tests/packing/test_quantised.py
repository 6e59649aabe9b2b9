"""QuantisedTaskVectors: what is stored, and how far it is off."""

import pytest
import torch
from helpers import HALF_A_SCALE, random_normal

from samerge_ext.packing.quantised import FORMATS, GROUP, QuantisedTaskVectors

FORMS = tuple(FORMATS)


@pytest.mark.parametrize("form", FORMS)
def test_a_number_is_off_by_half_a_scale_at_most(form):
    (task_vectors,) = random_normal((6, 4096), seed=0)
    task_vectors *= torch.logspace(-20, 20, 4096)
    store = QuantisedTaskVectors.of(task_vectors, form)
    error = (store.dequantise(torch.float64) - task_vectors.double()).abs()
    bound = HALF_A_SCALE * store.scales[: len(store)].double().repeat_interleave(GROUP, 1)
    if store.shared:  # the offset is taken off before, in fp32
        bound += task_vectors.abs().amax(0).double() * torch.finfo(torch.float32).eps
    assert (error <= bound).all()
    assert (error > 0.9 * bound).any(), "the bound is not idle"


@pytest.mark.parametrize("form", ("int8", "int4"))
def test_a_scale_is_no_larger_than_its_group_needs(form):
    (task_vectors,) = random_normal((3, 2048), seed=1)
    store = QuantisedTaskVectors.of(task_vectors, form)
    largest = task_vectors.unflatten(1, (-1, GROUP)).abs().amax(2)
    needed = largest / {"int8": 127, "int4": 7}[form]
    assert (store.scales.float() >= needed).all() and (store.scales.float() <= needed * (1 + 2**-7)).all()


@pytest.mark.parametrize("form", FORMS)
def test_codes_survive_a_second_quantising(form):
    (task_vectors,) = random_normal((4, 3072), seed=2)
    once = QuantisedTaskVectors.of(task_vectors, form)
    if once.shared:
        rows = once.dequantise()
        assert (QuantisedTaskVectors.of(rows, form).dequantise() - rows).norm() < (rows - task_vectors).norm()
        return
    exact = once.dequantise(torch.float64)
    again = QuantisedTaskVectors.zeros(*once.shape, form)
    for task, row in enumerate(exact):
        again.write(task, 0, row)
    assert (again.dequantise(torch.float64) - exact).norm() <= 1e-2 * exact.norm()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("value", "word"),
    [(torch.nan, "NaN"), (torch.inf, "Inf"), (-torch.inf, "Inf"), (torch.finfo(torch.float32).max, "too large")],
)
def test_what_cannot_be_quantised_is_refused(form, value, word):
    numbers = torch.zeros(2, 1024)
    numbers[:, 700] = value
    with pytest.raises(ValueError, match=word):
        QuantisedTaskVectors.of(numbers, form)


@pytest.mark.parametrize(("form", "bits", "per_number"), [("int8", 8, 1), ("int4", 4, 0.5)])
def test_bytes_and_parts(form, bits, per_number):
    (task_vectors,) = random_normal((3, 4096), seed=3)
    store = QuantisedTaskVectors.of(task_vectors, form)
    assert store.shape == (3, 4096) and store.bits == bits and len(store) == 3 and store.device.type == "cpu"
    assert store.nbytes == 3 * 4096 * (per_number + 2 / GROUP)
    again = QuantisedTaskVectors(**store.tensors(), shared=store.shared)
    assert torch.equal(torch.stack(list(again)), store.dequantise()) and torch.equal(again[-1], store[2])
    assert store.to("meta").device.type == "meta"
    with pytest.raises(IndexError):
        store[3]


def test_a_shared_offset_leaves_less_to_the_tasks():
    shared, own = random_normal((2048,), (8, 2048), seed=4)
    task_vectors = 3 * shared + 0.1 * own
    errors = {form: (QuantisedTaskVectors.of(task_vectors, form).dequantise() - task_vectors).norm() for form in FORMS}
    assert errors["int4-residual"] < 0.3 * errors["int4"]
