"""What our wrappers refuse, before anything is changed."""

import copy

import pytest
import torch
from merged_by_autograd import names_of, problem, weights
from torch import nn

from samerge_ext.integrations.fusion_bench import LayerWiseMergedModel, TaskWiseMergedModel


def broken(what):
    base, experts = problem()
    if what == "shape":
        experts[1].second = nn.Linear(8, 9).double()
    elif what == "dtype":
        experts[1].second.float()
    elif what == "lacks":
        del experts[1].norm.bias
    elif what == "more":
        experts[1].extra = nn.Linear(2, 2)
    elif what == "nan":
        experts[1].second.bias.data[3] = torch.nan
    elif what == "twice":
        experts[1] = experts[0]
    elif what == "frozen":
        base.requires_grad_(False)
    elif what == "mixed":
        for model in (base, *experts):
            model.second.float()
    elif what == "none":
        experts = []
    return base, experts


@pytest.mark.parametrize(
    "what, message",
    [
        ("shape", r"'second.weight' of finetuned_models\[1\] has shape torch.Size\(\[9, 8\]\), of pretrained_model"),
        ("dtype", r"'second.weight' of finetuned_models\[1\] has dtype torch.float32, of pretrained_model torch.float64"),
        ("lacks", r"finetuned_models\[1\] lacks 'norm.bias'"),
        ("more", r"finetuned_models\[1\] has beyond pretrained_model 'extra.bias', 'extra.weight'"),
        ("nan", r"finetuned_models\[1\]: 'second.bias' holds NaN or Inf"),
        ("twice", r"finetuned_models\[1\] is a model that was given already"),
        ("frozen", "no parameter of pretrained_model requires grad"),
        ("mixed", "'second.weight' of pretrained_model is torch.float32 on cpu, 'first.weight' is torch.float64"),
        ("none", "finetuned_models is empty"),
    ],
)
def test_models_that_do_not_fit_are_refused_and_left_alone(what, message):
    base, experts = broken(what)
    before = copy.deepcopy(experts)
    with pytest.raises(ValueError, match=message):
        LayerWiseMergedModel(weights(3, 7), base, experts)
    for expert, other in zip(experts, before, strict=True):
        for (_, ours), (_, theirs) in zip(expert.named_parameters(), other.named_parameters(), strict=True):
            assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


def test_options_that_do_not_fit_are_refused():
    base, experts = problem()
    layers = len(names_of(base))
    with pytest.raises(ValueError, match=rf"shape \[3, 4\]; with 3 finetuned_models and {layers} parameters .* \[3, {layers}\]"):
        LayerWiseMergedModel(weights(3, 4), base, experts)
    with pytest.raises(ValueError, match=r"shape \[3, 6\]; .* they must have \[3\]"):
        TaskWiseMergedModel(weights(3, layers), base, experts)
    with pytest.raises(ValueError, match="sparsity_ratio=1.5"):
        LayerWiseMergedModel(weights(3, layers), base, experts, sparsity_ratio=1.5)
    with pytest.raises(ValueError, match="task vectors of torch.bfloat16"):
        TaskWiseMergedModel(weights(3), base, experts, task_vector_dtype=torch.bfloat16)
