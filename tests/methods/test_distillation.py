"""Experts of another architecture: the loss, what is refused, repeatability, and a merge of what comes out."""

import pytest
import tiny
import torch
from helpers import assert_close
from torch import nn
from torch.nn.functional import cross_entropy

import samerge_ext as sm
from samerge_ext.methods.distillation import distillation_loss

CLASSES = tiny.CLASSES["green"]


class Teacher(nn.Module):
    """A convolution over what the target reads as a row of features, and other inputs: channels first."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv1d(1, 4, 3, padding=1)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4 * tiny.WIDTH, CLASSES)

    def forward(self, signal):  # [B, 1, WIDTH]
        return self.head(self.dropout(torch.relu(self.convolution(signal)).flatten(1)))


HEAD = tiny.make_heads()["green"]


def teacher_logits(module, batch):
    return module(batch["signal"])


def student_logits(module, batch):
    return module(batch["features"]) @ HEAD


def make_data(count=4, rows=16):
    generator = torch.Generator().manual_seed(3)
    features = [torch.randn(rows, tiny.WIDTH, generator=generator, dtype=torch.float64) for _ in range(count)]
    return [{"signal": x[:, None], "features": x} for x in features]


@pytest.fixture
def teacher():
    torch.manual_seed(5)
    return Teacher().double()


def distill(teacher, target=None, data=None, labels=None, forward=student_logits, **settings):
    settings = {"steps": 20, "learning_rate": 0.01, "progress": False, **settings}
    config = sm.DistillationConfig(**settings)
    data = make_data() if data is None else data
    target = tiny.make(0) if target is None else target
    return sm.distill_expert(teacher, target, data, teacher_logits, forward, labels=labels, config=config)


def test_the_loss_and_its_gradient_are_the_formulas():
    torch.manual_seed(0)
    student, teacher = torch.randn(6, CLASSES, dtype=torch.float64), torch.randn(6, CLASSES, dtype=torch.float64)
    labels = torch.randint(CLASSES, (6,))
    student.requires_grad_()
    p, log_q = torch.softmax(teacher / 4, -1), torch.log_softmax(student / 4, -1)
    kl = (p * (p.log() - log_q)).sum(-1).mean()
    expected = 0.7 * cross_entropy(student, labels) + 0.3 * 16 * kl
    found = distillation_loss(student, teacher, labels, sm.DistillationConfig())
    assert_close(found, expected)
    assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (found, expected)))


def test_the_target_learns_what_the_teacher_says_and_is_merged(teacher):
    target = tiny.make(0)
    expert = distill(teacher, target, steps=400)
    assert expert is target
    batch = make_data()[0]
    with torch.no_grad():
        agreement = [
            (student_logits(module, batch).argmax(-1) == teacher_logits(teacher.eval(), batch).argmax(-1)).double().mean()
            for module in (tiny.make(0), expert)
        ]
    assert agreement[0] < 0.6 and agreement[1] > 0.9
    packed = sm.PackedWeights.from_modules(tiny.make(0), {"green": expert}, dtype=torch.float64)
    merged = sm.task_arithmetic(packed, 1.0, module=tiny.make(1)).module
    torch.testing.assert_close(student_logits(merged, batch), student_logits(expert, batch))


def test_labels_take_the_place_of_the_teachers_classes(teacher):
    labels = [torch.full((16,), 2)] * 4
    expert = distill(teacher, labels=labels, label_share=1.0, steps=200)
    assert (student_logits(expert, make_data()[0]).argmax(-1) == 2).all()


def test_equal_seeds_give_equal_weights_whatever_the_random_state(teacher):
    def weights(seed):
        target = nn.Sequential(tiny.make(0), nn.Dropout(0.2)).train()
        torch.rand(seed + 3)
        before = torch.get_rng_state()
        distill(teacher, target, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        return torch.cat([parameter.detach().flatten() for parameter in target.parameters()])

    first = weights(0)
    assert torch.equal(weights(0), first)
    assert not torch.equal(weights(1), first)


def test_the_teacher_is_left_as_it_was(teacher):
    teacher.train()
    teacher.head.eval()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    distill(teacher)
    assert teacher.training and not teacher.head.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_frozen_parameters_stay(teacher):
    target = tiny.make(0)
    target.first.requires_grad_(False)
    expert = distill(teacher, target)
    assert torch.equal(expert.first.weight, tiny.make(0).first.weight)
    assert not torch.equal(expert.second.weight, tiny.make(0).second.weight)


def test_what_does_not_fit_is_refused_before_any_training(teacher):
    untouched = tiny.make(0).state_dict()
    target = tiny.make(0)
    cases = [
        ({"data": []}, ValueError, "no data to distil on"),
        ({"labels": [torch.zeros(16, dtype=torch.int64)]}, ValueError, "labels of 1 batches and 4 batches"),
        ({"labels": [torch.zeros(15, dtype=torch.int64)] * 4}, ValueError, r"labels of batch 0 are torch.int64 \[15\]"),
        ({"labels": [torch.zeros(16)] * 4}, ValueError, "labels of batch 0 are torch.float32"),
        ({"labels": [torch.full((16,), CLASSES)] * 4}, ValueError, "run from 5 to 5; the teacher has 5 classes"),
        ({"forward": lambda module, batch: module(batch["features"])}, ValueError, r"student_logits gives a tensor \[16, 8\]"),
    ]
    for options, kind, message in cases:
        with pytest.raises(kind, match=message):
            distill(teacher, target, **options)
    bad = make_data()
    bad[2]["signal"][0] = float("nan")
    with pytest.raises(FloatingPointError, match="teacher's logits of batch 2"):
        distill(teacher, target, data=bad)
    with pytest.raises(ValueError, match="teacher and target are one module"):
        distill(target, target)
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in target.state_dict().items())
    with pytest.raises(ValueError, match="no parameter of the target requires a gradient"):
        distill(teacher, tiny.make(0).requires_grad_(False))


def test_a_loss_that_is_not_finite_names_the_step(teacher):
    def forward(module, batch):
        return student_logits(module, batch) * (float("nan") if torch.is_grad_enabled() else 1.0)

    with pytest.raises(FloatingPointError, match="the loss is nan at step 0"):
        distill(teacher, forward=forward)


@pytest.mark.parametrize(
    ("setting", "value"), [("temperature", 0.0), ("label_share", 1.5), ("steps", 0), ("learning_rate", float("nan"))]
)
def test_settings_out_of_range_are_refused(setting, value):
    with pytest.raises(ValueError, match=setting):
        sm.DistillationConfig(**{setting: value})
