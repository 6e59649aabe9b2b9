"""Folders that do not fit together: what is an error, what is a warning, and what ordinary fine-tunes may differ in."""

import json
import shutil
import warnings

import pytest
from configured_folders import BERT, CLIP, GEMMA3, LLAMA3, QWEN, WORDS, fast, warned, write

from samerge_ext.checkpoints.compatibility import check_models


@pytest.fixture
def make(tmp_path):
    """Writes a folder by its name."""
    return lambda name, config=None, **files: write(tmp_path / name, config, **files)


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
