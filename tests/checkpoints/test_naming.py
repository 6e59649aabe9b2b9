"""Which tensor of one model is which of another, by their names and shapes."""

import pytest
import torch

from samerge_ext.checkpoints.naming import correspondence, is_derived_buffer, prefix_between, unwrapped

BLOCK = {"attn.q.weight": (4, 4), "attn.q.bias": (4,), "mlp.up.weight": (8, 4)}


def shapes(*names):
    return {name: torch.Size((4, 4)) for name in names}


def stack(prefix, layers=2, width=4):
    """A stack of blocks, of other shapes with another width."""
    return {
        f"{prefix}{i}.{name}": torch.Size(n * width // 4 for n in shape) for i in range(layers) for name, shape in BLOCK.items()
    }


def under(prefix, names):
    return {f"{prefix}{name}": shape for name, shape in names.items()}


BACKBONE = {**stack("layers."), **shapes("embed.weight")}


def assert_found(ours, theirs, to_theirs):
    """All of ours are found, and from the other side too."""
    assert correspondence(ours, theirs) == {name: to_theirs(name) for name in ours}
    assert correspondence(theirs, ours) == {to_theirs(name): name for name in ours}


@pytest.mark.parametrize("prefix", ["", "module.", "module.module.", "_orig_mod.", "module._orig_mod.", "model.", "a.b.c."])
def test_a_prefix_before_all(prefix):
    assert_found(BACKBONE, under(prefix, BACKBONE), lambda name: prefix + name)


def test_a_compiled_part():
    compiled = {name.replace("layers.1.", "layers.1._orig_mod."): shape for name, shape in BACKBONE.items()}
    assert_found(BACKBONE, compiled, lambda name: name.replace("layers.1.", "layers.1._orig_mod."))


@pytest.mark.parametrize("norm", ["LayerNorm", "layer_norm", "layernorm_before", "ln_f", "norm", "final_norm1"])
def test_gamma_and_beta(norm):
    ours, theirs = shapes(f"a.{norm}.weight", f"a.{norm}.bias"), shapes(f"a.{norm}.gamma", f"a.{norm}.beta")
    assert_found(ours, theirs, lambda name: name.replace("weight", "gamma").replace("bias", "beta"))


def test_gamma_of_no_norm_is_another_tensor():
    assert correspondence(shapes("block.weight"), shapes("block.gamma")) == {}  # a layer's scale


def test_a_backbone_without_the_prefix_of_a_model_with_a_head():
    whole = {**under("bert.", BACKBONE), **shapes("classifier.weight")}
    assert correspondence(BACKBONE, whole) == {name: f"bert.{name}" for name in BACKBONE}
    assert correspondence(whole, BACKBONE) == {f"bert.{name}": name for name in BACKBONE}


def test_renamed_parts_of_qwen2_vl():
    """`visual.` and `model.` became `model.visual.` and `model.language_model.`; the head kept its name."""
    old = {**stack("visual.blocks.", width=8), **under("model.", BACKBONE), **shapes("lm_head.weight")}

    def new(name):
        moved = name.replace("model.", "model.language_model.") if name.startswith("model.") else f"model.{name}"
        return name if name == "lm_head.weight" else moved

    assert_found(old, {new(name): shape for name, shape in old.items()}, new)


def test_a_tower_alone_is_the_one_of_its_shapes():
    """Both of CLIP's towers have the same names below their prefix."""
    clip = {**stack("text_model.layers.", width=8), **stack("vision_model.layers.")}
    tower = stack("layers.")
    assert correspondence(clip, tower) == {f"vision_model.{name}": name for name in tower}
    assert correspondence(tower, clip) == {name: f"vision_model.{name}" for name in tower}


def test_of_equal_towers_one_is_found_as_a_whole():
    clip, tower = {**stack("text_model.layers."), **stack("vision_model.layers.")}, stack("layers.")
    found = correspondence(clip, tower)
    assert len(found) == len(tower) and len({name.split(".")[0] for name in found}) == 1


def test_numbers_are_never_left_out_of_a_name():
    assert correspondence(shapes("layers.weight"), shapes("layers.0.weight")) == {}
    assert correspondence(stack("h."), stack("h.0.")) == {}


def test_nothing_is_found_where_all_shapes_differ():
    assert correspondence(stack("layers."), stack("model.layers.", width=8)) == {}


def test_one_tensor_of_another_shape_is_found_beside_those_that_fit():
    """So that a message can say that it has another shape: added tokens."""
    ours, theirs = {**BACKBONE, "embed.weight": torch.Size((4, 4))}, {**BACKBONE, "embed.weight": torch.Size((6, 4))}
    assert correspondence(ours, under("model.", theirs))["embed.weight"] == "model.embed.weight"


def test_each_name_is_found_once():
    generator = torch.Generator().manual_seed(0)
    parts = ["a", "b", "0", "1", "module", "_orig_mod", "norm"]
    for _ in range(200):
        sides = []
        for _ in range(2):
            picks = torch.randint(len(parts), (12, 3), generator=generator).tolist()
            names = {".".join([*(parts[i] for i in pick), leaf]) for pick in picks for leaf in ("weight", "gamma")}
            sides.append(shapes(*names))
        found = correspondence(*sides)
        assert found.keys() <= sides[0].keys() and set(found.values()) <= sides[1].keys()
        assert len(set(found.values())) == len(found)
        assert all(found[name] == name for name in sides[0] if name in sides[1])


def test_an_architectures_own_names():
    ours, theirs = stack("encoder.layer."), stack("layers.")
    rename = lambda name: name.replace("encoder.layer.", "layers.")  # noqa: E731
    assert correspondence(ours, theirs) == {}
    assert correspondence(ours, theirs, rename) == {name: rename(name) for name in ours}


def test_what_wrappers_put_before_all_names():
    assert unwrapped(["module.a", "module.b.module.c"]) == {"module.a": "a", "module.b.module.c": "b.module.c"}
    assert unwrapped(["_orig_mod.a", "b._orig_mod.c"]) == {"_orig_mod.a": "a", "b._orig_mod.c": "b.c"}
    assert unwrapped(["module._orig_mod.module.a"]) == {"module._orig_mod.module.a": "a"}
    for names in (["module.a", "b"], ["a", "_orig_mod.a"], []):
        assert unwrapped(names) == {name: name for name in names}


def test_the_prefix_between_two_names():
    assert prefix_between("bert.pooler.dense.bias", "pooler.dense.bias") == "bert."
    assert prefix_between("model.language_model.norm.weight", "model.norm.weight") == "language_model."
    assert prefix_between("a.norm.gamma", "a.norm.weight") == prefix_between("module.a", "a") == ""


@pytest.mark.parametrize(
    ("name", "shape", "derived"),
    [
        ("bert.embeddings.position_ids", (1, 8), True),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (4,), True),
        ("h.0.attn.bias", (1, 1, 8, 8), True),
        ("h.0.attn.masked_bias", (), True),
        ("h.0.attn.bias", (8,), False),  # of a layer of that name
        ("visual.attn_mask", (8, 8), True),
        ("layers.0.attention.bias", (8, 4), False),
        ("position_ids.weight", (8, 4), False),
    ],
)
def test_buffers_that_a_model_makes_for_itself(name, shape, derived):
    assert is_derived_buffer(name, torch.Size(shape)) is derived
