"""BatchNorm's statistics estimated anew: beside those of what each layer is given, counted here, and what is refused."""

import copy
from dataclasses import replace

import pytest
import torch
from helpers import assert_alike
from safetensors.torch import load_file
from torch import nn

import samerge_ext as sm

CLASSES = {"digits": 3, "clothes": 2}


class Pictures(nn.Module):
    """Convolutions with a BatchNorm each, one that is called twice, one that nothing runs through, and a head with its own."""

    def __init__(self, classes=2):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, affine=False), nn.ReLU())
        self.twice = nn.BatchNorm2d(4)
        self.aside = nn.BatchNorm2d(4)
        self.last = nn.BatchNorm1d(4)
        self.head = nn.Sequential(nn.Linear(4, classes), nn.BatchNorm1d(classes))

    def features(self, x):
        x = self.twice(self.block(self.stem(x))) + x.mean()
        x = self.twice(torch.tanh(x))
        return self.last(x.mean((2, 3)))

    def forward(self, x):
        return self.head(self.features(x))


def logits(module, batch, task):
    return module(batch)


@pytest.fixture
def problem():
    """base, packed weights and batches in fp64: of one task three times as many as of the other, and of another mean."""
    torch.manual_seed(0)
    base = Pictures().double().eval()
    experts = {}
    for task, classes in CLASSES.items():
        experts[task] = Pictures(classes).double().eval()
        shared = {n: t for n, t in base.state_dict().items() if not n.startswith("head")}
        experts[task].load_state_dict(shared, strict=False)
        for tensor in experts[task].parameters():
            tensor.data += 0.3 * torch.randn_like(tensor)
        for part in experts[task].modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.running_mean += torch.randn_like(part.running_mean)
                part.running_var *= 1 + torch.rand_like(part.running_var)
    packed = sm.PackedWeights.from_modules(base, experts, dtype=torch.float64, heads="head.*")
    batches = {
        "digits": [torch.randn(size, 1, 8, 8, dtype=torch.float64) for size in (5, 2, 4)],
        "clothes": [3 + 2 * torch.randn(4, 1, 8, 8, dtype=torch.float64)],
    }
    return base, packed, batches


def given_to(module, name, batches):
    """mean and variance of each channel that a layer is given, every task counted alike."""
    layer, means, squares = module.get_submodule(name), [], []
    for of_task in batches.values():
        seen = []
        handle = layer.register_forward_hook(lambda part, given, out, seen=seen: seen.append(given[0].transpose(0, 1).flatten(1)))
        with torch.no_grad():
            for batch in of_task:
                module.features(batch)
        handle.remove()
        numbers = torch.cat(seen, 1)
        means.append(numbers.mean(1))
        squares.append(numbers.square().mean(1))
    mean = torch.stack(means).mean(0)
    return mean, torch.stack(squares).mean(0) - mean.square()


@pytest.mark.filterwarnings("ignore:no batch runs through")
def test_statistics_are_those_of_what_a_layer_is_given(problem, tmp_path):
    base, packed, batches = problem
    averaged = sm.task_arithmetic(packed, 0.4, module=copy.deepcopy(base))
    before = averaged.state_dict()
    result = sm.reestimate_batchnorm(averaged, batches, logits)
    found = result.state_dict()
    assert result.method == "task_arithmetic, BatchNorm re-estimated"
    loaded = Pictures().double().eval()
    loaded.load_state_dict(found, strict=False)
    for name in ("stem.1", "block.1", "last"):
        mean, variance = given_to(loaded, name, batches)
        assert_alike(found[f"{name}.running_mean"], mean, f"{name}'s mean")
        assert_alike(found[f"{name}.running_var"], variance, f"{name}'s variance")
        assert (found[f"{name}.running_mean"] - before[f"{name}.running_mean"]).norm() > 0.1
    for name, tensor in before.items():
        assert name.endswith(("running_mean", "running_var")) or torch.equal(found[name], tensor)
    for name, buffer in result.module.named_buffers():
        assert name.startswith("head") or torch.equal(buffer, found[name])
    written = load_file(result.save_pretrained(tmp_path / "out") / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in found.items())


def test_a_layer_called_twice_has_the_statistics_of_both_and_one_aside_keeps_the_average(problem):
    base, packed, batches = problem
    averaged = sm.average(packed, module=copy.deepcopy(base))
    before = averaged.state_dict()
    with pytest.warns(UserWarning, match="no batch runs through 'aside'"):
        result = sm.reestimate_batchnorm(averaged, batches, logits)
    found = result.state_dict()
    assert torch.equal(found["aside.running_mean"], before["aside.running_mean"])
    module = Pictures().double().eval()
    module.load_state_dict(found, strict=False)
    for leaf in ("running_mean", "running_var"):  # the second call was given what the averaged statistics make of the first
        getattr(module.twice, leaf).copy_(before[f"twice.{leaf}"])
    mean, variance = given_to(module, "twice", batches)
    assert_alike(found["twice.running_mean"], mean)
    assert_alike(found["twice.running_var"], variance)


@pytest.mark.filterwarnings("ignore:no batch runs through")
@pytest.mark.parametrize("whose", ["the base's", "one expert's own"])
def test_statistics_that_were_frozen_get_a_warning(problem, whose):
    base, packed, batches = problem
    buffers = {
        task: {name: packed.buffers.get(name, own) for name, own in held.items()} for task, held in packed.expert_buffers.items()
    }
    if whose != "the base's":
        buffers["digits"]["last.running_var"] = buffers["digits"]["last.running_var"] + 1
    averaged = sm.average(replace(packed, expert_buffers=buffers), module=copy.deepcopy(base))
    with pytest.warns(UserWarning) as warned:  # 'aside' has one in any case
        sm.reestimate_batchnorm(averaged, batches, logits)
    assert any("frozen" in str(warning.message) for warning in warned) == (whose == "the base's")


def test_what_comes_after_keeps_them(problem):
    base, packed, batches = problem
    result = sm.reestimate_batchnorm(sm.average(packed, module=copy.deepcopy(base)), batches, logits)
    again = sm.refit_heads(result, batches, logits, "head.0")
    assert again.method == "average, BatchNorm re-estimated, heads refitted"
    for name in result.buffers:
        assert torch.equal(again.state_dict()[name], result.buffers[name])
        assert torch.equal(again.module.get_buffer(name), result.buffers[name])


def test_what_cannot_be_estimated_is_refused(problem):
    base, packed, batches = problem
    with pytest.raises(ValueError, match="give average a module="):
        sm.reestimate_batchnorm(sm.average(packed), batches, logits)
    merged = sm.average(packed, module=copy.deepcopy(base))
    with pytest.raises(ValueError, match="add batches for"):
        sm.reestimate_batchnorm(merged, {"digits": batches["digits"]}, logits)
    broken = {**batches, "clothes": [torch.full((2, 1, 8, 8), torch.nan, dtype=torch.float64)]}
    with pytest.raises(FloatingPointError, match=r"'stem\.1' is given NaN"):
        sm.reestimate_batchnorm(merged, broken, logits)
    plain = {task: nn.Linear(2, 2) for task in "xy"}
    packed = sm.PackedWeights.from_modules(nn.Linear(2, 2), plain)
    with pytest.raises(ValueError, match="Linear has no BatchNorm"):
        sm.reestimate_batchnorm(sm.average(packed, module=nn.Linear(2, 2)), {t: [torch.ones(1, 2)] for t in "xy"}, logits)
