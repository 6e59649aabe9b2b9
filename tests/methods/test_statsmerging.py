"""StatsMerging: the learner's gradients, its start, what it follows, and its features in their file."""

import literal
import pytest
import tiny
import torch
from helpers import assert_close
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import samerge_ext as sm
from samerge_ext.learning.passes import losses_and_gradient
from samerge_ext.learning.prefetch import Input
from samerge_ext.ops.softmax_kl import argmax_cross_entropy_with_grad
from samerge_ext.statistics.features import Features


@pytest.fixture
def problem():
    return tiny.make_problem()


@pytest.fixture
def packed(problem):
    return problem[2]


def run(packed, *, batches=None, logits=None, **settings):
    settings = {"steps": 6, "progress": False, "hidden": 8, **settings}
    logits = logits or tiny.plain(tiny.make_heads())
    config = sm.StatsMergingConfig(**settings)
    return sm.statsmerging(tiny.make(1), packed, batches or tiny.make_batches(), logits, config=config)


class Merged(torch.autograd.Function):
    """The loss of all tasks as a function of λ [T, L], its gradient by one contraction."""

    @staticmethod
    def forward(ctx, coefficients, model, batches, heads, teachers):
        with torch.enable_grad():
            losses, ctx.gradient = losses_and_gradient(
                model,
                coefficients.detach(),
                {task: Input(held[0], teachers[task]) for task, held in batches.items()},
                tiny.plain(heads),
                argmax_cross_entropy_with_grad,
                task_weights=dict.fromkeys(batches, 1.0),
            )
        return losses.sum()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.gradient, None, None, None, None


@pytest.mark.parametrize("options", tiny.LEARNERS.values(), ids=tiny.LEARNERS)
def test_gradcheck_from_features_through_the_learner_to_the_merged_loss(problem, options):
    base, experts, packed, heads, batches = problem
    learner, statistics = tiny.make_learner(packed, hidden=4, **options)
    model = sm.MergedModel(tiny.make(1), packed)
    teachers = {task: (experts[task](batches[task][0]) @ heads[task]).detach() for task in experts}
    names = [name for name, _ in learner.named_parameters()]

    def loss(*parameters):
        predicted = functional_call(learner, dict(zip(names, parameters, strict=True)), (statistics,))
        return Merged.apply(predicted.expand(3, packed.layout.num_layers), model, batches, heads, teachers)

    assert torch.autograd.gradcheck(loss, tuple(learner.parameters()), eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("options", tiny.LEARNERS.values(), ids=tiny.LEARNERS)
def test_the_start_is_constant_for_any_statistics_and_does_not_last(packed, options):
    learner, statistics = tiny.make_learner(packed, **options)
    for values in (statistics, torch.randn_like(statistics)):
        predicted = learner(values)
        assert_close(predicted, torch.full_like(predicted, 0.3))
    learned = run(packed, learning_rate=0.01, **options).coefficients
    spread = learned.std(0) if options.get("granularity") == "task" else learned.std(1)
    assert (spread > 1e-4).any()


@pytest.mark.parametrize("sam", ["off", "paper"])
@pytest.mark.parametrize("options", [tiny.LEARNERS[name] for name in ("shared", "whole model too", "task-wise")])
def test_a_run_follows_a_literal_loop(problem, sam, options, monkeypatch):
    """Autograd through the learner, the merge and the model; a new learner with the same start; StepLR."""
    base, experts, packed, heads, batches = problem
    statistics = literal.statistics(literal.weights(experts))
    monkeypatch.setattr("samerge_ext.statistics.features.layer_stats", lambda packed, **_: statistics)
    steps, decay = 10, 0.5
    result = run(packed, steps=steps, sam=sam, learning_rate=0.01, learning_rate_decay=decay, **options)
    learner, _ = tiny.make_learner(packed, **options)
    vectors = [torch.cat([weight.flatten() for weight in tensors]) for tensors in literal.weights(experts)]
    moments = torch.stack([torch.stack([v.mean(), v.var(correction=0), v.norm()]) for v in vectors])
    whole = torch.cat([moments, statistics[..., 3:].flatten(1).sort(descending=True).values[:, :3]], 1)[:, None]
    if "whole_model" in options:
        statistics = torch.cat([statistics, whole.expand_as(statistics)], -1)
    elif "granularity" in options:
        statistics = whole
    mean, deviation = statistics.flatten(0, 1).mean(0), statistics.flatten(0, 1).std(0, correction=0)
    features = (statistics - mean) / deviation
    W, b, v, c = (parameter.detach().clone().requires_grad_() for parameter in learner.parameters())
    optimizer = torch.optim.Adam([W, b, v, c], lr=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, steps // 5, decay)
    buffers = literal.averaged_buffers(base, experts)
    layers = packed.layout.num_layers

    def predict():
        return (torch.nn.functional.gelu(features @ W[0] + b[0]) @ v[0] + c[0]).squeeze(-1)

    def gradient(at, step):
        at = at.detach().requires_grad_()
        merged = literal.merged_parameters(base, experts, at.expand(3, layers))
        loss = 0.0
        for task, held in batches.items():
            batch = held[step % len(held)]
            with torch.no_grad():
                labels = (experts[task](batch) @ heads[task]).argmax(-1)
            loss = loss + cross_entropy(functional_call(base, {**merged, **buffers}, (batch,)) @ heads[task], labels)
        return torch.autograd.grad(loss, at)[0]

    for step in range(steps):
        predicted = predict()
        g = gradient(predicted, step)
        if sam == "paper":
            g = gradient(predicted.detach() + 0.07 * g / g.norm(), step)
        optimizer.zero_grad()
        predicted.backward(g)
        optimizer.step()
        schedule.step()
    expected = predict().detach().expand(3, layers)
    error = (result.coefficients - expected).norm() / expected.norm()
    assert error < 1e-9, f"coefficients are off by {error:.2e}, relative"


def test_the_kl_loss_is_the_one_of_samerging(packed):
    losses = [
        run(packed, steps=1, loss="kl", temperature=3.0).history[0]["losses"],
        sm.samerging(
            tiny.make(1),
            packed,
            tiny.make_batches(),
            tiny.plain(tiny.make_heads()),
            config=sm.SAMergingConfig(steps=1, temperature=3.0, progress=False),
        ).history[0]["losses"],
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_features_are_read_from_their_file(packed, tmp_path, monkeypatch):
    path = tmp_path / "features.safetensors"
    first = run(packed, features=path)

    def fail(*_, **__):
        raise AssertionError("computed again")

    monkeypatch.setattr("samerge_ext.statistics.features.layer_stats", fail)
    assert torch.equal(run(packed, features=path).coefficients, first.coefficients)
    with pytest.raises(AssertionError, match="computed again"):
        run(packed)


def test_features_of_something_else_are_refused(packed, tmp_path):
    path = tmp_path / "features.safetensors"
    run(packed, features=path)
    with pytest.raises(ValueError, match="features of something else: of differ"):
        run(packed, features=path, of="task_vectors")
    with pytest.raises(ValueError, match="features of something else: singular_values differ"):
        run(packed, features=path, singular_values=2)
    packed.task_vectors[1, 5] += 1e-12
    with pytest.raises(ValueError, match="features of something else: weights differ"):
        run(packed, features=path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="holds no features"):
        run(packed, features=path)


@pytest.mark.parametrize("options", [{"sam": "paper"}, {"per_layer": True, "optimizer": "sgd"}, {"granularity": "task"}])
def test_an_interrupted_run_continues_to_the_same_numbers(packed, tmp_path, options):
    options = {"steps": 10, "checkpoint_every": 3, "shuffle": True, **options}
    whole = run(packed, **options)
    interrupted = tiny.interrupt_after(7 * (2 if options.get("sam") == "paper" else 1))
    with pytest.raises(tiny.Interrupted):
        run(packed, logits=interrupted, checkpoint_dir=tmp_path, **options)
    assert (tmp_path / "features.safetensors").exists()
    continued = run(packed, checkpoint_dir=tmp_path, **options)
    assert torch.equal(continued.coefficients, whole.coefficients)
    assert continued.history == whole.history
    for name, tensor in whole.learner.state_dict().items():
        assert torch.equal(continued.learner.state_dict()[name], tensor), name


def test_another_number_of_steps_is_another_run_since_its_learning_rates_differ(packed, tmp_path):
    run(packed, checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match="of another run: steps differ"):
        run(packed, checkpoint_dir=tmp_path, steps=12)


def test_the_learning_rate_falls_after_every_fifth_of_the_run():
    config = sm.StatsMergingConfig()
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 100, 0.1)
    for epoch in range(500):
        assert config.decay_at(epoch, 500) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        schedule.step()
    assert [config.decay_at(step, 7) for step in range(7)] == pytest.approx([1, 1, 0.1, 0.01, 0.01, 1e-3, 1e-4])


@pytest.mark.parametrize(
    "options", [{}, {"whole_model": True}, {"granularity": "task"}, {"of": "task_vectors", "singular_values": 1}]
)
def test_a_saved_learner_merges_experts_it_was_not_trained_with(packed, tmp_path, options):
    result = run(packed, learning_rate=0.05, **options)
    result.learner.save(tmp_path / "learner.safetensors")
    learner = sm.StatsMergeLearner.load(tmp_path / "learner.safetensors")
    assert torch.equal(sm.apply_learner(learner, packed).coefficients, result.coefficients)

    base = tiny.make(0)
    others = tiny.make_experts(base, scale=0.1, tasks=("cyan", "pink"))
    unseen = sm.PackedWeights.from_modules(base, others, dtype=torch.float64)
    applied = sm.apply_learner(learner, unseen, module=tiny.make(1))
    statistics = Features.of_packed(unseen, of=learner.settings.of, singular_values=learner.settings.singular_values)
    read = statistics.of_granularity(learner.settings.granularity, learner.settings.whole_model)
    standardised = (read - result.learner.mean) * result.learner.scale
    W, b, v, c = (parameter.detach()[0] for parameter in result.learner.parameters())
    expected = (torch.nn.functional.gelu(standardised @ W + b) @ v + c).squeeze(-1).expand(2, packed.layout.num_layers)
    assert_close(applied.coefficients, expected)
    assert torch.equal(applied.module.first.weight.detach(), applied.state_dict()["first.weight"])


def test_a_network_per_layer_is_not_applied_to_other_layers(packed):
    learner, _ = tiny.make_learner(packed, per_layer=True)
    base = torch.nn.Linear(4, 4)
    other = sm.PackedWeights.from_modules(base, {"cyan": torch.nn.Linear(4, 4)})
    with pytest.raises(ValueError, match="a network for each of 8 layers"):
        sm.apply_learner(learner, other)


def test_a_file_that_is_no_learner_is_refused(packed, tmp_path):
    run(packed, features=tmp_path / "features.safetensors")
    with pytest.raises(ValueError, match="features.safetensors holds no StatsMergeLearner"):
        sm.StatsMergeLearner.load(tmp_path / "features.safetensors")


def test_the_saved_folder_holds_learner_and_statistics(packed, tmp_path):
    result = run(packed)
    folder = result.save_pretrained(tmp_path / "merged")
    learner = sm.StatsMergeLearner.load(folder / "learner" / "learner.safetensors")
    applied = sm.apply_learner(learner, packed, features=folder / "learner" / "features.safetensors")
    assert torch.equal(applied.coefficients, result.coefficients)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("loss", "mse"), ("of", "base"), ("temperature", 0.0), ("learning_rate_decay", 0.0), ("singular_values", -1), ("hidden", 3)],
)
def test_settings_out_of_range_are_refused(setting, value):
    with pytest.raises(ValueError, match=setting):
        sm.StatsMergingConfig(**{setting: value})


@pytest.mark.parametrize("setting", ["per_layer", "whole_model"])
def test_what_is_of_layers_is_refused_where_the_coefficient_is_task_wise(setting):
    with pytest.raises(ValueError, match=f"{setting}=True needs granularity='layer'"):
        sm.StatsMergingConfig(**{setting: True}, granularity="task")
