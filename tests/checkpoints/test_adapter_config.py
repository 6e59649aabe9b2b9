"""Settings of adapters that PEFT does not write: refused by key and file."""

import json

import pytest
from readers import READERS, SETTINGS

ADAPTER, FACTORS = READERS["adapter's settings"], READERS["adapter's factors"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_alpha": None}, "lora_alpha is None, and a finite number"),
        ({"lora_alpha": "16"}, "lora_alpha is '16', and a finite number"),
        ({"lora_alpha": True}, "lora_alpha is True, and a finite number"),
        ({"lora_alpha": 10**400}, "lora_alpha is a number of 1329 bits, and a finite number"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf, and a finite number"),
        ({"r": 0}, "r is 0, and a rank of 1 or more"),
        ({"r": "8"}, "r is '8', and a rank of 1 or more"),
        ({"alpha_pattern": ["x"]}, r"alpha_pattern is \['x'\], and finite numbers"),
        ({"alpha_pattern": {"0": "8"}}, r"alpha_pattern is \{'0': '8'\}, and finite numbers"),
        ({"alpha_pattern": {"(a+)+b": 1}}, "alpha_pattern: fits in too many ways"),
        ({"alpha_pattern": {"[": 1}}, "alpha_pattern: no regular expression"),
        ({"rank_pattern": "x"}, "rank_pattern is 'x', and ranks"),
        ({"rank_pattern": {"0": 0}}, "rank_pattern is .*, and ranks"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes', and true or false"),
        ({"trainable_token_indices": 5}, "trainable_token_indices is 5, and numbers of tokens"),
        ({"trainable_token_indices": {"x": "ab"}}, "trainable_token_indices is .*, and numbers of tokens"),
        ({"peft_type": {"x": 1}}, "is a .* adapter and only LORA"),
    ],
)
def test_settings_of_other_types(tmp_path, settings, message):
    path = tmp_path / ADAPTER.file
    assert not ADAPTER.check(tmp_path, json.dumps({**SETTINGS, **settings}).encode())
    with pytest.raises(ValueError, match=f"{path.parent}.*{message}"):
        ADAPTER.read(path)


def test_what_is_left_out_is_as_in_peft(tmp_path):
    few = {"peft_type": "LORA", "base_model_name_or_path": 5, "alpha_pattern": None}
    assert ADAPTER.check(tmp_path, json.dumps(few).encode())


def test_factors_of_rank_0(tmp_path):
    import torch
    from safetensors.torch import save

    shapes = {"A": (0, 6), "B": (4, 0)}
    factors = {f"base_model.model.layers.0.lora_{letter}.weight": torch.ones(shape) for letter, shape in shapes.items()}
    assert not FACTORS.check(tmp_path, save(factors))
    with pytest.raises(ValueError, match=r"\[0, 6\] and .*\[4, 0\] are no factors"):
        FACTORS.read(tmp_path / FACTORS.file)
