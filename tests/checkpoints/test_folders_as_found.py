"""Model folders as people have them: names of wrapped modules, weights of other formats, quantised ones, advice that works."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import samerge_ext as sm
from samerge_ext.checkpoints.advice import QUANTISED, heads_advice
from samerge_ext.checkpoints.folder import open_checkpoint
from samerge_ext.checkpoints.naming import unwrapped
from samerge_ext.checkpoints.reading import CheckpointError
from samerge_ext.elementwise.file_merge import FileMerge, merge_files
from samerge_ext.elementwise.piecewise import Combination


def save(folder, tensors, config=None):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def model(seed=0):
    torch.manual_seed(seed)
    return {"model.layers.0.mlp.weight": torch.randn(3, 3), "model.norm.weight": torch.randn(3)}


def merged(tmp_path, **options):
    experts = [(name, tmp_path / name) for name in ("a", "b")]
    base = tmp_path / "base"
    half = Combination([0.5, 0.5], 1.0, normalize=False, elect=False)
    return merge_files(FileMerge(experts, lambda *_: half, base, base, **options), tmp_path / "out")


@pytest.mark.parametrize("where", ["_orig_mod.model.", "module.model.", "module._orig_mod.model.", "model._fsdp_wrapped_module."])
def test_a_wrapped_base_is_written_under_its_modules_names(tmp_path, where):
    tensors = {name: model(seed) for seed, name in enumerate(("base", "a", "b"))}
    for name in ("base", "a"):
        save(tmp_path / name, {n.replace("model.", where, 1): t for n, t in tensors[name].items()})
    inner = {n.replace("layers.0.", "layers.0._checkpoint_wrapped_module."): t for n, t in tensors["b"].items()}
    save(tmp_path / "b", inner)
    found = load_file(merged(tmp_path) / "model.safetensors")
    assert found.keys() == model().keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, (tensors["a"][name] + tensors["b"][name]) / 2)


def test_a_module_called_module_and_names_that_would_meet_stay():
    assert unwrapped(["module.w", "head.w"]) == {"module.w": "module.w", "head.w": "head.w"}
    assert unwrapped(["w", "_orig_mod.w"]) == {"w": "w", "_orig_mod.w": "_orig_mod.w"}


@pytest.mark.parametrize(
    ("file", "advice"),
    [
        ("model-00002-of-00003.safetensors", "download model.safetensors.index.json"),
        ("pytorch_model-00001-of-00002.bin", "download pytorch_model.bin.index.json"),
        ("epoch_10.pt", "pass one of its files by name: epoch_10.pt"),
        ("checkpoint-500/model.safetensors", "pass one of the models in it: checkpoint-500"),
        ("global_step10/mp_rank_00_model_states.pt", "zero_to_fp32.py"),
        ("pytorch_model_fsdp_0/__0_0.distcp", "torch.distributed.checkpoint without its .metadata: copy that too"),
        ("model-q4.gguf", "make a model of model-q4.gguf with `samerge from-gguf`"),
        ("tf_model.h5", "tf_model.h5 is of another format"),
    ],
)
def test_a_folder_without_a_models_weights_says_what_to_do(tmp_path, file, advice):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=advice.replace(".", r"\.")):
        open_checkpoint(tmp_path)


def test_checkpoints_of_open_clip_are_read(tmp_path):
    """As its hub's folders hold them, and as its training writes them: the latter with other state beside the state dict."""
    tensors = model()
    save_file(tensors, tmp_path / "open_clip_model.safetensors")
    training = {"epoch": 3, "name": "run", "state_dict": {f"module.{n}": t for n, t in tensors.items()}, "optimizer": {}}
    torch.save(training, tmp_path / "epoch_3.pt")
    torch.save({**training, "state_dict": {"n": 3}}, tmp_path / "broken.pt")
    for path in (tmp_path, tmp_path / "epoch_3.pt"):
        with open_checkpoint(path) as found:
            assert set(found.names) == set(tensors)
            assert all(torch.equal(found.read(name), tensor) for name, tensor in tensors.items())
    with pytest.raises(CheckpointError, match="entry 'n' is a int"):
        open_checkpoint(tmp_path / "broken.pt")


def test_one_shard_and_a_web_page_are_no_model(tmp_path):
    save_file({"w": torch.ones(1)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="one of 2 shards; pass its folder"):
        open_checkpoint(tmp_path / "model-00001-of-00002.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"<!DOCTYPE html><html>Access denied</html>")
    with pytest.raises(CheckpointError, match="is a web page"):
        open_checkpoint(tmp_path)


def test_a_ckpt_is_read_as_a_state_dict(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "model.ckpt")
    with open_checkpoint(tmp_path / "model.ckpt") as checkpoint:
        assert torch.equal(checkpoint.read("w"), torch.ones(2))


def test_what_config_json_says_of_quantised_weights_is_left_out(tmp_path):
    config = {
        "model_type": "x",
        "quantization_config": {"load_in_4bit": True},
        "text_config": {"quantization_config": {"bits": 4}},
    }
    for seed, name in enumerate(("base", "a", "b")):
        save(tmp_path / name, model(seed), config)
    with pytest.warns(UserWarning, match="quantization_config is left out"):
        out = merged(tmp_path)
    assert "quantization_config" not in (out / "config.json").read_text()


@pytest.mark.parametrize(
    "codes",
    [
        "q_proj.W_q", "q_proj.codebooks", "q_proj.Qidxs", "q_proj.weight_blocks", "experts.gate_up_proj_blocks",
        "experts.gate_up_proj_scales", "q_proj.weight_scales",
    ],
)  # fmt: skip
def test_codes_of_quantised_weights_are_known(codes):
    assert QUANTISED.search(f"model.layers.0.mlp.{codes}")


@pytest.mark.parametrize(
    "codes", [{"W_q": torch.uint8}, {"weight": torch.uint32, "scales": torch.float32, "biases": torch.float32}]
)
def test_an_expert_of_codes_is_quantised(tmp_path, codes):
    save(tmp_path / "base", model())
    name = "model.layers.0.mlp.weight"
    own = {name.replace("weight", part): torch.zeros(3, 3, dtype=dtype) for part, dtype in codes.items()}
    save(tmp_path / "a", {**{n: t for n, t in model(1).items() if n != name}, **own})
    with pytest.raises(ValueError, match="is quantised: dequantise it first"):
        sm.PackedWeights.from_folders(tmp_path / "base", {"a": tmp_path / "a"})


def test_advised_patterns_take_all_of_a_head_and_nothing_else():
    others = ["model.layers.0.w", "cls.decoder.weight"]
    assert "heads=['classifier.*']" in heads_advice(["classifier.dense.weight", "classifier.out_proj.bias"], others)
    assert "heads=['model.mask', 'cls.bias']" in heads_advice(["model.mask", "cls.bias"], others)
    many = [f"head{i}.weight" for i in range(6)]
    assert "'head5.*'" in heads_advice(many, others), "what is not advised would be missing again"


def test_biases_and_norms_of_untrained_heads_are_not_ties(tmp_path):
    shared = {"bert.embeddings.word_embeddings.weight": torch.randn(4, 3), "bert.embeddings.LayerNorm.bias": torch.zeros(3)}
    head = {"cls.predictions.transform.LayerNorm.bias": torch.zeros(3)}
    save(tmp_path / "base", {**shared, **head})
    save(tmp_path / "a", {name: tensor + 1 for name, tensor in shared.items()})
    with pytest.raises(ValueError, match=r"lacks .*'cls.predictions.transform.LayerNorm.bias'.*heads=\['cls\.\*'\]"):
        sm.PackedWeights.from_folders(tmp_path / "base", {"a": tmp_path / "a"})
