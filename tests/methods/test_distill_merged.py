"""A merged model distilled from its experts: beside plain autograd, what stays, and what is refused."""

import pytest
import tiny
import torch
from headed import encoder_of, logits, make, make_problem, relative
from torch.func import functional_call

import samerge_ext as sm
from samerge_ext.learning.calibration import Calibration

STEPS, RATE, DECAY, NORM = 6, 1e-2, 0.01, 0.5


def config(**settings):
    usual = {"steps": STEPS, "learning_rate": RATE, "weight_decay": DECAY, "gradient_norm": NORM, "progress": False}
    return sm.MergedDistillationConfig(**{**usual, **settings})


@pytest.fixture
def problem():
    base, experts, packed = make_problem()
    return base, experts, packed, tiny.make_batches(count=3), sm.wudi(packed, module=make(1))


def literal_distill(base, experts, module, batches, temperature, seed):
    """The encoder's parameters after so many steps of AdamW, each on one batch of every task, in plain autograd."""
    encoder = encoder_of(base)
    state = {name: tensor.detach().clone() for name, tensor in module.state_dict().items() if not name.startswith("head")}
    encoder.load_state_dict(state)
    frozen = {name for name, _ in encoder.named_parameters() if name.startswith("frozen")}
    trained = {name: tensor for name, tensor in encoder.named_parameters() if name not in frozen}
    optimizer = torch.optim.AdamW(trained.values(), lr=RATE, weight_decay=DECAY)
    order = Calibration(batches, tuple(experts), shuffle=True, seed=seed)
    for step in range(STEPS):
        total = 0.0
        for task, index in order.at(step).items():
            batch, head = batches[task][index], experts[task].head
            student = functional_call(encoder, dict(encoder.named_parameters()), (batch,)) @ head.weight.T + head.bias
            wanted = (experts[task](batch).detach() / temperature).log_softmax(1)
            found = (student / temperature).log_softmax(1)
            total = total + (wanted.exp() * (wanted - found)).sum(1).mean()
        warm_up = max(1, round(0.1 * STEPS))
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / warm_up, (STEPS - step) / (STEPS - warm_up))
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), NORM)
        optimizer.step()
    return {name: tensor.detach() for name, tensor in trained.items()}


def test_weights_follow_plain_autograd(problem):
    base, experts, packed, batches, merged = problem
    start = {name: tensor.clone() for name, tensor in merged.module.state_dict().items()}
    expected = literal_distill(base, experts, merged.module, batches, temperature=3.0, seed=5)
    result = sm.distill_merged(merged, batches, logits, config=config(temperature=3.0, seed=5))
    after = result.state_dict()
    for name, tensor in expected.items():
        if name in after:
            assert relative(after[name] - start[name], tensor - start[name]) < 1e-7, name
            assert torch.equal(result.module.state_dict()[name], after[name])
    assert relative(expected["second.weight"], start["second.weight"]) > 1e-3
    assert result.method == "wudi, distilled" and result.coefficients is None


def test_statistics_that_were_estimated_anew_stay_and_are_used(problem):
    base, experts, packed, batches, merged = problem
    merged.module.norm.running_mean += 0.5
    expected = literal_distill(base, experts, merged.module, batches, temperature=2.0, seed=0)
    mean = merged.module.norm.running_mean.clone()
    result = sm.distill_merged(merged, batches, logits, config=config())
    assert torch.equal(result.module.norm.running_mean, mean)
    assert relative(result.state_dict()["second.weight"], expected["second.weight"]) < 1e-7


def test_weights_in_bf16_are_trained_in_fp32_and_rounded_at_the_end(problem):
    base, experts, _, batches, _ = problem
    rounded = sm.PackedWeights.from_modules(base, experts, dtype=torch.bfloat16, heads="head.*")
    few = {task: [batch.float() for batch in held] for task, held in batches.items()}
    merged = sm.task_arithmetic(rounded, 0.3, module=make(1, dtype=torch.float32))
    before = merged.merged.clone()
    result = sm.distill_merged(merged, few, logits, config=config(learning_rate=1e-5, weight_decay=0.0, steps=40))
    assert result.merged.dtype == torch.bfloat16
    assert not torch.equal(result.merged, before), "steps of 1e-5 are lost in bf16"


def test_a_result_that_cannot_run_is_refused(problem):
    *_, packed, batches, _ = problem
    with pytest.raises(ValueError, match="give wudi a module="):
        sm.distill_merged(sm.wudi(packed), batches, logits)


def test_a_loss_that_is_not_finite_ends_it(problem):
    *_, batches, merged = problem
    with pytest.raises(FloatingPointError, match="distill the merged model"):
        sm.distill_merged(merged, batches, logits, config=config(learning_rate=1e200, gradient_norm=1e300, steps=9))


def test_heads_are_refitted_after_it(problem):
    _, _, packed, batches, merged = problem
    result = sm.refit_heads(sm.distill_merged(merged, batches, logits, config=config()), batches, logits, "head")
    assert result.method == "wudi, distilled, heads refitted"
    task = packed.tasks[0]
    assert relative(result.heads[task]["head.weight"], packed.heads[task]["head.weight"]) > 1e-4
