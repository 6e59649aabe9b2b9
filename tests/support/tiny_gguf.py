"""GGUF files of a few KB: a Llama of one layer, as llama.cpp stores one."""

from pathlib import Path

import gguf
import numpy as np

WORDS = 8


def files(folder: Path) -> list[bytes]:
    """In fp32, in fp16, and in blocks of 32 codes of 8 bits."""
    kinds = gguf.GGMLQuantizationType
    return [_file(folder / "made.gguf", kind, width) for kind, width in ((kinds.F32, 8), (kinds.F16, 8), (kinds.Q8_0, 32))]


def _file(path: Path, kind: gguf.GGMLQuantizationType, width: int) -> bytes:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(16)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(width)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(WORDS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["<unk>", "<s>", "</s>", "!", '"', "#", "$", "!!"])
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1, 1])
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd": (WORDS, width), "output_norm": (width,), "blk.0.attn_norm": (width,), "blk.0.ffn_norm": (width,)}
    shapes |= {f"blk.0.attn_{part}": (width, width) for part in ("q", "output")}
    shapes |= {f"blk.0.attn_{part}": (width // 2, width) for part in ("k", "v")}
    shapes |= {f"blk.0.ffn_{part}": (width, width) for part in ("gate", "up", "down")}
    for name, shape in shapes.items():
        own = kind if len(shape) == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{name}.weight", gguf.quantize(np.ones(shape, np.float32), own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()
