"""Adapters as the real PEFT saves them: what is packed is PEFT's own merge of the reloaded adapter, or a refusal with a reason
that the documentation lists."""

import json
import random
import re
import warnings
from pathlib import Path

import pytest
import torch
from helpers import assert_close
from safetensors.torch import load_file, save_file

import samerge_ext as sm
from samerge_ext.checkpoints.lora import model_of, open_expert
from samerge_ext.elementwise.file_merge import FileMerge, merge_files
from samerge_ext.elementwise.piecewise import Combination

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from peft_adapters import (  # noqa: E402
    GPT2,
    MODELS,
    SIZES,
    T5,
    assert_is_pefts,
    bert,
    gpt2,
    load,
    merged_by_peft,
    packed_of,
    write,
    write_models,
)

DOCS = (Path(__file__).parents[2] / "docs/learn.md").read_text()
REASONS = re.findall(r"^- `([^`]+)`: ", DOCS.partition("## What is refused")[2].partition("\n## ")[0], re.MULTILINE)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("bases"))


def random_config(choose, targets, savable):
    chosen = choose.sample(targets, choose.randint(1, min(3, len(targets))))
    settings = {
        "r": choose.randint(1, 5),
        "lora_alpha": choose.randint(1, 16),
        "use_rslora": choose.random() < 0.3,
        "bias": choose.choice(["none", "none", "all", "lora_only"]),
        "init_lora_weights": choose.choice([True, False, "gaussian", "orthogonal"]),
        "target_modules": chosen,
    }
    if choose.random() < 0.3:
        settings["rank_pattern"] = {choose.choice(chosen): choose.randint(1, 4)}
    if choose.random() < 0.3:
        settings["alpha_pattern"] = {choose.choice([*chosen, rf".*\.1\..*{re.escape(chosen[0])}"]): choose.randint(1, 20)}
    if choose.random() < 0.3:
        settings["modules_to_save"] = savable[: choose.randint(1, len(savable))]
    if "embed_tokens" in targets and choose.random() < 0.2:
        settings["trainable_token_indices"] = choose.sample(range(32), 3)
    odd = choose.random()
    if odd < 0.05:
        settings["init_lora_weights"] = choose.choice(["pissa", "olora", "pissa_niter_2"])
    elif odd < 0.15:
        settings["use_dora"] = True
    elif odd < 0.2:
        settings |= {"lora_bias": True, "init_lora_weights": False}
    return settings


@pytest.mark.parametrize("seed", range(10))
def test_random_adapters_are_merged_as_by_peft_or_refused_by_name(bases, tmp_path, seed):
    choose, equal, tried = random.Random(seed), 0, 0
    while tried < 10:
        name = choose.choice(list(MODELS))
        settings = random_config(choose, *MODELS[name][1:])
        folder = tmp_path / str(tried)
        try:
            write(bases / name, folder, peft.LoraConfig(**settings), seed)
            merged_by_peft(bases / name, folder)
        except (ValueError, TypeError, RuntimeError, NotImplementedError, KeyError, AttributeError):
            continue  # nothing that PEFT itself makes and merges
        tried += 1
        try:
            forms = [packed_of(bases / name, folder, form) for form in (None, "lora")]
        except ValueError as refusal:
            assert any(reason in str(refusal) for reason in REASONS), f"{name}, {settings}: {refusal}"
            continue
        equal += 1
        for found in forms:
            try:
                assert_is_pefts(found, bases / name, folder)
            except AssertionError as error:
                raise AssertionError(f"{name}, {settings}: {error}") from error
    assert equal >= 3


def task_arithmetic(base, experts, out, **settings):
    rule = lambda name, numel, dtype: Combination([0.5] * len(experts), 1.0)
    named = [(f"expert {i}", expert) for i, expert in enumerate(experts)]
    return merge_files(FileMerge(named, rule, model_of(base), base, **settings), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_of_files_takes_adapters_and_writes_the_bases_type(bases, tmp_path, dtype):
    load(bases / "llama").to(dtype).save_pretrained(tmp_path / "base")
    base = load_file(tmp_path / "base/model.safetensors")
    factors = peft.LoraConfig(target_modules=["q_proj", "embed_tokens"], init_lora_weights=False)
    write(tmp_path / "base", tmp_path / "a", factors, 1)
    tokens = peft.LoraConfig(target_modules=["down_proj"], trainable_token_indices=[3, 30], modules_to_save=["lm_head"])
    write(tmp_path / "base", tmp_path / "b", tokens, 2)
    out = task_arithmetic(tmp_path / "base", [tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    merged = load_file(out / "model.safetensors")
    packed = sm.PackedWeights.from_folders(tmp_path / "base", {name: tmp_path / name for name in "ab"})
    truth = packed.state_dict(packed.merge(packed.coefficients(0.5)), torch.float32)
    assert merged.keys() == base.keys()
    for name, tensor in merged.items():
        assert tensor.dtype == dtype
        assert_close(tensor, truth[name].double(), name)


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("llama", {"target_modules": ["q_proj", "up_proj", "lm_head"], "trainable_token_indices": [0, 5, 31]}),
        ("llama", {"target_modules": ["q_proj", "up_proj"], "use_dora": True}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
        ("bert", {"target_modules": ["query"], "lora_bias": True}),
    ],
)
def test_any_range_of_numbers_is_that_of_the_whole(bases, tmp_path, model, settings):
    write(bases / model, tmp_path / "lora", peft.LoraConfig(**settings, init_lora_weights=False))
    generator = random.Random(0)
    with open_expert(bases / model, None, "base") as base, open_expert(tmp_path / "lora", base, "expert") as source:
        for name in source.names:
            whole = source.read(name).flatten()
            for _ in range(5):
                start = generator.randrange(whole.numel())
                out = torch.empty(generator.randint(1, whole.numel() - start), dtype=whole.dtype)
                source.read_into(name, start, out)
                torch.testing.assert_close(out, whole[start : start + out.numel()], rtol=1e-6, atol=1e-7)


def test_an_adapter_on_top_of_another_full_model(bases, tmp_path):
    """MODEL+ADAPTER, and a folder that holds both, which transformers loads as the two together."""
    full = load(bases / "llama")
    with torch.no_grad():
        for parameter in full.parameters():
            parameter += 0.01
    full.save_pretrained(tmp_path / "full")
    write(tmp_path / "full", tmp_path / "lora", peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    truth = merged_by_peft(tmp_path / "full", tmp_path / "lora").state_dict()
    plus = packed_of(bases / "llama", f"{tmp_path / 'full'}+{tmp_path / 'lora'}")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "full" / name).write_bytes((tmp_path / "lora" / name).read_bytes())
    both = packed_of(bases / "llama", tmp_path / "full")
    with pytest.raises(ValueError, match="holds a model and a PEFT adapter, which transformers puts on top"):
        packed_of(tmp_path / "full", tmp_path / "lora")
    (tmp_path / "full/adapter_model.safetensors").unlink()
    alone = packed_of(bases / "llama", tmp_path / "full")
    for name in truth:
        assert_close(plus[name], truth[name].double(), name)
        assert_close(both[name], truth[name].double(), name)
        assert_close(alone[name], full.state_dict()[name].double(), name)
    with pytest.raises(ValueError, match="holds no adapter_config.json; MODEL\\+ADAPTER names"):
        packed_of(bases / "llama", f"{tmp_path / 'full'}+{tmp_path / 'nothing'}")
    with pytest.raises(ValueError, match="is a PEFT adapter, and no model is named that it belongs to"):
        model_of(tmp_path / "lora")


@pytest.mark.parametrize("target", ["attn.c_proj", "c_attn"])
def test_a_square_conv1d_is_told_from_a_linear_layer_without_a_configuration(bases, tmp_path, target):
    torch.manual_seed(0)
    config = transformers.GPT2Config(**GPT2, num_labels=16, pad_token_id=0)  # a square head beside a square Conv1D
    transformers.GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(target_modules=[target, "score"], init_lora_weights=False, task_type=None)
    write(tmp_path / "base", tmp_path / "lora", settings)
    found = [packed_of(tmp_path / "base", tmp_path / "lora")]
    truth = merged_by_peft(tmp_path / "base", tmp_path / "lora").state_dict()
    (tmp_path / "base/config.json").unlink()
    for flag in (True, False):
        written = json.loads((tmp_path / "lora/adapter_config.json").read_text())
        (tmp_path / "lora/adapter_config.json").write_text(json.dumps({**written, "fan_in_fan_out": flag}))
        found.append(packed_of(tmp_path / "base", tmp_path / "lora"))
    for tensors in found:
        for name, tensor in tensors.items():
            assert_close(tensor, truth[name].double(), name)


@pytest.mark.filterwarnings("ignore:.*says that it is an adapter of")
def test_tied_names_of_a_pickled_base(bases, tmp_path):
    """torch.save keeps both names of a tied tensor."""
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((bases / "tied llama" / name).read_bytes())
    torch.save(load(bases / "tied llama").state_dict(), tmp_path / "pytorch_model.bin")
    embeddings, head = (peft.LoraConfig(target_modules=[n], init_lora_weights=False) for n in ("embed_tokens", "lm_head"))
    write(bases / "tied llama", tmp_path / "embeddings", embeddings)
    assert_is_pefts(packed_of(tmp_path, tmp_path / "embeddings"), bases / "tied llama", tmp_path / "embeddings")
    write(bases / "tied llama", tmp_path / "head", head)
    with pytest.raises(ValueError, match="'lm_head.weight', which is tied to 'model.embed_tokens.weight'"):
        packed_of(tmp_path, tmp_path / "head")


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, intermediate_size=24)), {"bias": "all"}),
        (lambda: transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SIZES, intermediate_size=24)), {"bias": "all"}),
        (lambda: transformers.T5ForConditionalGeneration(T5), {"target_modules": ["q", "v", "wo"]}),
        (lambda: transformers.T5ForConditionalGeneration(T5), {"target_modules": ["q", "shared"]}),
        (bert, {"target_modules": ["query", "dense"], "use_dora": True, "bias": "all"}),
        (bert, {"target_modules": ["query", "dense"], "lora_bias": True}),
        (gpt2, {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
        (lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, intermediate_size=24)), {"bias": "lora_only"}),
    ],
)
def test_other_architectures(tmp_path, make, settings):
    torch.manual_seed(0)
    make().eval().save_pretrained(tmp_path / "base")
    write(tmp_path / "base", tmp_path / "lora", peft.LoraConfig(init_lora_weights=False, **settings))
    for form in (None, "lora"):
        assert_is_pefts(packed_of(tmp_path / "base", tmp_path / "lora", form), tmp_path / "base", tmp_path / "lora")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"init_lora_weights": "pissa"}, "initialised by PiSSA"),
        ({"init_lora_weights": "olora"}, "initialised by OLoRA"),
    ],
)
def test_the_advice_to_merge_with_peft_works(bases, tmp_path, settings, said):
    write(bases / "llama", tmp_path / "lora", peft.LoraConfig(target_modules=["q_proj"], r=2, **settings))
    with pytest.raises(ValueError, match=f"{said}.*load it on its base with peft, call merge_and_unload"):
        packed_of(bases / "llama", tmp_path / "lora")
    merged = merged_by_peft(bases / "llama", tmp_path / "lora")
    merged.save_pretrained(tmp_path / "merged")
    found = packed_of(bases / "llama", tmp_path / "merged")
    for name, tensor in found.items():
        assert_close(tensor, merged.state_dict()[name].double(), name)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "a PROMPT_TUNING adapter and cannot"),
        (lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "a IA3 adapter and only LORA"),
        (
            lambda: peft.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[1], task_type="CAUSAL_LM"),
            "aLoRA .* cannot be merged into weights",
        ),
        (lambda: peft.LoraConfig(target_modules=["q_proj"], layer_replication=[[0, 2]]), "layer_replication .* leave it out"),
    ],
)
def test_other_kinds_are_refused_by_name(bases, tmp_path, config, said):
    write(bases / "llama", tmp_path, config())
    with pytest.raises(ValueError, match=said):
        packed_of(bases / "llama", tmp_path)


def test_an_adapter_that_names_another_base_is_warned_of(bases, tmp_path):
    write(bases / "llama", tmp_path / "lora", peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    file = tmp_path / "lora/adapter_config.json"
    written = json.loads(file.read_text())

    def packed_from(base, named):
        file.write_text(json.dumps({**written, "base_model_name_or_path": named}))
        return packed_of(base, tmp_path / "lora")

    base = tmp_path / "models--some--Llama/snapshots/0123"
    base.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (base / name).write_bytes((bases / "llama" / name).read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed_from(bases / "llama", str(bases / "llama"))
        packed_from(bases / "llama", "some/llama")
        packed_from(base, "some/Llama")
        packed_from(base, None)
    with pytest.warns(UserWarning, match=f"adapter of 'some/other', and the base here is {bases / 'llama'}"):
        packed_from(bases / "llama", "some/other")


def test_the_numbers_of_a_factor_of_another_shape_are_refused(bases, tmp_path):
    write(bases / "llama", tmp_path, peft.LoraConfig(target_modules=["up_proj"], r=2))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_A" in name)
    save_file({**tensors, name: torch.ones(2, 17)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"\[24, 2\] · \[2, 17\] do not make a change of .* \[24, 16\]"):
        packed_of(bases / "llama", tmp_path)


def test_where_an_adapter_is_and_how_it_is_named(bases, tmp_path):
    write(bases / "llama", tmp_path / "task/other", peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises(ValueError, match="task holds PEFT adapters in folders of their own; pass one of them: other"):
        packed_of(bases / "llama", tmp_path / "task")
    file = tmp_path / "task/other/adapter_model.safetensors"
    save_file({name.replace(".weight", ".default.weight"): tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ValueError, match="is named after the adapter 'default', .* take '.default' out of the names"):
        packed_of(bases / "llama", tmp_path / "task/other")


def test_a_packed_file_of_an_adapter_on_another_model(bases, tmp_path):
    write(bases / "llama", tmp_path / "lora", peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    experts = {"one": f"{bases / 'llama'}+{tmp_path / 'lora'}"}
    packed = sm.PackedWeights.from_folders(bases / "llama", experts, file=tmp_path / "packed").in_memory()
    assert_is_pefts(packed.state_dict(packed.merge(packed.coefficients(1.0))), bases / "llama", tmp_path / "lora")
