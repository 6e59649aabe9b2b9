"""Folders that do not fit together: what is an error, what is a warning, and what ordinary fine-tunes may differ in."""

import json
import shutil
import sys
import warnings

import pytest
import torch
from helpers import assert_close
from safetensors.torch import load_file, save_file

import samerge_ext as sm
from samerge_ext.checkpoints.compatibility import CompatibilityWarning, check_models
from samerge_ext.checkpoints.reading import CheckpointError
from samerge_ext.checkpoints.vocabulary import Vocabulary, difference, vocabulary_advice
from samerge_ext.cli.main import main
from samerge_ext.cli.messages import warnings_as_lines

# Configurations as they lie on the hub, in what is compared or may differ.
LLAMA3 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 128000, "eos_token_id": 128001,
    "hidden_act": "silu", "hidden_size": 4096, "max_position_embeddings": 8192, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.40.0.dev0",
    "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
BERT = {
    "architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.1, "gradient_checkpointing": False,
    "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768, "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512, "model_type": "bert", "num_attention_heads": 12, "num_hidden_layers": 12,
    "pad_token_id": 0, "position_embedding_type": "absolute", "transformers_version": "4.6.0.dev0", "vocab_size": 30522,
}  # fmt: skip
QWEN = {
    "architectures": ["Qwen2ForCausalLM"], "bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu",
    "hidden_size": 3584, "max_position_embeddings": 131072, "max_window_layers": 28, "model_type": "qwen2",
    "num_attention_heads": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_mrope": False,
    "use_sliding_window": False, "vocab_size": 152064,
}  # fmt: skip
GEMMA3 = {
    "model_type": "gemma3", "eos_token_id": [1, 106], "image_token_index": 262144, "mm_tokens_per_image": 256,
    "text_config": {"hidden_size": 2560, "model_type": "gemma3_text", "num_attention_heads": 8, "rope_theta": 1000000.0,
                    "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "rope_local_base_freq": 10000.0,
                    "sliding_window": 1024},
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model", "num_attention_heads": 16, "patch_size": 14},
}  # fmt: skip
CLIP = {
    "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 512,
    "text_config": {"model_type": "clip_text_model", "num_attention_heads": 8, "hidden_act": "quick_gelu", "eos_token_id": 2},
    "vision_config": {"model_type": "clip_vision_model", "num_attention_heads": 12, "hidden_act": "quick_gelu", "image_size": 224,
                      "patch_size": 32},
}  # fmt: skip
WORDS = [f"word{i}" for i in range(400)]


def fast(words, added=(), **keys):
    """A tokenizer.json."""
    vocabulary = {word: number for number, word in enumerate(words)}
    tokens = [{"id": len(words) + i, "content": content, "special": True} for i, content in enumerate(added)]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": tokens,
            "model": {"type": "WordPiece", "vocab": vocabulary}, **keys}  # fmt: skip


def pieces(words):
    """A sentencepiece model: a message of messages with a string and a score, then another field."""
    encoded = [b"\x0a" + bytes([len(word)]) + word.encode() + b"\x15\0\0\0\0\x18\1" for word in words]
    return b"".join(b"\x0a" + bytes([len(piece)]) + piece for piece in encoded) + b"\x12\x02\x18\x01"


@pytest.fixture
def make(tmp_path):
    """Writes a folder of files: JSON of objects, else texts or bytes."""

    def make(name, config=None, **files):
        (tmp_path / name).mkdir(exist_ok=True)
        for file, content in {"config.json": config, **{key.replace("__", "."): value for key, value in files.items()}}.items():
            if isinstance(content, bytes):
                (tmp_path / name / file).write_bytes(content)
            elif content is not None:
                (tmp_path / name / file).write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path / name

    return make


def warned(base, experts, heads=()):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_models(base, list(experts.items()), heads)
    assert all(issubclass(one.category, CompatibilityWarning) for one in caught)
    return [str(one.message) for one in caught]


@pytest.fixture
def compare(make):
    """Warnings for an expert's configuration beside a base's."""

    def compare(base, expert, heads=()):
        return warned(make("base", base), {"a": make("a", expert)}, heads)

    return compare


# What fine-tunes of one model differ in without a word.


@pytest.mark.parametrize(
    ("base", "expert"),
    [
        (LLAMA3, {"_name_or_path": "x", "use_cache": False, "torch_dtype": "float16", "transformers_version": "4.51.3"}),
        (LLAMA3, {"pad_token_id": 128001, "attention_dropout": 0.1, "pretraining_tp": 1, "head_dim": 128, "mlp_bias": False}),
        (LLAMA3, {"eos_token_id": [128001], "vocab_size": 128258, "unsloth_version": "2025.1"}),
        (QWEN, {"sliding_window": None, "layer_types": ["full_attention"] * 28, "dtype": "bfloat16"}),
        (QWEN, {"sliding_window": 32768}),
        ({**LLAMA3, "model_type": "gemma", "hidden_act": "gelu"}, {"hidden_activation": "gelu_pytorch_tanh"}),
        ({"model_type": "gpt2", "n_head": 12, "activation_function": "gelu_new"}, {"n_head": 12, "task_specific_params": {}}),
    ],
)
def test_ordinary_fine_tunes_are_silent(compare, base, expert):
    assert compare(base, {**base, **expert}) == []


def test_a_classifier_of_an_encoder_is_silent(compare):
    expert = {key: value for key, value in BERT.items() if key != "position_embedding_type"}
    expert |= {
        "architectures": ["BertForSequenceClassification"], "problem_type": "single_label_classification",
        "id2label": {"0": "ham", "1": "spam"}, "label2id": {"ham": 0, "spam": 1}, "classifier_dropout": 0.2, "use_cache": False,
    }  # fmt: skip
    assert compare(BERT, expert) == []
    assert compare(BERT, expert, heads=["classifier.*"]) == []


def test_the_spelling_of_newer_versions_is_the_same(compare):
    old = {**LLAMA3, "rope_scaling": {"type": "linear", "factor": 8.0}}
    new = {key: value for key, value in old.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    new |= {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "linear", "factor": 8.0}, "dtype": "bfloat16"}
    assert compare(old, {**new, "pad_token_id": None, "head_dim": 128}) == []
    assert compare(new, old) == []
    text = {**GEMMA3["text_config"]}
    del text["rope_theta"], text["rope_scaling"], text["rope_local_base_freq"]
    full = {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0}
    kinds = {"full_attention": full, "sliding_attention": {"rope_theta": 1e4}}
    assert compare(GEMMA3, {**GEMMA3, "text_config": {**text, "rope_parameters": kinds}}) == []
    kinds["sliding_attention"] = {"rope_theta": 2e4}
    (line,) = compare(GEMMA3, {**GEMMA3, "text_config": {**text, "rope_parameters": kinds}})
    assert "text_config.rope_local_base_freq is 20000.0" in line


def test_old_llama_without_rope_theta_has_the_default(compare):
    old = {key: value for key, value in LLAMA3.items() if key not in ("rope_theta", "rope_scaling")}
    assert compare(old, {**LLAMA3, "rope_theta": 10000.0}) == []
    (line,) = compare(old, {**LLAMA3, "rope_theta": 1000000})  # CodeLlama beside Llama 2
    assert "rope_theta is 1000000" in line and "10000.0" in line


def test_an_adapter_and_a_weight_file_have_no_settings_of_their_own(make, tmp_path):
    base = make("base", LLAMA3, tokenizer__json=fast(WORDS))
    adapter = make("adapter", {"model_type": "bert"}, adapter_config__json={"peft_type": "LORA"})
    assert warned(base, {"a": adapter}) == []
    (make("file") / "weights.safetensors").write_bytes(b"")
    assert warned(tmp_path / "file/weights.safetensors", {"b": adapter}) == []
    make("adapter", tokenizer__json=fast(WORDS[::-1]))
    with pytest.raises(ValueError, match="expert 'a' .*tokenizer is not that of base"):
        check_models(base, [("a", adapter)])


# Errors.


@pytest.mark.parametrize(
    ("base", "expert", "key"),
    [
        (LLAMA3, {"model_type": "bert"}, "model_type"),
        (LLAMA3, {"num_attention_heads": 64, "num_key_value_heads": 16, "head_dim": 64}, "num_attention_heads"),
        (LLAMA3, {"num_key_value_heads": 4}, "num_key_value_heads"),
        ({**LLAMA3, "head_dim": 128}, {"head_dim": 64}, "head_dim"),
        (BERT, {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"model_type": "gpt2", "n_head": 12}, {"n_head": 16}, "n_head"),
        ({"model_type": "t5", "num_heads": 8, "d_kv": 64}, {"num_heads": 16, "d_kv": 32}, "num_heads"),
        ({"model_type": "bart", "encoder_attention_heads": 12}, {"encoder_attention_heads": 16}, "encoder_attention_heads"),
        ({"model_type": "falcon", "num_kv_heads": 8}, {"num_kv_heads": 4}, "num_kv_heads"),
    ],
)
def test_tensors_that_mean_something_else_are_an_error(compare, base, expert, key):
    with pytest.raises(ValueError) as error:
        compare(base, {**base, **expert})
    assert f"{key} is {expert[key]}, in base (" in str(error.value) and "expert 'a' (" in str(error.value)
    assert "\n" not in str(error.value)


def test_all_that_is_wrong_is_said_at_once(make):
    base = make("base", LLAMA3)
    experts = {name: make(name, {**LLAMA3, "num_attention_heads": count}) for name, count in (("a", 16), ("b", 64))}
    with pytest.raises(ValueError, match="(?s)expert 'a'.*is 16.*\nexpert 'b'.*is 64"):
        check_models(base, list(experts.items()))


def test_types_that_compute_the_same_are_a_warning(compare):
    (line,) = compare(LLAMA3, {**LLAMA3, "model_type": "mistral"})
    assert "model_type is mistral" in line and "llama" in line


# Warnings.


@pytest.mark.parametrize(
    ("base", "expert"),
    [
        (LLAMA3, {"rope_theta": 2e7}),
        (LLAMA3, {"rope_scaling": {"factor": 8.0, "rope_type": "llama3"}}),
        ({**LLAMA3, "rope_scaling": {"factor": 8.0, "rope_type": "yarn"}}, {"rope_scaling": {"factor": 4.0, "type": "yarn"}}),
        (LLAMA3, {"rms_norm_eps": 1e-6}),
        (BERT, {"layer_norm_eps": 1e-5}),
        (BERT, {"hidden_act": "relu"}),
        (LLAMA3, {"max_position_embeddings": 131072}),
        (LLAMA3, {"tie_word_embeddings": True}),
        ({**LLAMA3, "sliding_window": 4096}, {"sliding_window": None}),
        (LLAMA3, {"eos_token_id": [128001, 128009]}),
        (BERT, {"pad_token_id": 1}),
        ({"model_type": "vit", "image_size": 224, "patch_size": 16}, {"image_size": 384}),
        ({"model_type": "gpt2", "layer_norm_epsilon": 1e-5}, {"layer_norm_epsilon": 1e-6}),
        ({"model_type": "mixtral", "num_experts_per_tok": 2}, {"num_experts_per_tok": 4}),
    ],
)
def test_what_is_computed_otherwise_is_one_warning(compare, base, expert):
    (line,) = compare(base, {**base, **expert})
    (key,) = expert
    assert line.startswith("expert 'a' (") and f": {key} is " in line and ", in base (" in line and "\n" not in line
    assert line.endswith("the merged model has the base's")


def test_instruct_beside_its_base_is_a_line_or_two(compare):
    assert len(compare(LLAMA3, {**LLAMA3, "eos_token_id": 128009, "rope_theta": 5e5, "transformers_version": "4.42.3"})) == 1
    lines = compare(QWEN, {**QWEN, "eos_token_id": 151645, "max_position_embeddings": 32768, "max_window_layers": 28})
    assert len(lines) == 2


def test_the_tokenizers_end_is_told_where_the_ids_do_not_say_it(make):
    base = make("base", LLAMA3, tokenizer_config__json={"eos_token": {"content": "<end>"}, "chat_template": "x"})
    expert = make("a", LLAMA3, tokenizer_config__json={"eos_token": "<|eot_id|>", "padding_side": "left"})
    (line,) = warned(base, {"a": expert})
    assert "tokenizer.eos_token is <|eot_id|>, in base" in line and "<end>" in line
    make("a", {**LLAMA3, "eos_token_id": 128009})
    (line,) = warned(base, {"a": expert})
    assert ": eos_token_id is 128009" in line


def test_nested_configurations_are_compared(compare):
    changed = json.loads(json.dumps(CLIP))
    changed["vision_config"]["num_attention_heads"] = 16
    with pytest.raises(ValueError, match="vision_config.num_attention_heads is 16, in base .* it is 12"):
        compare(CLIP, changed)
    changed["vision_config"].update(num_attention_heads=12, hidden_act="gelu")
    (line,) = compare(CLIP, changed)
    assert "vision_config.hidden_act is gelu" in line
    short = {**CLIP, "vision_config": {"model_type": "clip_vision_model", "patch_size": 32}}  # as saved where the rest is usual
    assert compare(CLIP, short) == []


def test_a_tower_is_compared_with_the_part_that_it_is(compare):
    assert compare(CLIP, CLIP["vision_config"]) == []
    assert compare(CLIP["vision_config"], CLIP) == []
    with pytest.raises(ValueError, match="vision_config.num_attention_heads is 16"):
        compare(CLIP, {**CLIP["vision_config"], "num_attention_heads": 16})
    text = {"model_type": "qwen2", "num_attention_heads": 28, "rope_theta": 1e6}
    whole = {"model_type": "qwen2_5_vl", "text_config": {**text, "model_type": "qwen2_5_vl_text"}, "vision_config": {"depth": 32}}
    (line,) = compare(text, whole)
    assert "text_config.model_type is qwen2_5_vl_text" in line
    old = {**text, "model_type": "qwen2_5_vl", "vision_config": {"depth": 32}}  # with the text model's keys beside its own
    assert compare(whole, old) == []
    with pytest.raises(ValueError, match="text_config.num_attention_heads is 14"):
        compare(whole, {**old, "num_attention_heads": 14})


def test_a_base_without_configuration_is_a_warning_where_an_expert_has_one(make):
    base, expert = make("base", tokenizer_config__json={"eos_token": "x"}), make("a", LLAMA3)
    (line,) = warned(base, {"a": expert})
    assert line.startswith("base (") and "has no config.json" in line and f"copy {expert / 'config.json'}" in line
    shutil.copy(expert / "config.json", base)
    assert warned(base, {"a": expert}) == []
    assert warned(make("c"), {"d": make("d")}) == []


def test_what_the_base_does_not_say_is_compared_between_experts(make):
    experts = {"a": make("a", LLAMA3), "b": make("b", {**LLAMA3, "rope_theta": 1e6})}
    for base in (None, make("base")):
        line, *others = warned(base, experts)
        assert len(others) == (base is not None)
        assert line.startswith("expert 'b' (") and "in expert 'a' (" in line and "base's" not in line
    assert warned(experts["a"], {"a": experts["a"], "c": experts["a"]}) == []


@pytest.mark.parametrize("config", [LLAMA3, GEMMA3, CLIP, {**BERT, "id2label": {"0": "x"}}])
@pytest.mark.parametrize("odd", [None, [], {}, [None, 2, "x"], {"x": None}, {"full_attention": None}, "x", 2.5, True])
def test_odd_values_are_differences_and_no_crash(compare, config, odd):
    changed = [{**config, key: odd} for key in (*config, "rope_parameters", "hidden_activation", "use_sliding_window")]
    changed += [
        {**config, part: {**inner, key: odd}} for part, inner in config.items() if isinstance(inner, dict) for key in inner
    ]
    for expert in changed:
        for pair in ((config, expert), (expert, config)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    compare(*pair)
                except ValueError as error:
                    assert "expert 'a' (" in str(error)


# Labels.


def labels(*names):
    return {**BERT, "id2label": {str(number): name for number, name in enumerate(names)}}


def test_classes_in_another_order_are_a_warning_unless_heads_are_kept(make):
    base = make("base", labels("LABEL_0", "LABEL_1"))
    experts = {"a": make("a", labels("NEG", "POS")), "b": make("b", labels("pos", "neg")), "c": make("c", labels("neg", "pos"))}
    (line,) = warned(base, experts)
    assert "expert 'b'" in line and "id2label has the classes in another order: pos, neg, in expert 'a'" in line
    for heads in ("classifier.*", ["*classifier.weight", "*classifier.bias"]):
        assert warned(base, experts, heads) == []
    assert len(warned(base, experts, ["bert.pooler.*"])) == 1


def test_other_classes_are_a_warning_and_another_number_is_left_to_the_shapes(compare):
    (line,) = compare(labels("neg", "pos"), labels("ham", "spam"))
    assert "has other classes: ham, spam, in base" in line
    assert compare(labels("neg", "pos"), labels("neg", "neutral", "pos")) == []
    assert compare({**BERT, "id2label": ["a", "b"]}, {**BERT, "id2label": {"x": "a"}}) == []


# Vocabularies.


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


# Where it is noticed.


@pytest.fixture
def models(make):
    torch.manual_seed(0)
    for name in ("base", "a", "b"):
        save_file({"w": torch.randn(4, 4)}, make(name, LLAMA3) / "model.safetensors")
    return make


def test_packing_and_describing_notice_before_weights_are_opened(models):
    folders = models("base"), {"a": models("a", {**LLAMA3, "num_attention_heads": 64}), "b": models("b")}
    (folders[0] / "model.safetensors").write_bytes(b"")  # which is not what the message is about
    for pack in (sm.PackedWeights.from_folders, sm.PackedWeights.describe):
        with pytest.raises(ValueError, match="num_attention_heads is 64"):
            pack(*folders)


def test_a_warning_points_to_the_callers_line(models):
    with pytest.warns(CompatibilityWarning, match="rope_theta") as caught:
        sm.PackedWeights.from_folders(models("base"), {"a": models("a", {**LLAMA3, "rope_theta": 1e6})})
    assert [one.filename for one in caught] == [__file__]


@pytest.fixture
def samerge(monkeypatch, capsys):
    """The command as the shell calls it: exit code and lines on stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["samerge", *map(str, arguments)])
        with warnings.catch_warnings(), pytest.raises(SystemExit) as end:
            warnings.simplefilter("ignore")
            main()
        return end.value.code, capsys.readouterr().err.splitlines()

    return run


def test_the_command_line_shows_each_warning_as_one_line(models, samerge, tmp_path):
    models("a", {**LLAMA3, "rope_theta": 1e6, "rms_norm_eps": 1e-6})
    models("b", {**LLAMA3, "rope_theta": 1e6})
    names = "".join(f"- {{model: {tmp_path / name}, parameters: {{weight: 0.5}}}}\n" for name in ("a", "b"))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"merge_method: task_arithmetic\nbase_model: {tmp_path / 'base'}\nmodels:\n{names}")
    code, lines = samerge("merge", recipe, tmp_path / "out")
    assert code == 0 and len(lines) == 3, lines
    assert all(line.startswith("warning: expert '") and "(/" in line for line in lines), lines
    models("b", {**LLAMA3, "num_attention_heads": 64})
    code, lines = samerge("merge", recipe, tmp_path / "out2")
    assert code == 1 and lines[0].startswith("error: expert 'b'") and not (tmp_path / "out2").exists()


def test_what_was_shown_is_not_shown_again(capsys):
    with warnings.catch_warnings(record=True) as others:
        warnings.simplefilter("always")
        with warnings_as_lines():
            for _ in range(2):
                for category in (CompatibilityWarning, UserWarning):
                    warnings.warn("[twice]", category, stacklevel=1)
    assert capsys.readouterr().err == "warning: [twice]\n"
    assert [one.category for one in others] == [UserWarning, UserWarning]
