"""The features of experts and the network that reads them, before any merge."""

import literal
import pytest
import tiny
import torch
from helpers import assert_close

from samerge_ext.ops.layer_stats import layer_stats
from samerge_ext.statistics.features import RTOL, Features
from samerge_ext.statistics.learner import LearnerSettings, PredictedCoefficients, StatsMergeLearner


@pytest.fixture
def problem():
    return tiny.make_problem()


@pytest.fixture
def packed(problem):
    return problem[2]


@pytest.mark.parametrize("options", tiny.LEARNERS.values(), ids=tiny.LEARNERS)
def test_every_parameter_of_the_learner_has_a_gradient_at_the_start(packed, options):
    learner, statistics = tiny.make_learner(packed, **options)
    predicted = PredictedCoefficients(learner, statistics)()
    torch.manual_seed(0)
    predicted.backward(torch.randn_like(predicted))
    for name, parameter in learner.named_parameters():
        # A feature that is constant (the variance of a tensor that is one number, say) says nothing, and W has no use for it.
        informative = learner.scale > 0 if name == "weight" else slice(None)
        per_unit = parameter.grad[:, informative] if name == "weight" else parameter.grad
        assert (per_unit != 0).all(), name


def test_a_constant_feature_is_zero_and_not_nan(packed):
    values = Features.of_packed(packed).values.clone()
    values[..., 1] = 0.1
    values[0, :, 2], values[1:, :, 2] = 0.1, 0.1 + 2e-17  # the next number but one
    learner = StatsMergeLearner.made_for(values, LearnerSettings(), start=0.3, seed=0, dtype=torch.float64)
    assert (learner.scale[1:3] == 0).all() and (learner.scale[[0, 3, 4, 5]] > 0).all()
    assert torch.isfinite(learner(values)).all()
    changed = values.clone()
    changed[..., 1] = 7.0
    with torch.no_grad():
        learner.output.add_(1.0)
    assert torch.equal(learner(changed), learner(values))


def test_features_are_standardised_over_tasks_and_layers(packed):
    learner, statistics = tiny.make_learner(packed, whole_model=True)
    rows = ((statistics - learner.mean) * learner.scale).flatten(0, 1)
    assert_close(rows.mean(0), torch.zeros(12, dtype=torch.float64), at_least=1.0)
    assert_close(rows.square().mean(0), torch.ones(12, dtype=torch.float64))


def test_a_layers_statistics_are_followed_by_those_of_the_whole_model(packed):
    features = Features.of_packed(packed)
    found = features.of_granularity("layer", whole_model=True)
    assert found.shape == (3, packed.layout.num_layers, 12)
    assert torch.equal(found[..., :6], features.values)
    for layer in found[..., 6:].unbind(1):
        assert torch.equal(layer, features.of_granularity("task")[:, 0])
    assert torch.equal(features.of_granularity("layer"), features.values)


@pytest.mark.parametrize("whole_model", [False, True])
def test_experts_of_one_base_are_told_apart_by_the_whole_models_statistics(whole_model):
    """They differ by a millionth of what layers differ by: from layers' statistics alone λ is one number for all tasks."""
    torch.manual_seed(0)
    noise = torch.randn(4, 20, 6, dtype=torch.float64)
    values = torch.rand(1, 20, 6, dtype=torch.float64) + 1e-6 * noise
    statistics = Features(values, {"layers": [[str(l), [5, 5]] for l in range(20)]}).of_granularity("layer", whole_model)
    settings = LearnerSettings(whole_model=whole_model)
    learner = StatsMergeLearner.made_for(statistics, settings, start=0.3, seed=0, dtype=torch.float64)
    wanted = torch.tensor([0.1, 0.2, 0.4, 0.5], dtype=torch.float64)[:, None]
    optimizer = torch.optim.Adam(learner.parameters(), lr=5e-3)
    for _ in range(100):
        optimizer.zero_grad()
        (learner(statistics) - wanted).square().mean().backward()
        optimizer.step()
    error = (learner(statistics) - wanted).abs().mean()
    assert error < 0.02 if whole_model else error > 0.1


@pytest.mark.parametrize("singular_values", [0, 1, 3])
def test_statistics_of_the_whole_model_are_those_of_all_its_numbers(problem, singular_values):
    _, experts, packed, _, _ = problem
    layers = [[name, list(shape)] for name, shape in zip(packed.layout.names, packed.layout.shapes, strict=True)]
    features = Features(literal.statistics(literal.weights(experts), singular_values), {"layers": layers})
    found = features.of_granularity("task")
    assert found.shape == (3, 1, 3 + singular_values)
    for row, tensors in zip(found[:, 0], literal.weights(experts), strict=True):
        numbers = torch.cat([tensor.flatten() for tensor in tensors])
        assert_close(row[:3], torch.stack([numbers.mean(), numbers.var(correction=0), numbers.norm()]))
        blocks = torch.block_diag(*(tensor.reshape(tensor.shape[0], -1) for tensor in tensors))
        assert_close(row[3:], torch.linalg.svdvals(blocks)[:singular_values])


@pytest.mark.parametrize(("of", "singular_values"), [("experts", 2), ("task_vectors", 0)])
def test_features_are_what_the_operator_computes(packed, of, singular_values):
    features = Features.of_packed(packed, of=of, singular_values=singular_values)
    assert torch.equal(features.values, layer_stats(packed, top_k=singular_values, of=of, rtol=RTOL))
