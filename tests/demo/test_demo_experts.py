"""The demo's encoder, heads, fine-tuning, cache and evaluation, on short runs of the real backbone."""

from dataclasses import replace

import pytest
import torch

from samerge_ext.demo import experts
from samerge_ext.demo.corpora import MissingData
from samerge_ext.demo.data import Split, load_tasks
from samerge_ext.demo.experts import FULL, SMALL, Evaluator, Heads, collate, encode, load_backbone, tokenise

SHORT = replace(SMALL, tasks=("r8", "icd"), steps=12, warmup=4, batch=16, max_tokens=16)


@pytest.fixture(scope="module")
def tasks():
    pytest.importorskip("transformers")
    try:
        experts.backbone_folder()
        return load_tasks(SHORT.tasks)
    except MissingData as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def heads(tasks):
    return experts.build_heads(tasks, SHORT)


@pytest.fixture(scope="module")
def expert(tasks, heads):
    return experts.fine_tune(tasks["r8"], heads, SHORT, seed=0)


def weights(module):
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def test_backbone_is_the_first_blocks_of_the_file(tasks):
    from safetensors.torch import load_file

    stored = load_file(experts.backbone_folder() / "model.safetensors")
    held = weights(load_backbone(SHORT))
    assert {name.split(".")[2] for name in held if name.startswith("encoder.layer")} == {"0", "1"}
    for name, tensor in held.items():
        assert torch.equal(tensor, stored[name]), name


def test_a_backbone_file_without_a_tensor_is_refused(tasks, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(experts.backbone_folder() / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((experts.backbone_folder() / "config.json").read_text())
    with pytest.raises(RuntimeError, match="encoder.layer.1.output.dense.bias"):
        experts.load_folder(tmp_path, num_hidden_layers=2)


def test_features_are_the_mean_over_real_tokens_whatever_the_padding(tasks):
    backbone = load_backbone(SHORT)
    short, long = tokenise(["a bad film", "profit of the company rose in the quarter that ended in June"], SHORT)
    with torch.no_grad():
        hidden = backbone(input_ids=torch.tensor([short])).last_hidden_state[0].mean(0)
        features = encode(backbone, collate([short, long]))
    torch.testing.assert_close(features[0], hidden / hidden.norm(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2))


def test_texts_are_cut_to_the_protocols_length(tasks):
    assert max(map(len, tokenise(["word " * 100], SHORT))) == SHORT.max_tokens
    batch = experts.text_batches(["word " * 100, "word", "word"], SHORT, size=2)
    assert [tuple(part["input_ids"].shape) for part in batch] == [(2, SHORT.max_tokens), (1, 3)]
    assert batch[0]["attention_mask"].sum(1).tolist() == [SHORT.max_tokens, 3]


def test_heads_are_scaled_cosines_with_the_descriptions(tasks, heads):
    features = encode(load_backbone(SHORT), collate(tokenise(tasks["icd"].descriptions, SHORT)))
    logits = heads(features, "icd")
    assert logits.shape == (21, 21)
    torch.testing.assert_close(logits.diagonal(), torch.full((21,), 20.0), rtol=1e-4, atol=0)
    assert logits.argmax(1).tolist() == list(range(21)), "two descriptions cannot be told apart"


def test_fine_tuning_moves_the_blocks_and_not_the_embeddings(expert):
    base, moved = weights(load_backbone(SHORT)), weights(expert)
    changed = {name for name in base if not torch.equal(base[name], moved[name])}
    assert changed == {name for name in base if name.startswith("encoder.")}
    assert all(parameter.requires_grad for parameter in expert.parameters())


def test_embeddings_are_fine_tuned_where_the_protocol_says_so(tasks, heads):
    free = replace(SHORT, freeze_embeddings=False, steps=2, warmup=1)
    base, moved = weights(load_backbone(free)), weights(experts.fine_tune(tasks["r8"], heads, free, seed=0))
    name = "embeddings.word_embeddings.weight"
    assert not torch.equal(base[name], moved[name])


def test_an_expert_is_better_than_the_backbone(tasks, heads, expert):
    evaluator = Evaluator({"r8": tasks["r8"]}, heads, SHORT, "tuning")
    assert evaluator.accuracy(expert, "r8") > evaluator.accuracy(load_backbone(SHORT), "r8") + 0.1


def test_a_seed_repeats_an_expert_and_another_does_not(tasks, heads):
    quick = replace(SHORT, steps=3, warmup=1)
    first, again, other = (weights(experts.fine_tune(tasks["icd"], heads, quick, seed)) for seed in (0, 0, 1))
    name = "encoder.layer.1.output.dense.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


def test_every_text_is_seen_once_before_any_is_seen_twice():
    order = torch.cat(experts.batch_order(40, steps=5, batch=16, seed=0))
    assert len(order) == 80
    assert sorted(order[:40].tolist()) == sorted(order[40:].tolist()) == list(range(40))
    assert order[:40].tolist() != order[40:].tolist()


@pytest.mark.parametrize("protocol", [SMALL, FULL], ids=["small", "full"])
def test_learning_rate_warms_up_and_falls_to_zero(protocol):
    shares = [experts.learning_rate_share(step, protocol.steps, protocol.warmup) for step in range(protocol.steps + 1)]
    assert shares[:3] == [0.1, 0.2, 0.3]
    assert max(shares) == shares[protocol.warmup - 1] == shares[protocol.warmup] == 1
    assert shares[-1] == 0
    falls = [a - b for a, b in zip(shares[protocol.warmup :], shares[protocol.warmup + 1 :])]
    assert falls == pytest.approx([1 / (protocol.steps - protocol.warmup)] * len(falls))


def test_an_expert_is_made_once_and_a_changed_recipe_makes_another(tasks, heads, expert, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(experts, "fine_tune", lambda task, heads, protocol, seed, progress: made.append(seed) or expert)
    task = tasks["r8"]
    folder = experts.expert_folder(task, heads, SHORT, 0, tmp_path)
    assert experts.expert_folder(task, heads, SHORT, 0, tmp_path) == folder and len(made) == 1
    relabelled = replace(task, train=Split(task.train.texts, task.train.labels[::-1]))
    others = {
        experts.expert_folder(task, heads, SHORT, 1, tmp_path),
        experts.expert_folder(task, heads, replace(SHORT, learning_rate=1e-4), 0, tmp_path),
        experts.expert_folder(relabelled, heads, SHORT, 0, tmp_path),
        experts.expert_folder(replace(task, descriptions=task.descriptions[::-1]), heads, SHORT, 0, tmp_path),
    }
    assert len(others - {folder}) == 4 and len(made) == 5


def test_more_tasks_in_a_protocol_keep_the_cached_experts(tasks, heads, expert, tmp_path, monkeypatch):
    monkeypatch.setattr(experts, "fine_tune", lambda *arguments: expert)
    more = replace(SHORT, tasks=("r8", "icd", "tweets"))
    folders = [experts.expert_folder(tasks["r8"], heads, protocol, 0, tmp_path) for protocol in (SHORT, more)]
    assert folders[0] == folders[1]


def test_a_saved_expert_loads_with_transformers(tasks, heads, expert, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    folder = tmp_path / "expert"
    experts.save_folder(expert, folder)
    text = "oil prices rose"
    batch = AutoTokenizer.from_pretrained(folder)([text], return_tensors="pt")
    assert batch["input_ids"].tolist() == tokenise([text], SHORT)
    with torch.no_grad():
        expected = encode(expert, batch)
        assert torch.equal(encode(AutoModel.from_pretrained(folder).eval(), batch), expected)
        assert torch.equal(encode(experts.load_folder(folder), batch), expected)


def test_an_interrupted_save_leaves_nothing(tasks, expert, tmp_path, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(experts, "load_tokenizer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        experts.save_folder(expert, tmp_path / "expert")
    assert list(tmp_path.iterdir()) == []


def test_accuracy_is_the_share_of_right_texts_one_by_one(tasks, heads, expert):
    test = tasks["r8"].test
    few = replace(tasks["r8"], test=Split(test.texts[:50], test.labels[:50]))
    with torch.no_grad():
        guesses = [heads(encode(expert, collate(tokenise([text], SHORT))), "r8").argmax().item() for text in few.test.texts]
    right = sum(guess == label for guess, label in zip(guesses, few.test.labels, strict=True))
    assert 0 < right < 50, "a text set on which all or none are right proves nothing"
    assert Evaluator({"r8": few}, heads, SHORT, "test", size=16).accuracies(expert) == {"r8": right / 50}


def test_heads_follow_the_features_dtype():
    heads = Heads({"task": torch.eye(3)})
    assert heads(torch.ones(2, 3, dtype=torch.float64), "task").dtype == torch.float64


@pytest.mark.parametrize("progress", [True, False])
def test_fine_tuning_and_judging_show_bars_unless_they_should_not(tasks, heads, capsys, progress):
    module = experts.fine_tune(tasks["r8"], heads, replace(SHORT, steps=2, warmup=1), 0, progress)
    Evaluator({"r8": tasks["r8"]}, heads, SHORT, "tuning", progress=progress).accuracies(module)
    shown = capsys.readouterr().err
    assert ("expert 'r8'" in shown) == ("tuning texts" in shown) == progress and bool(shown) == progress
