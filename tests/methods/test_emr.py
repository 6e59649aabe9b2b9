"""EMR-Merging against its definition, number by number, and what its models hold."""

import gc
import weakref

import pytest
import tiny
import torch
from helpers import assert_close
from torch import nn

import samerge_ext as sm
from samerge_ext.recipes.recipe import load_recipe


def literal(tensors, rescaler):  # T experts' lists of tensors, each a list of numbers -> a list for every task, of tensors
    unified, masks = [], []
    for of_layer in zip(*tensors, strict=True):
        unified.append([])
        masks.append([[] for _ in tensors])
        for numbers in zip(*of_layer, strict=True):
            sign = 1 if sum(numbers) > 0 else -1
            agreeing = [abs(number) for number in numbers if number * sign > 0]
            unified[-1].append(sign * max(agreeing, default=0.0))
            for mask, number in zip(masks[-1], numbers, strict=True):
                mask.append(number * sign > 0)
    found = []
    for task, own in enumerate(tensors):
        before = after = 0.0
        for numbers, shared, mask in zip(own, unified, masks, strict=True):
            size = len(numbers) if rescaler == "published" else 1
            before += sum(abs(number) for number in numbers) / size
            after += sum(abs(number) for number, kept in zip(shared, mask[task], strict=True) if kept) / size
        scale = before / after if after else 1.0
        found.append(
            [
                [scale * number if kept else 0.0 for number, kept in zip(shared, mask[task], strict=True)]
                for shared, mask in zip(unified, masks, strict=True)
            ]
        )
    return found


def packed_of(task_vectors, dtype=torch.float64, **settings):
    """Experts that differ from a base of zeros by so much: task -> name -> tensor."""
    base = {name: torch.zeros_like(tensor) for name, tensor in next(iter(task_vectors.values())).items()}
    return sm.PackedWeights.from_state_dicts(base, task_vectors, dtype=dtype, **settings)


def random_task_vectors(count, dtype=torch.float64):
    """Of whole numbers, so that sums are often 0, most of all where two cancel."""
    generator = torch.Generator().manual_seed(count)
    shapes = {"weight": (53, 40), "bias": (53,), "long": (40_000,)}  # the last one takes more than one step
    return {
        f"t{task}": {name: torch.randint(-3, 4, shape, generator=generator).to(dtype) for name, shape in shapes.items()}
        for task in range(count)
    }


@pytest.mark.parametrize("rescaler", ["paper", "published"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_number_is_the_definitions(count, rescaler):
    task_vectors = random_task_vectors(count)
    expected = literal([[tensor.flatten().tolist() for tensor in own.values()] for own in task_vectors.values()], rescaler)
    models = sm.emr(packed_of(task_vectors), rescaler)
    for task, of_task in zip(task_vectors, expected, strict=True):
        found = models.merge(task).state_dict()
        for (name, tensor), numbers in zip(task_vectors[task].items(), of_task, strict=True):
            truth = torch.tensor(numbers, dtype=torch.float64).view_as(tensor)
            assert torch.equal(found[name] == 0, truth == 0)
            assert_close(found[name], truth, f"{task} {name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_task_vectors_are_elected_exactly_and_scaled_in_fp32(dtype):
    exact = sm.emr(packed_of(random_task_vectors(3)))
    found = sm.emr(packed_of(random_task_vectors(3, dtype), dtype))
    assert found.unified.dtype == dtype and torch.equal(found.unified.double(), exact.unified)
    assert torch.equal(found.masks, exact.masks)
    for task in found.rescalers:
        assert found.rescalers[task] == pytest.approx(exact.rescalers[task], rel=1e-6)
        assert_close(found.merge(task).merged, exact.merge(task).merged, task)


def test_tasks_that_change_other_numbers_come_back_as_they_were():
    task_vectors = random_task_vectors(2)
    for task, own in enumerate(task_vectors.values()):
        for tensor in own.values():
            tensor.view(-1)[task::2] = 0
    models = sm.emr(packed_of(task_vectors))
    assert models.rescalers == {"t0": 1.0, "t1": 1.0}
    for task, own in task_vectors.items():
        found = models.merge(task).state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in own.items())


def test_a_task_that_is_outvoted_everywhere_has_the_base():
    strong = random_task_vectors(1)["t0"]
    packed = packed_of({"strong": {n: 2 * t for n, t in strong.items()}, "weak": {n: -t for n, t in strong.items()}})
    models = sm.emr(packed)
    assert models.rescalers["weak"] == 1.0
    assert torch.equal(models.merge("weak").merged, packed.base)


def test_the_magnitudes_are_those_of_the_expert():
    packed = packed_of(random_task_vectors(4))
    models = sm.emr(packed)
    for row, task in enumerate(packed.tasks):
        assert models.merge(task).merged.abs().sum().item() == pytest.approx(packed.task_vectors[row].abs().sum().item())


def test_the_models_hold_a_vector_and_a_bit_of_a_number_for_each_task():
    packed = packed_of(random_task_vectors(5))
    numbers, task_vectors = packed.layout.numel, weakref.ref(packed.task_vectors)
    models = sm.emr(packed)
    assert models.unified.shape == (numbers,) and models.masks.nbytes == 5 * numbers // 8
    del packed
    gc.collect()
    assert task_vectors() is None
    assert models.merge("t4").merged is not None


def test_quantised_task_vectors_are_read_as_they_are_stored():
    packed = packed_of(random_task_vectors(3), torch.float32, task_vector_dtype="int8")
    stored = packed.task_vectors.dequantise()
    views = [packed.layout.views(row) for row in stored]
    same = packed_of({task: dict(view) for task, view in zip(packed.tasks, views, strict=True)}, torch.float32)
    for task in packed.tasks:
        assert_close(sm.emr(packed).merge(task).merged, sm.emr(same).merge(task).merged.double(), task)


class Headed(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.classifier = tiny.Encoder(), nn.Linear(tiny.WIDTH, 3)

    def forward(self, x):
        return self.classifier(self.encoder(x))


def test_a_module_becomes_the_tasks_own_with_its_head_and_statistics():
    torch.manual_seed(0)
    base = Headed().double()
    experts = {}
    for task in ("red", "green"):
        experts[task] = Headed().double().eval()
        with torch.no_grad():  # one changes what the other does not: what comes out is the expert
            experts[task].load_state_dict(base.state_dict())
            changed = experts[task].encoder.first if task == "red" else experts[task].encoder.second
            changed.weight.mul_(1.5)
            experts[task].encoder.norm.running_mean.normal_()
            experts[task].classifier.weight.normal_()
    packed = sm.PackedWeights.from_modules(base, experts, dtype=torch.float64, heads="classifier.*")
    models, x = sm.emr(packed), torch.randn(5, tiny.WIDTH, dtype=torch.float64)
    for task, expert in experts.items():
        result = models.merge(task, module=Headed().double())
        torch.testing.assert_close(result.module(x), expert(x), rtol=1e-14, atol=1e-14)
        assert result.method == "emr" and list(result.heads) == [task]
        assert result.coefficients.unique().item() == models.rescalers[task]
        assert torch.equal(result.state_dict()["encoder.norm.running_mean"], expert.encoder.norm.running_mean)


def test_what_makes_no_sense_is_refused(tmp_path):
    packed = tiny.make_problem()[2]
    with pytest.raises(ValueError, match="rescaler='mean'; choose"):
        sm.emr(packed, "mean")
    with pytest.raises(ValueError, match="there is no task 'violet'; there are red, green, blue"):
        sm.emr(packed).merge("violet")
    (tmp_path / "emr.yaml").write_text("merge_method: emr\nbase_model: base\nmodels: [{model: a}, {model: b}]\n")
    with pytest.raises(ValueError, match=r"merge_method: emr makes a model for each task, .* sm.emr"):
        load_recipe(tmp_path / "emr.yaml", {})
