"""Learned merges of tiny folders of every kind of transformers' models, as the command line runs them."""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from helpers import assert_close
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import samerge_ext as sm
from samerge_ext.checkpoints.reading import CheckpointError
from samerge_ext.cli.commands import app
from samerge_ext.models.folders import FolderModel
from samerge_ext.models.pictures import find_pictures, picture_batches
from samerge_ext.models.texts import load_tokenizer

transformers = pytest.importorskip("transformers")
from families import (  # noqa: E402
    ENCODER,
    FAMILIES,
    TEXTS,
    load,
    make,
    move,
    save_pictures,
    save_texts,
    save_tokenizer,
)


def save_family(root: Path, family: str) -> dict[str, Path]:
    """Base and two fine-tunes, with what they are calibrated on; the calibration files."""
    for seed, name in enumerate(("base", "a", "b")):
        (move(make(family), seed) if seed else make(family)).save_pretrained(root / name)
    if "Image" in FAMILIES[family][0]:
        save_pictures(root / "pictures").save_pretrained(root / "base")
        return {task: root / "pictures" / task for task in "ab"}
    save_tokenizer(root / "a", root / "b")
    return save_texts(root)


def merge(root: Path, files, out="out", **keys):
    """`samerge merge` of base, a and b: its result."""
    recipe = {
        "merge_method": "samerging",
        "base_model": str(root / "base"),
        "models": [{"model": str(root / task)} for task in "ab"],
        "calibration": {"files": {task: str(path) for task, path in files.items()}, "batch_size": 2},
        "parameters": {"steps": 2, "learning_rate": 0.1, "progress": False},
        **keys,
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return CliRunner().invoke(app, ["merge", str(root / "recipe.yaml"), str(root / out)])


def assert_merged(root, out, architecture):
    """What transformers loads of the merged folder is base + Σ λ τ of what it loads of the others, in fp64."""
    summary = json.loads((root / out / "coefficients.json").read_text())["coefficients"]
    base, *experts = (load(root / name, architecture, dtype=torch.float64).state_dict() for name in ("base", "a", "b"))
    merged = load(root / out, architecture, dtype=torch.float64).state_dict()
    seen = 0
    for name, values in base.items():
        if all(name in of_task for of_task in summary.values()):
            seen += 1
            expected = values + sum(summary[t][name] * (e[name] - values) for t, e in zip("ab", experts, strict=True))
            assert_close(merged[name].float(), expected)
    assert seen == len(summary["a"]) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_merged_and_loads(family, tmp_path):
    files = save_family(tmp_path, family)
    done = merge(tmp_path, files)
    assert done.exit_code == 0, done.output
    assert set(load_names(tmp_path / "out")) == set(load_names(tmp_path / "base"))
    assert_merged(tmp_path, "out", FAMILIES[family][0])


def test_language_models_of_recipes_learn_without_logits(tmp_path, monkeypatch):
    monkeypatch.setattr(sm.models.LanguageModel, "logits", lambda *given: pytest.fail("logits are computed"))
    for family in ("qwen2", "roberta", "t5"):
        done = merge(tmp_path / family, save_family(tmp_path / family, family))
        assert done.exit_code == 0, done.output


def load_names(folder):
    return {name: tensor.shape for name, tensor in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_teacher_is_the_expert_itself(family, tmp_path):
    """At one-hot coefficients, in fp64, batch by batch."""
    files = save_family(tmp_path, family)
    experts = {task: tmp_path / task for task in "ab"}
    model = FolderModel.of(tmp_path / "base", experts)
    batches = model.batches(files, batch_size=2)
    packed = sm.PackedWeights.from_folders(tmp_path / "base", experts, dtype=torch.float64, conversion=model.conversion)
    merged = sm.MergedModel(model.module.double(), packed)
    own = load(tmp_path / "b", FAMILIES[family][0], dtype=torch.float64)
    for module in (model.module, own) if "num_experts" in str(own.config) else ():
        module.set_experts_implementation("eager")  # grouped matrix products are not for fp64
    own.config.pad_token_id = getattr(model.module.config, "pad_token_id", None)
    with merged.teacher("b") as teacher, torch.no_grad():
        for batch in batches["b"]:
            batch = {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}
            found = model.kind.logits(teacher, batch, "b")
            assert found.dim() == 2 and len(found)
            assert_close(found, model.kind.logits(own, batch, "b"))


def test_rows_are_the_tokens_of_the_texts_alone(tmp_path):
    """Padding changes nothing: each text by itself gives the same rows; classifiers read at its last token."""
    texts = TEXTS["a"].split("\n")[:4]
    for family in ("roberta", "t5", "gpt2", "gpt2-classifier"):
        root = tmp_path / family
        save_family(root, family)
        model = FolderModel.of(root / "base", {"a": root / "a"})
        own = load(root / "a", FAMILIES[family][0], dtype=torch.float64)
        together = model.batches({"a": root / "a.txt"}, batch_size=4)["a"][0]
        own.config.pad_token_id = model.module.config.pad_token_id
        with torch.no_grad():
            rows = model.kind.logits(own, together, "a")
            tokenizer = load_tokenizer([root / "a"])
            alone = []
            for text in texts:
                ids = tokenizer(text, return_tensors="pt")["input_ids"]  # [1, S]
                if family == "t5":
                    start = torch.zeros(1, 1, dtype=ids.dtype)
                    alone.append(own(input_ids=ids, decoder_input_ids=torch.cat([start, ids[:, :-1]], 1)).logits[0])
                elif family == "gpt2-classifier":
                    alone.append(own(input_ids=ids).logits)
                else:
                    kept = slice(1, -1) if family == "roberta" else slice(None)
                    alone.append(own(input_ids=ids).logits[0, kept])
        assert_close(rows, torch.cat(alone))


def test_streamed_and_quantised_mixtures_of_experts(tmp_path):
    files = save_family(tmp_path, "mixtral")
    for out, keys in {
        "streamed": {"parameters": {"steps": 1, "streamed": True, "progress": False}},
        "budget": {"parameters": {"steps": 1, "memory_budget": "8GB", "progress": False}},
        "int8": {"task_vector_dtype": "int8", "parameters": {"steps": 1, "progress": False}},
    }.items():
        done = merge(tmp_path, files, out, **keys)
        assert done.exit_code == 0, done.output
        load(tmp_path / out, "MixtralForCausalLM")
        assert load_names(tmp_path / out) == load_names(tmp_path / "base")


def test_a_lost_expert_of_a_mixture_is_named(tmp_path):
    files = save_family(tmp_path, "mixtral")
    file = tmp_path / "b" / "model.safetensors"
    tensors = load_file(file)
    lost = [name for name in tensors if "layers.1" in name and "experts.2." in name]
    save_file({name: tensor for name, tensor in tensors.items() if name not in lost}, file)
    done = merge(tmp_path, files)
    assert done.exit_code == 1 and "expert 'b'" in done.output and "layers.1.mlp.experts" in done.output


def test_learning_lowers_the_loss(tmp_path):
    for family in ("deberta", "roberta", "t5", "vit"):
        root = tmp_path / family
        files = save_family(root, family)
        parameters = {"steps": 20, "learning_rate": 0.1, "progress": False, "initial_coefficient": 0.0, "sam": "off"}
        model = FolderModel.of(root / "base", {task: root / task for task in "ab"})
        packed = sm.PackedWeights.from_folders(root / "base", model.experts, conversion=model.conversion)
        batches = model.batches(files)
        result = sm.samerging(model.module, packed, batches, model.kind.logits, config=sm.SAMergingConfig(**parameters))
        losses = [step["loss"] for step in result.history]
        assert losses[-1] < 0.8 * losses[0], (family, losses)


# Adapters.


def save_adapters(root, base, make_adapted, **config):
    peft = pytest.importorskip("peft")
    base.save_pretrained(root / "base")
    save_tokenizer(root / "base")
    for seed, task in enumerate("ab", 1):
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(make_adapted(seed), peft.LoraConfig(r=2, init_lora_weights=False, **config))
        adapted.save_pretrained(root / task)
    return save_texts(root)


@pytest.mark.parametrize("form", [None, "lora"])
def test_adapters_of_classifiers_on_a_base_with_another_head(tmp_path, form):
    """Their task type makes it a classifier; the pooler, which nobody stores, begins anew, and is named."""
    config = transformers.BertConfig(**ENCODER)
    torch.manual_seed(0)
    base = transformers.BertForMaskedLM(config)

    def classifier(labels):
        return transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1 + labels)

    files = save_adapters(tmp_path, base, classifier, target_modules=["query", "value"], task_type="SEQ_CLS")
    done = merge(tmp_path, files, heads=["classifier.*"], **({"task_vector_dtype": form} if form else {}))
    assert done.exit_code == 0, done.output
    assert re.search(r"note: .*bert\.pooler\.dense\.weight.*newly initialised", done.output), done.output
    assert re.search(r"note: .*cls\.predictions.*left out", done.output), done.output
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["BertForSequenceClassification"]
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"} and not info["unexpected_keys"]
    assert load_file(tmp_path / "out" / "heads" / "b.safetensors")["classifier.weight"].shape == (3, 16)


def test_adapters_of_language_models_and_encoder_decoders(tmp_path):
    for family, targets, task_type in (("llama", ["q_proj"], "CAUSAL_LM"), ("t5", ["q", "v"], "SEQ_2_SEQ_LM")):
        root = tmp_path / family
        architecture = getattr(transformers, FAMILIES[family][0])

        def adapted(_, architecture=architecture, root=root):
            return architecture.from_pretrained(root / "base")

        files = save_adapters(root, make(family), adapted, target_modules=targets, task_type=task_type)
        done = merge(root, files)
        assert done.exit_code == 0, done.output
        load(root / "out", FAMILIES[family][0])


def test_adapters_of_names_that_transformers_changed(tmp_path):
    """PEFT stores the module's names, or those of the folder, as it did before transformers had others."""
    files = save_family(tmp_path, "vit")
    peft = pytest.importorskip("peft")
    for task in "ab":
        config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"])
        adapted = peft.get_peft_model(load(tmp_path / task, "ViTForImageClassification"), config)
        for path in (tmp_path / task).iterdir():
            path.unlink()
        adapted.save_pretrained(tmp_path / task)
    file = tmp_path / "b" / "adapter_model.safetensors"
    renamed = {
        name.replace("vit.layers", "vit.encoder.layer").replace("attention.q_proj", "attention.attention.query"): tensor
        for name, tensor in load_file(file).items()
    }
    save_file(renamed, file)
    done = merge(tmp_path, files)
    assert done.exit_code == 0, done.output
    merged = load(tmp_path / "out", "ViTForImageClassification").state_dict()
    base = load(tmp_path / "base", "ViTForImageClassification").state_dict()
    assert {name for name in base if not torch.equal(base[name], merged[name])} == {
        f"vit.layers.{layer}.attention.q_proj.weight" for layer in range(2)
    }


def test_experts_of_two_kinds_and_of_none_are_refused(tmp_path):
    files = save_family(tmp_path, "bert")
    transformers.BertForTokenClassification(transformers.BertConfig(**ENCODER)).save_pretrained(tmp_path / "b")
    done = merge(tmp_path, files)
    assert done.exit_code == 1 and "'b' for token classification" in done.output.replace("\n", " ")
    transformers.BertForQuestionAnswering(transformers.BertConfig(**ENCODER)).save_pretrained(tmp_path / "b")
    done = merge(tmp_path, files)
    assert done.exit_code == 1 and "BertForQuestionAnswering" in done.output


# Texts.


def test_a_model_without_tokenizer_files_is_refused(tmp_path):
    save_family(tmp_path, "bert")
    for folder in ("a", "b"):
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / folder / file).unlink()
    done = merge(tmp_path, save_texts(tmp_path))
    assert done.exit_code == 1 and "has the files of a tokenizer" in done.output.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_is_the_experts_else_the_bases(tmp_path):
    save_tokenizer(tmp_path / "base")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')  # and no words
    assert load_tokenizer([tmp_path / "a", tmp_path / "base"]).name_or_path == str(tmp_path / "base")


def test_a_missing_pad_token_is_the_end_of_text_unless_texts_end_with_it(tmp_path):
    save_family(tmp_path, "gpt2-classifier")
    for end, expected in (("[MASK]", 4), ("[SEP]", 0)):  # every text ends with [SEP], 3
        save_tokenizer(tmp_path / "a", tmp_path / "b", pad_token=None, eos_token=end)
        model = FolderModel.of(tmp_path / "base", {"a": tmp_path / "a"})
        batch = model.batches({"a": tmp_path / "a.txt"}, batch_size=4)["a"][0]
        assert model.module.config.pad_token_id == expected
        assert (batch["input_ids"][batch["attention_mask"] == 0] == expected).all()
        assert batch["attention_mask"][:, 0].all()  # on the right


def test_texts_longer_than_the_positions_are_cut(tmp_path):
    for family, positions in (("roberta", 30), ("gpt2", 32)):
        root = tmp_path / family
        files = save_family(root, family)
        files["a"].write_text("good " * 50 + "\nbad\n")
        done = merge(root, files)
        assert done.exit_code == 0, done.output
        assert f"1 of 2 texts are cut to the model's {positions} positions" in done.output


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path):
    files = save_family(tmp_path, "bert")
    tokenizer = load_tokenizer([tmp_path / "a"])
    tokenizer.add_tokens([f"w{i}" for i in range(9)])
    tokenizer.save_pretrained(tmp_path / "a")
    files["a"].write_text("good w8\n")
    done = merge(tmp_path, files)
    assert done.exit_code == 1 and "embeddings of 16" in done.output.replace("\n", " ")


# Pictures.


def test_pictures_come_class_by_class_and_in_one_order(tmp_path):
    processor = save_pictures(tmp_path)
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    found = find_pictures(tmp_path / "a")
    assert [path.relative_to(tmp_path / "a").as_posix() for path in found] == [
        "class0/0.png", "class1/1.png", "class0/2.png", "class1/3.png",
    ]  # fmt: skip
    batches = picture_batches(found, processor, batch_size=3)
    assert [list(batch["pixel_values"].shape) for batch in batches] == [[3, 3, 8, 8], [1, 3, 8, 8]]


def test_what_is_no_picture_is_named(tmp_path):
    files = save_family(tmp_path, "vit")
    (files["b"] / "class0" / "0.png").write_bytes(b"not a picture")
    done = merge(tmp_path, files)
    assert done.exit_code == 1 and "0.png cannot be read as a picture" in done.output.replace("\n", "")
    done = merge(tmp_path, save_texts(tmp_path))
    assert done.exit_code == 1 and "is no folder" in done.output.replace("\n", " ")
    (tmp_path / "base" / "preprocessor_config.json").unlink()
    (files["b"] / "class0" / "0.png").unlink()
    done = merge(tmp_path, files)
    assert done.exit_code == 1 and "preprocessor_config.json" in done.output.replace("\n", " ")


def test_importing_the_logits_functions_does_not_import_transformers():
    import subprocess
    import sys

    code = "import sys, samerge_ext as sm; sm.models.seq2seq_lm, sm.models.text_batches; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_tensor_stored_under_two_names_is_refused(tmp_path):
    files = save_family(tmp_path, "mixtral")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    gate = "model.layers.0.block_sparse_moe.gate.weight"
    save_file({**tensors, gate.replace("block_sparse_moe", "mlp"): tensors[gate].clone()}, file)
    with warnings.catch_warnings(), pytest.raises(CheckpointError, match="twice"):
        model = FolderModel.of(tmp_path / "base", {"a": tmp_path / "a"})
        sm.PackedWeights.from_folders(tmp_path / "base", model.experts, conversion=model.conversion)
    assert merge(tmp_path, files).exit_code == 1
