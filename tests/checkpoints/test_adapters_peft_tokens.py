"""Adapters of the real PEFT that train embeddings, heads and added tokens."""

import shutil
import warnings

import pytest
import torch
from helpers import assert_close
from vocabularies import write_tokenizer

import samerge_ext as sm

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from peft_adapters import assert_is_pefts, load, packed_of, write, write_models  # noqa: E402


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("bases"))


@pytest.mark.parametrize(
    ("settings", "tied"),
    [
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, False),
        ({"trainable_token_indices": [1, 30]}, False),
        ({"modules_to_save": ["embed_tokens"]}, True),
        ({"modules_to_save": ["lm_head"]}, True),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, True),
    ],
)
def test_tied_embeddings_are_changed_together_or_refused(bases, tmp_path, settings, tied):
    write(bases / "tied llama", tmp_path, peft.LoraConfig(target_modules=["q_proj"], **settings))
    if tied:
        with pytest.raises(ValueError, match="is tied to"):
            packed_of(bases / "tied llama", tmp_path)
    else:
        assert_is_pefts(packed_of(bases / "tied llama", tmp_path), bases / "tied llama", tmp_path)


def test_tokens_trained_alone(bases, tmp_path):
    write(bases / "llama", tmp_path, peft.TrainableTokensConfig(token_indices=[4, 9]))
    assert_is_pefts(packed_of(bases / "llama", tmp_path), bases / "llama", tmp_path)
    write(bases / "llama", tmp_path, peft.LoraConfig(r=2, trainable_token_indices={"embed_tokens": [1], "lm_head": [2, 7]}))
    for form in (None, "lora"):
        assert_is_pefts(packed_of(bases / "llama", tmp_path, form), bases / "llama", tmp_path)


def test_the_advice_for_added_tokens_works(bases, tmp_path):
    model = load(bases / "llama")
    model.resize_token_embeddings(34, mean_resizing=False)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "lora", save_embedding_layers=True)
    with pytest.raises(ValueError, match="The expert has 34 tokens, the base 32: .*tokenizer: union"):
        packed_of(bases / "llama", tmp_path / "lora")
    resized = load(bases / "llama")
    resized.resize_token_embeddings(34)
    resized.save_pretrained(tmp_path / "base")
    truth = adapted.merge_and_unload().state_dict()
    with pytest.warns(UserWarning, match="says that it is an adapter of"):
        found = packed_of(tmp_path / "base", tmp_path / "lora")
    for name, tensor in found.items():
        assert_close(tensor, truth[name].double(), name)


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("llama", {"target_modules": ["q_proj"]}),
        ("tied llama", {"target_modules": ["q_proj"]}),
        ("llama", {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    ],
)
def test_tokens_that_were_added_before_an_adapter_was_trained(bases, tmp_path, model, settings):
    """The adapter holds all rows, those of the added tokens too; beside the tokenizer that knows them it is an expert as any."""
    resized = load(bases / model)
    resized.resize_token_embeddings(34, mean_resizing=False)
    adapted = peft.get_peft_model(resized, peft.LoraConfig(**settings, init_lora_weights=False))
    if "modules_to_save" in settings:
        with torch.no_grad():
            adapted.get_input_embeddings().weight[:] += 0.5
    adapted.save_pretrained(tmp_path / "lora", save_embedding_layers=True)
    truth = adapted.merge_and_unload().state_dict()
    words = [f"w{i}" for i in range(32)]
    shutil.copytree(bases / model, tmp_path / "base")
    write_tokenizer(tmp_path / "base", words)
    write_tokenizer(tmp_path / "lora", [*words, "<x>", "<y>"], ("<x>", "<y>"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed = sm.PackedWeights.from_folders(tmp_path / "base", {"task": tmp_path / "lora"}, tokenizer="union")
    found = packed.state_dict(packed.merge(packed.one_hot("task")))
    assert packed.tokenizer.rows == 34 and [token["content"] for token in packed.tokenizer.added.values()] == ["<x>", "<y>"]
    for name, tensor in found.items():
        assert_close(tensor, truth[name].double(), name)
    with pytest.raises(ValueError, match="task_vector_dtype='lora' keeps factors of the rows as they are stored"):
        options = {"tokenizer": "union", "task_vector_dtype": "lora"}
        sm.PackedWeights.from_folders(tmp_path / "base", {"task": tmp_path / "lora"}, **options)


def test_an_adapter_that_lost_the_rows_of_its_head_is_refused(bases, tmp_path):
    """PEFT saves those of the embeddings, which have factors, and not those of the untied head beside them."""
    resized = load(bases / "llama")
    resized.resize_token_embeddings(34, mean_resizing=False)
    adapted = peft.get_peft_model(resized, peft.LoraConfig(target_modules=["q_proj", "embed_tokens"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "lora", save_embedding_layers=True)
    words = [f"w{i}" for i in range(32)]
    shutil.copytree(bases / "llama", tmp_path / "base")
    write_tokenizer(tmp_path / "base", words)
    write_tokenizer(tmp_path / "lora", [*words, "<x>", "<y>"], ("<x>", "<y>"))
    with pytest.raises(ValueError, match="has 34 rows, and 'lm_head.weight' 32: rows of some tokens are missing"):
        sm.PackedWeights.from_folders(tmp_path / "base", {"task": tmp_path / "lora"}, tokenizer="union")
