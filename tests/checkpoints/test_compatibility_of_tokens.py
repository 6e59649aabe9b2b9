"""Folders whose tokenizers do not say the same, and tokens that were added."""

import json
import shutil

import pytest
import torch
from configured_folders import LLAMA3, WORDS, fast, pieces, warned, write
from helpers import assert_close
from safetensors.torch import load_file

import samerge_ext as sm
from samerge_ext.checkpoints.compatibility import check_models
from samerge_ext.checkpoints.reading import CheckpointError
from samerge_ext.checkpoints.vocabulary import Vocabulary, difference, vocabulary_advice


@pytest.fixture
def make(tmp_path):
    """Writes a folder by its name."""
    return lambda name, config=None, **files: write(tmp_path / name, config, **files)


def both(make, base, expert):
    """How the vocabulary of one set of files differs from another's."""
    return difference(Vocabulary(make("base", **base)), Vocabulary(make("a", **expert)))


def test_files_that_say_the_same_are_no_difference(make):
    json_, text, map_ = fast(WORDS), "\n".join(WORDS), {word: number for number, word in enumerate(WORDS)}
    written = json.dumps(fast(WORDS, padding={"strategy": "BatchLongest"}, truncation={"max_length": 128}), indent=1)
    turned = fast(WORDS)
    turned["model"]["vocab"] = dict(reversed(turned["model"]["vocab"].items()))
    unigram = {"added_tokens": [], "model": {"type": "Unigram", "vocab": [[word, -1.0] for word in WORDS]}}
    for one, other in [
        ({"tokenizer__json": json_}, {"tokenizer__json": written}),
        ({"tokenizer__json": json_}, {"tokenizer__json": turned}),
        ({"tokenizer__json": json_}, {"tokenizer__json": unigram}),
        ({"tokenizer__json": json_}, {"vocab__txt": text}),
        ({"vocab__txt": text}, {"vocab__txt": text.replace("\n", "\r\n") + "\r\n"}),
        ({"tokenizer__json": json_}, {"vocab__json": map_}),
        ({"vocab__json": map_, "merges__txt": "a b"}, {"vocab__json": json.dumps(map_, indent=2)}),
        ({"tokenizer__json": json_}, {"tokenizer__model": pieces(WORDS)}),
        ({"tokenizer__json": fast(["<s>", "<unk>", *WORDS])}, {"sentencepiece__bpe__model": pieces(["<unk>", *WORDS])}),
        ({"spiece__model": pieces(WORDS)}, {"spiece__model": pieces(WORDS) + b"\x12\x02\x18\x02"}),
        ({"tokenizer__json": fast(WORDS, ["<x>"])}, {"vocab__json": map_, "added_tokens__json": {"<x>": len(WORDS)}}),
        ({"tokenizer__json": json_}, {}),
        ({"vocab__txt": text}, {"merges__txt": "a b"}),
        ({"tokenizer__json": {**json_, "model": {"type": "BPE", "vocab": map_}}}, {"vocab__txt": "word1 7\nword2 5"}),  # counts
    ]:
        for base, expert in ((one, other), (other, one)):
            assert both(make, base, expert) is None, (list(base), list(expert))
            for name in ("base", "a"):
                shutil.rmtree(make(name))


SWAPPED = [*WORDS[:100], *reversed(WORDS[100:110]), *WORDS[110:]]


@pytest.mark.parametrize(
    ("base", "expert"),
    [
        ({"tokenizer__json": fast(WORDS)}, {"tokenizer__json": fast(SWAPPED)}),
        ({"tokenizer__json": fast(WORDS)}, {"tokenizer__json": fast(["<new>", *WORDS])}),
        ({"vocab__txt": "\n".join(WORDS)}, {"vocab__txt": "\n".join(SWAPPED)}),
        ({"vocab__json": dict(zip(WORDS, range(400)))}, {"tokenizer__json": fast(SWAPPED)}),
        ({"tokenizer__model": pieces(WORDS)}, {"tokenizer__model": pieces(SWAPPED)}),
        ({"tokenizer__json": fast(WORDS)}, {"tokenizer__model": pieces(SWAPPED)}),
        ({"tokenizer__json": fast(WORDS)}, {"tokenizer__json": fast([f"mot{i}" for i in range(400)])}),
    ],
)
def test_tokens_with_other_numbers_are_an_error(make, base, expert):
    found = both(make, base, expert)
    assert found.total and "tokens have another number or are others" in found.text
    with pytest.raises(ValueError, match="expert 'a' .*tokenizer is not that of base .*put the base's in their place"):
        check_models(make("base"), [("a", make("a"))])
    assert warned(make("base"), {"a": make("a")}, heads=["*embed_tokens.weight", "lm_head.*"]) == []  # kept per task


def test_the_advice_to_copy_the_bases_tokenizer_works(make):
    base, expert = make("base", tokenizer__json=fast(WORDS)), make("a", tokenizer__json=fast(SWAPPED))
    shutil.copy(base / "tokenizer.json", expert / "tokenizer.json")
    assert warned(base, {"a": expert}) == []


def test_some_other_tokens_are_one_warning(make):
    base = make("base", tokenizer__json=fast(WORDS, ["<r0>", "<r1>"]))
    for added, said in [
        (["<r0>", "<r1>", "<|im_start|>", "<|im_end|>"], "2 tokens more ('<|im_start|>', '<|im_end|>')"),
        (["<r0>"], "1 tokens fewer ('<r1>')"),
        (["<r0>", "<tool>"], "1 other tokens (401 is '<tool>' and was '<r1>')"),
        (["<r1>", "<r0>"], "2 other numbers ('<r1>' 400, was 401, '<r0>' 401, was 400)"),
    ]:
        (line,) = warned(base, {"a": make("a", tokenizer__json=fast(WORDS, added))})
        assert said in line and line.startswith("expert 'a' (") and "base (" in line, line


def test_words_in_the_place_of_unused_ones_are_a_warning(make):
    """Fine-tunes of BERT on a domain put its words where the vocabulary has room for a thousand."""
    base = make("base", vocab__txt="\n".join([*(f"[unused{i}]" for i in range(20)), *WORDS]))
    (line,) = warned(base, {"a": make("a", vocab__txt="\n".join([*(f"drug{i}" for i in range(20)), *WORDS]))})
    assert "20 other tokens (0 is 'drug0' and was '[unused0]'" in line


def test_a_second_file_that_disagrees_is_a_warning(make):
    """A tokenizer is loaded from tokenizer.json where there is one."""
    base = make("base", tokenizer__json=fast(WORDS), vocab__txt="\n".join(WORDS))
    (line,) = warned(base, {"a": make("a", tokenizer__json=fast(WORDS), vocab__txt="\n".join(SWAPPED))})
    assert "by vocab.txt, 10 of 400 tokens" in line


def test_files_of_other_kinds_are_compared_byte_by_byte(make):
    base = make("base", tekken__json={"vocab": []})
    assert warned(base, {"a": make("a", tekken__json={"vocab": []})}) == []
    (line,) = warned(base, {"a": make("a", tekken__json={"vocab": [1]})})
    assert "tekken.json is another file" in line


def test_the_vocabulary_of_speech_is_in_its_output_layer(make):
    config = {"model_type": "wav2vec2"}
    base = make("base", config)
    experts = {"a": make("a", config, vocab__json={"a": 0, "b": 1}), "b": make("b", config, vocab__json={"x": 0, "y": 1})}
    assert warned(base, experts, heads=["lm_head.*"]) == []
    with pytest.raises(ValueError, match="expert 'b'"):
        check_models(base, list(experts.items()))


def test_files_that_cannot_be_read(make):
    base = make("base", LLAMA3, tokenizer__json=fast(WORDS), tokenizer__model=pieces(WORDS))
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    (line,) = warned(base, {"a": make("a", LLAMA3, tokenizer__json=pointer)})
    assert "expert 'a'" in line and "tokenizer.json is not valid JSON" in line
    (line,) = warned(base, {"b": make("b", LLAMA3, tokenizer__model=pieces(WORDS)[:-300])})
    assert "tokenizer.model cannot be read as a tokenizer" in line
    (line,) = warned(base, {"d": make("d", LLAMA3, tokenizer_config__json="[]")})
    assert "its tokenizer is not compared" in line and "tokenizer_config.json" in line
    for number, fault in (("31e999", "is not valid JSON"), ("Infinity", "cannot be read as a tokenizer")):
        content = json.dumps(fast(WORDS, ["<x>"])).replace(f'"id": {len(WORDS)}', f'"id": {number}')
        (line,) = warned(base, {number: make(number, LLAMA3, tokenizer__json=content)})
        assert f"tokenizer.json {fault}" in line
    with pytest.raises(CheckpointError, match="config.json is not valid JSON"):
        check_models(base, [("c", make("c", "{"))])


# Added tokens, where the shapes say it.


def test_only_tensors_of_tokens_are_said_to_be_of_added_tokens():
    for name in ("model.embed_tokens.weight", "lm_head.weight", "bert.embeddings.word_embeddings.weight", "shared.weight"):
        assert "The expert has 34 tokens, the base 32" in vocabulary_advice(name, [32, 16], torch.Size([34, 16]))
    assert "tokens were added to the base" in vocabulary_advice("cls.predictions.bias", (40,), (32,))
    assert vocabulary_advice("lm_head.weight", [32, 16], [34, 8]) is None
    assert vocabulary_advice("lm_head.weight", [32, 16], [32, 16]) is None
    for name in ("classifier.weight", "bert.embeddings.position_embeddings.weight", "model.layers.0.mlp.up_proj.weight"):
        assert vocabulary_advice(name, [2, 16], [3, 16]) is None


@pytest.mark.parametrize("keep", [False, True])
def test_the_advice_for_added_tokens_leads_to_a_model(tmp_path, keep):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)

    def model():
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, **sizes))

    models = {name: model() for name in ("base", "a", "b")}
    models["a"].resize_token_embeddings(34, mean_resizing=False)
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    added = models["a"]
    for name in ("base", "b") if keep else ("a",):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        model.resize_token_embeddings(34 if keep else 32)
        if keep:
            with torch.no_grad():
                model.get_input_embeddings().weight[32:] = added.get_input_embeddings().weight[32:]
                model.get_output_embeddings().weight[32:] = added.get_output_embeddings().weight[32:]
        model.save_pretrained(tmp_path / name)
    packed = sm.PackedWeights.from_folders(tmp_path / "base", {name: tmp_path / name for name in ("a", "b")})
    sm.average(packed).save_pretrained(tmp_path / "out")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    tensors = [load_file(tmp_path / name / "model.safetensors") for name in ("a", "b")]
    for name, tensor in merged.items():
        assert_close(tensor, sum(one[name].double() for one in tensors) / 2)
    assert merged["lm_head.weight"].shape == (34 if keep else 32, 16)
