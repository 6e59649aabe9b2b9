"""The study of language models from end to end, on a tiny random model in the place of SmolLM2."""

import json
import math
from dataclasses import replace

import pytest
import torch
from helpers import assert_close
from rich.console import Console

from samerge_ext.demo import language, language_study
from samerge_ext.demo.data import Split, Task
from samerge_ext.demo.studies import run_study

KINDS = ("vowels", "digits")
TINY = replace(language.SMALL, kinds=KINDS, max_tokens=8, steps=8, batch=4, rank=2, calibration=4, test=6, learning_rate=5e-2)


def split(kind, first, count):
    letters = {"vowels": "aeiou", "digits": "12345"}[kind]
    texts = tuple(letters[i % 5] * (3 + i % 4) + f"{letters[i // 5 % 5]}" for i in range(first, first + count))
    return Split(texts, (0,) * count)


def save_base(folder):
    """A Llama of random weights and a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=language.START).save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=264, num_key_value_heads=1, tie_word_embeddings=True, initializer_range=0.3, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Runs the study; called again, it continues from the same cache."""
    pytest.importorskip("peft")
    root = tmp_path_factory.mktemp("language")
    base = save_base(root / "base")
    tasks = {kind: Task(kind, (), split(kind, 0, 25), split(kind, 25, 25), split(kind, 50, 25)) for kind in KINDS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language_study, "SMALL", TINY)
        patch.setattr(language_study, "STEPS", 3)
        patch.setattr(language, "load_tasks", lambda names: {name: tasks[name] for name in names})
        patch.setattr(language.LanguageBench, "base", base)

        def run(seeds=1):
            options = {"full": False, "seeds": seeds, "out": root / "out", "cache": root / "cache", "progress": False}
            return run_study("language", console=Console(record=True, width=200), **options), root

        yield run


def test_the_table_has_every_row_and_experts_know_their_own_kind(study):
    found, root = study()
    labels = [row.label for row in language_study.rows_of(KINDS)]
    assert [cell.method for cell in found if cell.method != language_study.OWN] == labels
    table = (root / "out/language-small.md").read_text()
    assert all(f"| {label} |" in table for label in labels)
    by_method = {cell.method: cell for cell in found}
    pretrained, own = by_method["pretrained"], by_method[language_study.OWN]
    for kind in KINDS:
        assert own.perplexities[kind] == by_method[f"expert '{kind}'"].perplexities[kind] < pretrained.perplexities[kind]
    assert all(cell.seconds > 0 for cell in found if "Merging" in cell.method)
    assert own.mean == pytest.approx(math.sqrt(math.prod(own.perplexities.values())))


def test_finished_cells_are_not_computed_again(study, monkeypatch):
    before, _ = study()
    monkeypatch.setattr(language_study, "merged", lambda *_: pytest.fail("computed again"))
    monkeypatch.setattr(language, "fine_tune", lambda *_: pytest.fail("computed again"))
    assert study()[0] == before


def test_the_best_scale_is_that_of_the_calibration_texts(study):
    _, root = study()
    cells = [json.loads(path.read_text()) for path in (root / "cache/language/cells/seed0").glob("*.json")]
    chosen = [cell for cell in cells if "scales" in cell["settings"]]
    assert len(chosen) == 4
    for cell in chosen:
        assert cell["tried"][str(cell["scale"])] == min(cell["tried"].values())


def test_perplexity_is_of_the_tokens_that_are_not_padding(study):
    """Against one text at a time in fp64."""
    _, root = study()
    bench = language.LanguageBench(TINY, 0, root / "cache", progress=False)
    module, texts = bench.module(), ["aei", "aaaaaa", "oo"]
    found = language.perplexities(module, {"vowels": bench.batches(texts, 2)})
    module, surprises = module.double(), []
    for text in texts:
        (batch,) = bench.batches([text], 1)
        ids = batch["input_ids"][0]
        assert ids[0] == bench.tokenizer.convert_tokens_to_ids(language.START) and len(ids) == 1 + len(text)
        log_p = module(input_ids=ids[None]).logits[0].log_softmax(-1)
        surprises += [-log_p[i, ids[i + 1]] for i in range(len(ids) - 1)]
    assert_close(torch.tensor(found["vowels"], dtype=torch.float32), torch.stack(surprises).mean().exp())


def test_what_a_merge_learns_from_is_in_no_other_split(study):
    _, root = study()
    bench = language.LanguageBench(TINY, 1, root / "cache", progress=False)
    for kind, task in bench.tasks.items():
        drawn = bench.calibration_texts(kind)
        assert set(drawn) <= set(task.tuning.texts) and len(drawn) == TINY.calibration
    assert bench.calibration_texts("digits") != language.LanguageBench(TINY, 0, root / "cache").calibration_texts("digits")


def test_there_is_no_full_variant(tmp_path):
    with pytest.raises(ValueError, match="leave out --full"):
        run_study("language", full=True, seeds=1, out=tmp_path, cache=tmp_path, progress=False, console=Console())
