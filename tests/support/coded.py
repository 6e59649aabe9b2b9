"""Small folders whose weights are codes, of every kind that is read, for the readers of damaged files."""

import json

import torch

SETTINGS = {
    "dtype": "bfloat16", "model_type": "llama",
    "quantization_config": {
        "quant_method": "gptq", "bits": 4, "sym": True, "checkpoint_format": "gptq", "weight_block_size": [2, 4],
        "config_groups": {"group_0": {"weights": {"strategy": "block", "block_structure": [4, 8]}}},
    },
}  # fmt: skip
STATE = {
    "quant_type": "nf4", "blocksize": 8, "dtype": "bfloat16", "shape": [4, 6], "nested_blocksize": 2, "nested_dtype": "float32",
    "nested_offset": 0.25,
}  # fmt: skip


def float8() -> dict[str, torch.Tensor]:
    """A scale for a block of DeepSeek's, for a row, and for all."""
    codes = torch.arange(24.0).reshape(4, 6).to(torch.float8_e4m3fn)
    named = {"blocks.weight": codes, "rows.weight": codes.clone(), "whole.weight": codes.clone()}
    scales = {"blocks.weight_scale_inv": torch.ones(2, 2), "rows.weight_scale": torch.ones(4, 1)}
    return named | scales | {"whole.weight_scale": torch.ones(()), "whole.input_scale": torch.ones(())}


def int8() -> dict[str, torch.Tensor]:
    order = torch.tensor(0, dtype=torch.uint8)
    return {"w.weight": torch.ones(4, 6, dtype=torch.int8), "w.SCB": torch.ones(4), "w.weight_format": order}


def four_bits(nested: bool) -> dict[str, torch.Tensor]:
    state = STATE if nested else {key: value for key, value in STATE.items() if not key.startswith("nested")}
    tensors = {
        "w.weight": torch.full((12, 1), 0x5A, dtype=torch.uint8),
        "w.weight.quant_map": torch.arange(16.0),
        "w.weight.absmax": torch.ones(3, dtype=torch.uint8 if nested else torch.float32),
        "w.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
    if nested:
        tensors |= {"w.weight.nested_absmax": torch.ones(2), "w.weight.nested_quant_map": torch.arange(256.0)}
    return tensors


def gptq() -> dict[str, torch.Tensor]:
    codes = torch.full((2, 8), 0x12345678, dtype=torch.int32)  # 16 columns of 8 rows
    groups = {"w.scales": torch.ones(2, 8).half(), "w.g_idx": torch.arange(16, dtype=torch.int32) // 8}
    return {"w.qweight": codes, "w.qzeros": codes[:, :1].contiguous(), **groups}


KINDS = [float8(), int8(), four_bits(nested=False), four_bits(nested=True), gptq()]
