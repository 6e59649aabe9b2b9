"""On the real encoder in fp32: twenty steps of paper SAM against the literal loop."""

import literal
import pytest
import torch

import samerge_ext as sm
from samerge_ext.demo.corpora import MissingData
from samerge_ext.demo.experts import SMALL, encode, load_backbone, text_batches

TEXTS = {
    "weather": ["rain is coming", "the sun shines over the bay", "wind from the north", "a cold night"],
    "sport": ["the match ended in a draw", "she won the race", "a goal in the last minute", "he lost the final"],
}


@pytest.mark.parametrize("adaptive", [False, True])
def test_minilm_follows_the_literal_loop(adaptive):
    try:
        base = load_backbone(SMALL)
    except MissingData as error:
        pytest.skip(str(error))
    experts, heads = {}, {}
    for seed, task in enumerate(TEXTS):
        torch.manual_seed(seed)
        experts[task] = load_backbone(SMALL)
        heads[task] = torch.randn(384, 3)
        with torch.no_grad():
            for name, parameter in experts[task].named_parameters():
                if not name.startswith("embeddings"):
                    parameter += 0.3 * parameter.std().nan_to_num(0.01) * torch.randn_like(parameter)
    batches = {task: text_batches(texts, SMALL, 2) for task, texts in TEXTS.items()}
    rho = 0.5 if adaptive else 0.07
    expected = literal.learn(
        base,
        experts,
        heads,
        batches,
        steps=20,
        rho=rho,
        adaptive=adaptive,
        logits=lambda model, batch, head: 5 * encode(model, batch) @ head,
    )[-1]
    packed = sm.PackedWeights.from_modules(base, experts)
    logits = sm.models.SharedEncoder(encode, lambda features, task: 5 * features @ heads[task])
    config = sm.SAMergingConfig(steps=20, rho=rho, adaptive=adaptive, progress=False)
    coefficients = sm.samerging(load_backbone(SMALL), packed, batches, logits, config=config).coefficients
    changed = torch.tensor([offset is not None for offset in packed.layout.offsets])
    error = (coefficients - expected).norm() / expected.norm()
    assert error < 1e-4, f"off by {error:.1e}, relative"
    assert (coefficients - 0.3)[:, changed].abs().mean() > 5e-3, "the coefficients have moved"
