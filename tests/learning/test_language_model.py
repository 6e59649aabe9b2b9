"""Language models learn from hidden states what they learn from logits, which are never computed."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from helpers import BF16_COEFFICIENTS, ROOT, assert_alike
from torch import nn

import samerge_ext as sm
from samerge_ext.learning import teachers
from samerge_ext.merged.streamed_rows import StreamedRows

pytest.importorskip("transformers")
import tiny_language_models as models  # noqa: E402

CONFIG = {"steps": 2, "learning_rate": 0.1, "progress": False}


def learned(base, packed, logits, method=sm.samerging, config=sm.SAMergingConfig, batches=None, **settings):
    config = config(**{**CONFIG, **settings})
    return method(copy.deepcopy(base), packed, batches or models.make_batches(), logits, config=config)


def losses(result):
    return torch.tensor([step["loss"] for step in result.history], dtype=torch.float64)


@pytest.fixture
def no_logits(monkeypatch):
    """An error where a head is multiplied out by the module."""
    forward = nn.Linear.forward

    def checked(self, x):
        assert self.out_features != models.VOCABULARY, "logits are computed"
        return forward(self, x)

    def check():
        monkeypatch.setattr(nn.Linear, "forward", checked)

    return check


@pytest.mark.parametrize("name", models.EXACT)
def test_coefficients_are_those_learned_from_logits(name, no_logits, monkeypatch):
    base = models.make(name)
    packed, adapter = models.make_packed(base), models.adapter(name)
    expected = learned(base, packed, adapter.logits)
    no_logits()
    monkeypatch.setattr(StreamedRows, "whole", lambda rows: pytest.fail("a streamed head is merged whole"))
    for streamed in (False, True):
        found = learned(base, packed, adapter, streamed=streamed)
        assert_alike(found.coefficients, expected.coefficients, f"λ, streamed={streamed}")
        assert_alike(losses(found), losses(expected), "losses")
    assert expected.coefficients.std() > 0.1


@pytest.mark.parametrize("name", [name for name in models.MODELS if name not in models.EXACT])
def test_logits_that_are_more_than_a_product_are_computed(name):
    base = models.make(name)
    packed, adapter = models.make_packed(base), models.adapter(name)
    assert not adapter.is_exact(base, models.padded())
    expected = learned(base, packed, adapter.logits).coefficients
    assert_alike(learned(base, packed, adapter).coefficients, expected)


def test_a_head_that_is_no_linear_layer_or_has_hooks_is_left_alone():
    adapter, batch = sm.models.causal_lm, models.padded()
    base = models.make("llama")
    assert adapter.is_exact(base, batch) and "forward" not in vars(base.lm_head)
    hook = base.lm_head.register_forward_hook(lambda part, args, output: output.tanh())
    assert not adapter.is_exact(base, batch)
    hook.remove()

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    base.lm_head.__class__ = Doubled
    assert not adapter.is_exact(base, batch)
    scaled = models.make("granite, scaled")
    assert adapter.is_exact(scaled, batch)
    scaled.lm_head.bias = nn.Parameter(torch.ones(models.VOCABULARY, dtype=torch.float64))
    assert not adapter.is_exact(scaled, batch), "its bias is scaled too"
    assert not adapter.is_exact(nn.Linear(2, 2), batch)


METHODS = {
    "adamerging": (sm.adamerging, sm.AdaMergingConfig, {}),
    "statsmerging": (sm.statsmerging, sm.StatsMergingConfig, {}),
    "statsmerging, kl": (sm.statsmerging, sm.StatsMergingConfig, {"loss": "kl"}),
    "confidence": (sm.samerging, sm.SAMergingConfig, {"confidence_weights": True}),
    "temperatures": (sm.samerging, sm.SAMergingConfig, {"temperature": 3.0, "teacher_temperature": 1.5}),
    "reverse": (sm.samerging, sm.SAMergingConfig, {"beta": 1.0}),
    "task weights": (sm.samerging, sm.SAMergingConfig, {"task_weights": {"a": 0.2}}),
    "held back": (sm.samerging, sm.SAMergingConfig, {"held_back": 0.5, "measure_every": 1}),
    "rank": (sm.samerging, sm.SAMergingConfig, {"granularity": "rank", "rank": 2}),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_the_same(method, no_logits):
    base = models.make("roberta")  # whose head has a bias
    packed, adapter = models.make_packed(base), models.adapter("roberta")
    run, config, settings = METHODS[method]
    expected = learned(base, packed, adapter.logits, run, config, **settings)
    no_logits()
    found = learned(base, packed, adapter, run, config, **settings)
    assert_alike(found.coefficients, expected.coefficients)
    for name, of_layer in expected.component_coefficients.items():
        assert_alike(found.component_coefficients[name], of_layer, name)
    assert_alike(*(torch.tensor([step.get("held_back_loss", 0.0) for step in r.history]).double() for r in (found, expected)))


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("k", [3, models.VOCABULARY])
def test_teachers_most_likely_tokens(k, streamed, no_logits, monkeypatch):
    """With all of them λ is that of logits; with fewer no head of a teacher is there once the batches have been read."""
    base = models.make("qwen2, tied")
    packed = models.make_packed(base)
    settings = {"steps": 4, "temperature": 1.0}
    expected = learned(base, packed, sm.models.causal_lm.logits, **settings).coefficients
    kept = learned(base, packed, sm.models.causal_lm.logits, teacher_top_k=k, **settings).coefficients
    no_logits()
    monkeypatch.setattr(teachers, "expert_head", lambda *_: pytest.fail("a teacher's head is made"))
    found = learned(base, packed, sm.models.causal_lm, teacher_top_k=k, streamed=streamed, **settings).coefficients
    assert_alike(found, kept)
    off = (found - expected).norm() / (expected - 0.3).norm()
    assert off < 1e-9 if k == models.VOCABULARY else off > 1e-4


@pytest.mark.parametrize("streamed", [False, True])
def test_a_divergence_between_forward_and_reverse(streamed, no_logits):
    base = models.make("qwen2, tied")
    packed = models.make_packed(base)
    expected = learned(base, packed, sm.models.causal_lm.logits, beta=0.3).coefficients
    no_logits()
    assert_alike(learned(base, packed, sm.models.causal_lm, beta=0.3, streamed=streamed).coefficients, expected)


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("name", ["roberta", "qwen2, tied"])
def test_a_merged_model_is_distilled_to_the_same(name, beta, no_logits):
    base = models.make(name)
    packed, adapter = models.make_packed(base), models.adapter(name)
    config = sm.MergedDistillationConfig(steps=3, learning_rate=1e-2, beta=beta, progress=False)

    def distilled(logits):
        merged = sm.task_arithmetic(packed, 0.3, module=copy.deepcopy(base))
        return sm.distill_merged(merged, models.make_batches(), logits, config=config)

    expected = distilled(adapter.logits)
    no_logits()
    found = distilled(adapter)
    assert_alike(found.merged, expected.merged)
    assert (expected.merged - packed.merge(packed.coefficients(0.3))).norm() > 0.01


@pytest.mark.parametrize("streamed", [False, True])
def test_heads_of_the_tasks_teach_and_are_learned(streamed, no_logits):
    """A teacher's head stays the expert's while the task's own is trained."""
    base = models.make("llama")
    packed = models.make_packed(base, heads="lm_head.*")
    settings = {"train_heads": "lm_head.*", "head_learning_rate": 0.05, "held_back": 0, "streamed": streamed}
    expected = learned(base, packed, sm.models.causal_lm.logits, **settings)
    no_logits()
    found = learned(base, packed, sm.models.causal_lm, **settings)
    assert_alike(found.coefficients, expected.coefficients)
    for task in models.TASKS:
        assert_alike(found.heads[task]["lm_head.weight"], expected.heads[task]["lm_head.weight"])
        assert not torch.equal(found.heads[task]["lm_head.weight"], packed.heads[task]["lm_head.weight"])


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("form", ["int8", "trimmed"])
def test_teachers_heads_are_the_experts_themselves(form, streamed, tmp_path):
    """Quantised or trimmed task vectors do not give them."""
    base = models.make("qwen2, tied", torch.float32)
    if form == "trimmed":
        packed = sm.trimmed(models.make_packed(base), density=0.2)
    else:
        packed = models.make_packed(base, task_vector_dtype="int8")
    expected = learned(base, packed, sm.models.causal_lm.logits, streamed=streamed).coefficients
    found = learned(base, packed, sm.models.causal_lm, streamed=streamed).coefficients
    assert_alike(found, expected)


def test_examples_cannot_be_chosen_among_tokens():
    base = models.make("llama")
    with pytest.raises(ValueError, match="its logits have .* rows, not one for each"):
        learned(base, models.make_packed(base), sm.models.causal_lm, samples=1)


# Batches.


def rows(name, batch):
    return models.adapter(name).hidden_states(models.make(name), batch).detach()


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2, tied", "mixtral"])
def test_texts_give_the_same_rows_however_they_are_put_together(name):
    right = rows(name, models.padded())
    assert_alike(rows(name, models.padded(left=True)), right, "padding on the left")
    assert_alike(torch.cat([rows(name, models.padded([text])) for text in models.TEXTS]), right, "texts by themselves")
    assert_alike(rows(name, models.in_a_row()), right, "in a row")


def test_texts_in_a_row_teach_the_same():
    base = models.make("llama")
    packed = models.make_packed(base)
    found = []
    for batch in (models.padded(), models.padded(left=True), models.in_a_row()):
        found.append(learned(base, packed, sm.models.causal_lm, batches={task: [batch] for task in models.TASKS}).coefficients)
    assert_alike(found[1], found[0], "padding on the left")
    assert_alike(found[2], found[0], "in a row")


def test_roberta_as_a_decoder_counts_its_own_positions():
    """They begin after that of padding."""
    import transformers

    torch.manual_seed(0)
    config = transformers.RobertaConfig(**{**models.MODELS["roberta"][3], "is_decoder": True})
    model = transformers.RobertaForCausalLM(config).double().eval()
    batch = models.padded([[2, 5, 6, 7, 3]])
    found = sm.models.causal_lm.hidden_states(model, batch)
    expected = model.roberta(**batch).last_hidden_state[0]
    expected = model.lm_head.layer_norm(nn.functional.gelu(model.lm_head.dense(expected)))
    assert_alike(found, expected)


def test_bf16_learns_the_coefficients_of_fp32():
    base = models.make("llama", torch.float32)
    packed = models.make_packed(base)
    settings = {"steps": 10, "learning_rate": 0.02}
    expected = learned(base, packed, sm.models.causal_lm, **settings).coefficients
    for streamed in (False, True):
        found = learned(base, packed, sm.models.causal_lm, precision="bf16", streamed=streamed, **settings).coefficients
        assert (found - expected).abs().max() < BF16_COEFFICIENTS
    assert (expected - 0.3).abs().max() > 10 * BF16_COEFFICIENTS


# Memory.


def test_logits_of_a_wide_vocabulary_are_never_held():
    script = ROOT / "tests" / "support" / "language_model_memory.py"
    done = subprocess.run([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, check=True)
    for rise, planned, logits in json.loads(done.stdout.splitlines()[-1]):
        assert rise < logits / 4, "of one task's logits, the workspace and the head included"
        assert planned < logits / 4, "nor planned for"
