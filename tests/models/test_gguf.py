"""GGUF files become folders: every number as its code says, every name and row where the original model has it."""

import json

import numpy as np
import pytest
import torch
from helpers import assert_close
from safetensors.torch import load_file

from samerge_ext.checkpoints.folder import open_checkpoint
from samerge_ext.checkpoints.reading import CheckpointError
from samerge_ext.models.gguf import folder_of_gguf

gguf = pytest.importorskip("gguf")

WIDTH, LAYERS, HEADS, KV_HEADS, WORDS = 64, 2, 4, 2, 96
PARTS = {  # name in a block of transformers' -> llama.cpp's
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}  # fmt: skip
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def make(family="llama", tied=True):
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": LAYERS, "vocab_size": WORDS}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    config = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[family](
        **sizes, **heads, tie_word_embeddings=tied, initializer_range=0.2, bos_token_id=1, eos_token_id=2
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def name_in_file(name):
    stem, _, suffix = name.rpartition(".")
    if stem in OUTSIDE:
        return f"{OUTSIDE[stem]}.{suffix}"
    layer, part = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{PARTS[part]}.{suffix}"


def rows_in_file(name, tensor):
    """The rows of a Llama's queries and keys, of each head the halves that rotate together interleaved."""
    heads = HEADS if "q_proj" in name else KV_HEADS
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def write(path, model, kind="F32", *, family="llama", without=(), more=None, **fields):
    """The model as llama.cpp writes it; returns what its codes stand for, under transformers' names."""
    config = model.config
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(LAYERS)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    for key, value in fields.items():
        getattr(writer, f"add_{key}")(value)
    words = [*(chr(33 + i) for i in range(WORDS - 4)), "!!"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["<unk>", "<s>", "</s>", *words])
    writer.add_token_types([3, 3, 3, *[1] * len(words)])
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    truth, kind = {}, gguf.GGMLQuantizationType[kind]
    for name, tensor in {**model.state_dict(), **(more or {})}.items():
        if name in without or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        permuted = family == "llama" and ("q_proj" in name or "k_proj" in name)
        rows = rows_in_file(name, tensor) if permuted else tensor
        own = kind if rows.ndim == 2 else gguf.GGMLQuantizationType.F32
        codes = gguf.quantize(rows.numpy(), own)
        writer.add_tensor(name if name in (more or {}) else name_in_file(name), codes, raw_dtype=own)
        order = torch.arange(len(tensor)) if not permuted else rows_in_file(name, torch.arange(len(tensor)))
        numbers = torch.from_numpy(np.array(gguf.dequantize(codes, own))).double()
        truth[name] = torch.empty_like(numbers).index_copy_(0, order, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return truth


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_every_number_is_what_its_code_says(tmp_path, kind):
    truth = write(tmp_path / "m.gguf", make(), kind)
    found = load_file(folder_of_gguf(tmp_path / "m.gguf", tmp_path / "out") / "model.safetensors")
    assert found.keys() == truth.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        assert_close(tensor, truth[name], name)


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("llama", False), ("qwen2", True)])
def test_the_folder_is_the_model_that_the_file_was_made_of(tmp_path, family, tied):
    from transformers import AutoModelForCausalLM

    model = make(family, tied)
    write(tmp_path / "m.gguf", model, family=family)
    folder = folder_of_gguf(tmp_path / "m.gguf", tmp_path / "out")
    read = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(read) is type(model) and read.config.tie_word_embeddings == tied
    ids = torch.arange(12).reshape(2, 6)
    with torch.inference_mode():
        assert_close(read(input_ids=ids).logits, model.double()(input_ids=ids).logits)


def test_it_is_written_in_the_dtype_that_is_asked_for_and_in_shards(tmp_path):
    truth = write(tmp_path / "m.gguf", make(), "Q8_0")
    folder = folder_of_gguf(tmp_path / "m.gguf", tmp_path / "out", dtype=torch.bfloat16, shard_size=20_000)
    with open_checkpoint(folder) as checkpoint:
        assert len(checkpoint.files) > 1
        for name in checkpoint.names:
            assert_close(checkpoint.read(name), truth[name], name)
            assert checkpoint.dtype(name) == torch.bfloat16
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_rows_are_dequantised_some_at_a_time(tmp_path, monkeypatch):
    truth = write(tmp_path / "m.gguf", make(), "Q4_1")
    monkeypatch.setattr("samerge_ext.models.gguf.ROWS_BYTES", 4 * WIDTH * 7)
    sizes, whole = [], gguf.dequantize
    monkeypatch.setattr(gguf, "dequantize", lambda data, kind: sizes.append(len(data)) or whole(data, kind))
    found = load_file(folder_of_gguf(tmp_path / "m.gguf", tmp_path / "out") / "model.safetensors")
    assert max(sizes) == 7
    assert_close(found["model.layers.1.self_attn.k_proj.weight"], truth["model.layers.1.self_attn.k_proj.weight"])


def test_the_tokenizer_comes_along(tmp_path):
    from transformers import AutoTokenizer

    write(tmp_path / "m.gguf", make())
    tokenizer = AutoTokenizer.from_pretrained(folder_of_gguf(tmp_path / "m.gguf", tmp_path / "out"))
    assert tokenizer.convert_tokens_to_ids(["</s>", "A"]) == [2, 3 + ord("A") - 33]


def test_a_folder_of_the_original_tells_what_the_file_does_not(tmp_path):
    model = make()
    factors = {"rope_freqs.weight": torch.ones(WIDTH // HEADS // 2)}
    write(tmp_path / "m.gguf", model, more=factors)
    with pytest.raises(CheckpointError, match="scaled rotary positions .rope_freqs.weight.*--like"):
        folder_of_gguf(tmp_path / "m.gguf", tmp_path / "out")
    original = tmp_path / "original"
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    model.config.rope_parameters = scaled
    model.config.save_pretrained(original)
    (original / "vocab.txt").write_text("a\n")
    folder = folder_of_gguf(tmp_path / "m.gguf", tmp_path / "out", like=original)
    assert json.loads((folder / "config.json").read_text())["rope_parameters"] == scaled
    assert (folder / "vocab.txt").read_text() == "a\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"without": ["model.layers.1.mlp.up_proj.weight"]}, "lacks 'model.layers.1.mlp.up_proj.weight' of LlamaForCausalLM"),
        ({"more": {"blk.0.ffn_gate_exps.weight": torch.ones(2, 32)}}, "'blk.0.ffn_gate_exps.weight' is no tensor .*experts"),
        ({"family": "no-such"}, "architecture 'no-such'"),
        ({"rope_scaling_type": gguf.RopeScalingType.YARN}, "scaled rotary positions .yarn"),
        ({"split": 3}, "one of 3 parts; join them"),
    ],
)
def test_what_does_not_make_a_model_is_refused_before_any_work(tmp_path, monkeypatch, options, message):
    if "split" in options:
        options = {}
        monkeypatch.setattr("samerge_ext.models.gguf._field", lambda path, reader, key: 3)
    write(tmp_path / "m.gguf", make(), **options)
    monkeypatch.setattr("samerge_ext.models.gguf._dequantised", lambda *_: pytest.fail("dequantised"))
    with pytest.raises(CheckpointError, match=message) as refused:
        folder_of_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert "m.gguf" in str(refused.value) and not (tmp_path / "out").exists()


def test_codes_that_are_not_known_are_refused(tmp_path, monkeypatch):
    write(tmp_path / "m.gguf", make(), "Q8_0")
    monkeypatch.delitem(gguf.quants._type_traits, gguf.GGMLQuantizationType.Q8_0)
    with pytest.raises(CheckpointError, match="of type Q8_0, which the package gguf does not dequantise"):
        folder_of_gguf(tmp_path / "m.gguf", tmp_path / "out")


@pytest.mark.parametrize("keep", [0, 3, 24, 400, -300])
def test_a_damaged_file_is_named(tmp_path, keep):
    write(tmp_path / "m.gguf", make())
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match=r"m\.gguf is no GGUF file, or is damaged"):
        folder_of_gguf(tmp_path / "m.gguf", tmp_path / "out")


def test_a_list_that_does_not_end_within_the_file_ends_the_reading(tmp_path):
    """The package gguf reads on behind the end: what is there has no bytes, and so many elements no end."""
    path = tmp_path / "m.gguf"
    write(path, make())
    content = bytearray(path.read_bytes())
    key = b"tokenizer.ggml.token_type"
    length = content.index(key) + len(key) + 8  # behind what it is, and what its elements are
    content[length : length + 8] = (2**22).to_bytes(8, "little")
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is no GGUF file, or is damaged .it counts 1 more of int32 at byte"):
        folder_of_gguf(path, tmp_path / "out")


def test_a_text_that_is_none_is_named(tmp_path):
    path = tmp_path / "m.gguf"
    write(path, make())
    path.write_bytes(path.read_bytes().replace(b"llama", b"\x94lama", 1))
    with pytest.raises(CheckpointError, match=r"m\.gguf: general\.architecture cannot be read \(.*can't decode byte 0x94"):
        folder_of_gguf(path, tmp_path / "out")


def test_the_command_writes_the_folder_and_says_what_is_wrong(tmp_path):
    from typer.testing import CliRunner

    from samerge_ext.cli.commands import app

    truth = write(tmp_path / "m.gguf", make(), "Q8_0")
    arguments = ["from-gguf", str(tmp_path / "m.gguf"), str(tmp_path / "out")]
    run = CliRunner().invoke(app, [*arguments, "--dtype", "float16"])
    assert run.exit_code == 0, run.output
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert_close(checkpoint.read("model.norm.weight"), truth["model.norm.weight"])
        assert checkpoint.dtype("model.norm.weight") == torch.float16
    run = CliRunner().invoke(app, [*arguments, "--dtype", "int4"])
    assert run.exit_code == 1 and "dtype 'int4'; choose one of float32" in run.output


def test_a_folder_that_is_there_is_not_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/x").touch()
    with pytest.raises(CheckpointError, match="not empty"):
        folder_of_gguf(tmp_path / "m.gguf", tmp_path / "out")
