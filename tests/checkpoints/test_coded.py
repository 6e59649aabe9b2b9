"""Weights stored as codes are read as what the codes stand for, piece by piece as whole, and merged as that."""

import json
import re

import pytest
import torch
from helpers import assert_close
from safetensors.torch import load_file, save_file

import samerge_ext as sm
from samerge_ext.checkpoints.folder import open_checkpoint
from samerge_ext.checkpoints.reading import CheckpointError
from samerge_ext.elementwise.file_merge import FileMerge, merge_files
from samerge_ext.elementwise.piecewise import Combination

WEIGHT = "layers.0.q.weight"
STEM = WEIGHT.removesuffix(".weight")
PLAIN = {"embed.weight": torch.arange(12.0).reshape(4, 3).bfloat16(), "layers.0.q.bias": torch.ones(5).bfloat16()}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def save(folder, tensors, config=None):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({**PLAIN, **tensors}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"dtype": "bfloat16", **(config or {})}))
    return folder


# Each: rows, columns, seed -> (stored tensors, config, the weight in fp64).


def float8(scale_shape, block, part="weight_scale", dtype=torch.float8_e4m3fn, **told):
    def make(rows, columns, seed=0):
        codes = random(rows, columns, seed=seed).to(dtype)
        scale = random(*scale_shape(rows, columns), seed=seed + 1).abs() + 0.1
        truth = codes.double()
        for i in range(rows):
            for j in range(columns):
                at = (i // block(rows, columns)[0], j // block(rows, columns)[1])
                truth[i, j] *= scale.double().reshape(-(-rows // block(rows, columns)[0]), -1)[at]
        tensors = {WEIGHT: codes, f"{STEM}.{part}": scale, f"{STEM}.input_scale": torch.ones(())}
        return tensors, {"quantization_config": told} if told else {}, truth

    return make


def int8_of_bitsandbytes(rows, columns, seed=0):
    codes = torch.randint(-127, 128, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    largest = random(rows, seed=seed).abs() + 0.1
    tensors = {WEIGHT: codes, f"{STEM}.SCB": largest, f"{STEM}.weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors, {"quantization_config": {"load_in_8bit": True}}, codes.double() * largest.double()[:, None] / 127


def four_bits(nested, blocksize=64):
    def make(rows, columns, seed=0):
        generator = torch.Generator().manual_seed(seed)
        numel, blocks = rows * columns, -(-rows * columns // blocksize)
        codes = torch.randint(16, (numel,), generator=generator)
        padded = torch.cat([codes, codes.new_zeros(numel % 2)])
        quant_map, absmax = random(16, seed=seed), random(blocks, seed=seed + 1).abs()
        state = {"quant_type": "nf4", "blocksize": blocksize, "dtype": "bfloat16", "shape": [rows, columns]}
        tensors = {WEIGHT: (padded[::2] * 16 + padded[1::2]).to(torch.uint8)[:, None], f"{WEIGHT}.quant_map": quant_map}
        largest = absmax.double()
        if nested:
            state |= {"nested_blocksize": 4, "nested_dtype": "float32", "nested_offset": 0.25}
            absmax = torch.randint(256, (blocks,), generator=generator).to(torch.uint8)
            of_absmax, nested_map = random(-(-blocks // 4), seed=seed + 2).abs(), random(256, seed=seed + 3)
            tensors |= {f"{WEIGHT}.nested_absmax": of_absmax, f"{WEIGHT}.nested_quant_map": nested_map}
            each = [nested_map[code].double() * of_absmax[i // 4].double() + 0.25 for i, code in enumerate(absmax.tolist())]
            largest = torch.stack(each)
        tensors[f"{WEIGHT}.absmax"] = absmax
        said = json.dumps(state).encode()
        tensors[f"{WEIGHT}.quant_state.bitsandbytes__nf4"] = torch.tensor(list(said), dtype=torch.uint8)
        truth = torch.stack([quant_map[c].double() * largest[i // blocksize] for i, c in enumerate(codes.tolist())])
        return tensors, {"quantization_config": {"load_in_4bit": True}}, truth.reshape(rows, columns)

    return make


def gptq(bits, below, **told):
    def make(rows, columns, seed=0):
        """Groups of columns in no order, as of act-order."""
        generator = torch.Generator().manual_seed(seed)
        rows, columns, groups = rows // 16 * 16 + 16, columns // 16 * 16 + 16, 3
        codes = torch.randint(2**bits, (rows, columns), generator=generator)
        zeros = torch.randint(1, 2**bits, (groups, rows), generator=generator)
        scales, group = random(groups, rows, seed=seed).abs().half(), torch.randint(groups, (columns,), generator=generator)

        def packed(numbers):  # [n] -> [n · bits / 32] int32
            words = [sum(int(n) << bits * i for i, n in enumerate(each)) for each in numbers.reshape(-1, 32 // bits)]
            return torch.tensor([word - 2**32 * (word >= 2**31) for word in words], dtype=torch.int32)

        tensors = {
            f"{STEM}.qweight": torch.stack([packed(row) for row in codes], 1),
            f"{STEM}.qzeros": torch.stack([packed(each - below) for each in zeros]),
            f"{STEM}.scales": scales,
            f"{STEM}.g_idx": group.int(),
        }
        truth = torch.empty(rows, columns, dtype=torch.float64)
        for i in range(rows):
            for j in range(columns):
                truth[i, j] = int(codes[i, j] - zeros[group[j], i]) * scales[group[j], i].double()
        return tensors, {"quantization_config": {"quant_method": "gptq", "bits": bits, **told}}, truth

    return make


KINDS = {
    "float8, one scale": float8(lambda r, c: (1,), lambda r, c: (r, c)),
    "float8, a scalar": float8(lambda r, c: (), lambda r, c: (r, c), "weight_scale_inv"),
    "float8, rows": float8(lambda r, c: (r, 1), lambda r, c: (1, c)),
    "float8 e5m2, rows": float8(lambda r, c: (r, 1), lambda r, c: (1, c), dtype=torch.float8_e5m2),
    "float8, groups of columns": float8(lambda r, c: (r, c // 6), lambda r, c: (1, 6)),
    "float8, DeepSeek's blocks": float8(
        lambda r, c: (-(-r // 4), -(-c // 8)), lambda r, c: (4, 8), "weight_scale_inv", weight_block_size=[4, 8]
    ),
    "float8, compressed-tensors' blocks": float8(
        lambda r, c: (-(-r // 4), -(-c // 8)),
        lambda r, c: (4, 8),
        config_groups={"group_0": {"weights": {"strategy": "block", "block_structure": [4, 8]}}},
    ),
    "int8, rows": int8_of_bitsandbytes,
    "nf4": four_bits(nested=False),
    "nf4, doubly quantised": four_bits(nested=True, blocksize=8),
    "GPTQ, 4 bits": gptq(4, 1, sym=True),
    "GPTQ, 8 bits": gptq(8, 1, sym=True, checkpoint_format="gptq"),
    "GPTQ, 2 bits, second format": gptq(2, 0, sym=False, checkpoint_format="gptq_v2"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_is_what_its_codes_stand_for(tmp_path, kind):
    tensors, config, truth = KINDS[kind](10, 18)
    with open_checkpoint(save(tmp_path / "m", tensors, config)) as checkpoint:
        assert set(checkpoint.names) == {WEIGHT, *PLAIN}
        assert (checkpoint.dtype(WEIGHT), checkpoint.weight_dtype(WEIGHT)) == (torch.float32, torch.bfloat16)
        assert_close(checkpoint.read(WEIGHT), truth)
        for start, count in ((0, 1), (1, 17), (7, 60), (17, 2), (90, 90), (179, 1), (5, 0)):
            out = torch.full((count,), torch.nan)
            checkpoint.read_into(WEIGHT, start, out)
            assert_close(out, truth.flatten()[start : start + count], f"{count} from {start}")


def test_an_odd_number_of_four_bit_codes(tmp_path):
    tensors, config, truth = four_bits(nested=False)(5, 7)
    with open_checkpoint(save(tmp_path / "m", tensors, config)) as checkpoint:
        assert_close(checkpoint.read(WEIGHT), truth)


@pytest.mark.parametrize("kind", ["float8, rows", "float8, DeepSeek's blocks", "int8, rows", "nf4", "GPTQ, 4 bits"])
def test_a_quantised_expert_of_a_plain_base_is_merged(tmp_path, kind):
    """From file to file and packed; what is written is not quantised."""
    tensors, config, truth = KINDS[kind](10, 18)
    base = random(*truth.shape, seed=9).bfloat16()
    folders = save(tmp_path / "base", {WEIGHT: base}), save(tmp_path / "a", tensors, config)
    half = Combination([0.5], 1.0, normalize=False, elect=False)
    out = merge_files(FileMerge([("a", folders[1])], lambda *_: half, folders[0], folders[0]), tmp_path / "out")
    written = load_file(out / "model.safetensors")
    assert written.keys() == {WEIGHT, *PLAIN}
    assert_close(written[WEIGHT], base.double() + 0.5 * (truth - base.double()))
    packed = sm.PackedWeights.from_folders(folders[0], {"a": folders[1]})
    assert_close(sm.task_arithmetic(packed, 0.5).state_dict()[WEIGHT].float(), written[WEIGHT].float().bfloat16().double())


def test_a_quantised_base_is_written_as_the_model_that_was_quantised(tmp_path):
    tensors, config, truth = KINDS["nf4"](10, 18)
    other, other_config, other_truth = KINDS["nf4"](10, 18, seed=5)
    base, expert = save(tmp_path / "base", tensors, config), save(tmp_path / "a", other, other_config)
    packed = sm.PackedWeights.from_folders(base, {"a": expert})
    with pytest.warns(UserWarning, match="quantization_config is left out"):
        sm.task_arithmetic(packed, 0.5).save_pretrained(tmp_path / "out", companions=base)
    written = load_file(tmp_path / "out/model.safetensors")
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert written[WEIGHT].dtype == torch.bfloat16
    assert_close(written[WEIGHT], (truth + other_truth) / 2)


def test_an_adapter_of_a_quantised_base_is_merged_with_it(tmp_path):
    """From file to file in the type of the model that was quantised, and packed."""
    tensors, config, truth = KINDS["nf4"](10, 18)
    base, adapter = save(tmp_path / "base", tensors, config), tmp_path / "adapter"
    adapter.mkdir()
    left, right = random(10, 2, seed=7), random(2, 18, seed=8)
    factors = {f"base_model.model.{STEM}.lora_B.weight": left, f"base_model.model.{STEM}.lora_A.weight": right}
    save_file(factors, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    expected = truth + 0.5 * 2 * left.double() @ right.double()
    half = Combination([0.5], 1.0, normalize=False, elect=False)
    with pytest.warns(UserWarning, match="quantization_config is left out"):
        out = merge_files(FileMerge([("a", adapter)], lambda *_: half, base, base), tmp_path / "out")
    written = load_file(out / "model.safetensors")[WEIGHT]
    assert written.dtype == torch.bfloat16
    assert_close(written, expected)
    packed = sm.PackedWeights.from_folders(base, {"a": adapter})
    assert_close(sm.task_arithmetic(packed, 0.5).state_dict()[WEIGHT], expected)


REFUSED = {
    "a scale of another shape": ("float8, rows", {f"{STEM}.weight_scale": torch.ones(3)}, r"weight_scale' is \[3\], which is no"),
    "codes in an order of processors": (
        "int8, rows",
        {f"{STEM}.weight_format": torch.tensor(1, dtype=torch.uint8)},
        r"weight_format' is \[1\]: only codes",
    ),
    "no absmax": ("nf4", {f"{WEIGHT}.absmax": None}, "absmax' should be 3 of torch.float32 .* and is missing"),
    "other codes": ("nf4", {WEIGHT: torch.zeros(45, dtype=torch.bfloat16)}, "weight' should be 90 of torch.uint8"),
    "no state": (
        "nf4",
        {f"{WEIGHT}.quant_state.bitsandbytes__nf4": torch.tensor(list(b'{"shape": 3}'), dtype=torch.uint8)},
        "does not say shape, dtype and blocksize",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_codes_that_their_scales_do_not_fit_are_refused(tmp_path, fault):
    kind, changed, message = REFUSED[fault]
    tensors, config, _ = KINDS[kind](10, 18)
    tensors = {name: tensor for name, tensor in {**tensors, **changed}.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(tmp_path / 'm'))}: .*{message}"):
        open_checkpoint(save(tmp_path / "m", tensors, config))


def test_parts_of_gptq_that_do_not_make_a_weight_are_refused(tmp_path):
    tensors, config, _ = KINDS["GPTQ, 4 bits"](10, 18)
    others = torch.zeros(31, dtype=torch.int32), torch.full((32,), 3, dtype=torch.int32), torch.full((32,), -1, dtype=torch.int32)
    for changed in (*({f"{STEM}.g_idx": other} for other in others), {f"{STEM}.scales": torch.ones(3, 8)}):
        with pytest.raises(CheckpointError, match=r"m: 'layers.0.q.qweight' … .* no weight of 4 bits as GPTQ stores it"):
            open_checkpoint(save(tmp_path / "m", {**tensors, **changed}, config))
    del tensors[f"{STEM}.qzeros"]
    with pytest.raises(CheckpointError, match=r"m: 'layers.0.q.qweight' … .* no weight of 4 bits as GPTQ stores it"):
        open_checkpoint(save(tmp_path / "m", tensors, config))


def test_blocks_that_config_json_does_not_tell_are_refused(tmp_path):
    tensors, _, _ = KINDS["float8, DeepSeek's blocks"](8, 16)
    with pytest.raises(CheckpointError, match=r"m: 'layers.0.q.weight_scale_inv' is \[2, 2\].*which tells none"):
        open_checkpoint(save(tmp_path / "m", tensors))


@pytest.mark.parametrize(
    ("tensors", "config"),
    [
        ({WEIGHT: torch.zeros(10, 18, dtype=torch.uint8), f"{STEM}.weight_scale": torch.ones(10, 1)}, {}),
        gptq(4, 1, sym=False)(10, 18)[:2],
        ({WEIGHT: torch.zeros(10, 18).to(torch.float8_e4m3fn)}, {}),
        ({"layers.0.experts.up_proj": torch.ones(2, 3, 4), "layers.0.experts.up_proj_scale_inv": torch.ones(2, 1, 1)}, {}),
    ],
    ids=["codes of another type", "asymmetric GPTQ", "no scale", "experts of a mixture"],
)
def test_other_codes_are_refused_where_models_are_merged(tmp_path, tensors, config):
    """Also where all models have them, and no name differs."""
    folders = [save(tmp_path / name, tensors, config) for name in ("base", "a")]
    with pytest.raises(ValueError, match="quantised, dequantise it first"):
        sm.PackedWeights.from_folders(folders[0], {"a": folders[1]})
