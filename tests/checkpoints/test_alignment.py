"""A base and its experts under one set of names: ties, buffers, heads, what is kept, and what is said and refused."""

import json
import warnings

import pytest
import torch
from helpers import assert_close
from safetensors.torch import load_file, save_file

import samerge_ext as sm
from samerge_ext.checkpoints.alignment import NamingNote, align
from samerge_ext.checkpoints.sources import StateDictSource
from samerge_ext.elementwise.file_merge import FileMerge, merge_files
from samerge_ext.elementwise.piecewise import Combination
from samerge_ext.recipes.recipe import Recipe
from samerge_ext.recipes.run import run_recipe


def model(seed, prefix="", width=4, layers=2):
    torch.manual_seed(seed)
    names = ["embed_tokens.weight", *(f"layers.{i}.{part}.weight" for i in range(layers) for part in ("q", "norm"))]
    return {prefix + name: torch.randn(width, width) for name in names}


BASE, A, B = model(0), model(1), model(2)


def aligned(base, *experts, **options):
    sources = [(task, StateDictSource(tensors, f"expert '{task}'")) for task, tensors in zip("ab", experts, strict=False)]
    return align(StateDictSource(base, "base"), sources, **options)


def read(source):
    return {name: source.read(name) for name in source.names}


def assert_same(found, expected):
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_models_of_the_same_names_are_left_as_they_are():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        models = aligned(BASE, A, B)
    assert [type(expert) for _, expert in models.experts] == [StateDictSource] * 2
    assert (models.heads, models.kept, models.host) == ((), {}, None)


def test_experts_of_other_names_are_read_under_the_bases_and_said():
    expected = r"expert 'b': 5 tensors have other names than in base \(prefix 'model.'\): 'model.embed_tokens.weight' is 'embed"
    with pytest.warns(NamingNote, match=expected):
        models = aligned(BASE, A, {f"model.{name}": tensor for name, tensor in B.items()})
    assert_same(read(models.experts[1][1]), B)
    name, out = "layers.0.q.weight", torch.empty(3)
    models.experts[1][1].read_into(name, 2, out)
    assert torch.equal(out, B[name].flatten()[2:5])
    assert models.experts[1][1].stored_name(name) == f"model.{name}"


# Ties.


def head(tensors, equal=True):
    return {**tensors, "lm_head.weight": tensors["embed_tokens.weight"].clone() + (not equal)}


def test_a_head_stored_twice_is_one_tensor_with_its_embeddings():
    for base, experts in ((head(BASE), (A, B)), (head(BASE), (A, head(B))), (BASE, (A, head(B))), (head(BASE), (head(A), B))):
        models = aligned(base, *experts)
        assert "lm_head.weight" not in models.base.names
        for (_, expert), own in zip(models.experts, (A, B), strict=True):
            assert all(torch.equal(expert.read(name), own[name]) for name in models.base.names)
        if "lm_head.weight" in base:
            assert models.base.aliases == {"lm_head.weight": "embed_tokens.weight"}


def test_an_untied_head_is_refused_with_its_name():
    with pytest.raises(ValueError, match="'a' is untied: its 'lm_head.weight' differs from its 'embed_tokens.weight', and base"):
        aligned(BASE, head(A, equal=False), B)
    with pytest.raises(ValueError, match="base is untied: its 'lm_head.weight' differs from its 'embed_tokens.weight'"):
        aligned(head(BASE, equal=False), A, B)


def test_untied_heads_of_all_are_tensors_like_others():
    assert "lm_head.weight" in aligned(*(head(tensors, equal=False) for tensors in (BASE, A, B))).base.names


# Buffers.


def test_derived_buffers_of_some_models():
    buffers = {"position_ids": torch.arange(4)[None], "layers.0.rotary_emb.inv_freq": torch.rand(2)}
    with_buffers = {**BASE, **buffers}
    models = aligned(with_buffers, A, B)
    assert all(torch.equal(expert.read(name), buffers[name]) for _, expert in models.experts for name in buffers)
    assert_same({name: expert.read(name) for _, expert in aligned(BASE, {**A, **buffers}).experts for name in BASE}, A)


# Heads.


def test_heads_of_experts_and_of_the_base_alone():
    a, b = {**A, "classifier.weight": torch.rand(2, 4)}, {**B, "classifier.weight": torch.rand(3, 4)}
    base = {**BASE, "predictions.decoder.weight": torch.rand(9, 4)}
    models = aligned(base, a, b, heads=("classifier.*", "predictions.*"))
    assert models.heads == ("classifier.weight",)
    assert models.kept.keys() == {"predictions.decoder.weight"}
    assert torch.equal(models.experts[1][1].read("classifier.weight"), b["classifier.weight"])


def test_a_pattern_of_heads_fits_some_model():
    with pytest.raises(ValueError, match=r"heads pattern 'clasifier.\*' fits no tensor of expert 'a', whose last tensors are"):
        aligned(BASE, A, B, heads=("clasifier.*",))
    aligned(BASE, {**A, "score.weight": torch.rand(2, 4)}, B, heads=("score.*",))


def test_heads_do_not_take_the_backbone_out_of_a_written_model(tmp_path):
    for pattern in ("embed_tokens.*", "layers.1.*", "*"):
        with pytest.raises(ValueError, match="takes '.*' out of the merged model, which needs it"):
            aligned(BASE, A, B, heads=(pattern,), folder=tmp_path)
        assert aligned(BASE, A, B, heads=(pattern,)).heads  # nothing is written of it


# What is kept.


def test_keep_of_the_base():
    base = {**BASE, "text.weight": torch.rand(3)}
    models = aligned(base, A, B, keep=("text.*",))
    assert models.kept == {"text.weight": models.base} and models.host is None
    assert all(torch.equal(expert.read("text.weight"), base["text.weight"]) for _, expert in models.experts)


def test_what_is_kept_is_the_bases_even_where_one_expert_has_it():
    base, a = {**BASE, "text.weight": torch.rand(3)}, {**A, "text.weight": torch.rand(3)}
    models = aligned(base, a, B, keep=("text.*",))
    assert all(torch.equal(expert.read("text.weight"), base["text.weight"]) for _, expert in models.experts)
    assert_same({name: models.experts[0][1].read(name) for name in A}, A)


def test_keep_of_the_first_expert_that_has_it():
    b = {**B, "visual.weight": torch.rand(3)}
    models = aligned(BASE, A, b, keep=("visual.*",))
    assert models.host == "b" and torch.equal(models.kept["visual.weight"].read("visual.weight"), b["visual.weight"])
    both = aligned(BASE, {**A, "visual.weight": torch.rand(3)}, b, keep=("visual.*",))
    assert both.host == "a" and both.kept["visual.weight"] is both.experts[0][1]
    assert aligned(BASE, {**A, "visual.position_ids": torch.arange(3)}, b, keep=("visual.*",)).host == "b"


def test_a_keep_that_keeps_nothing_or_of_two_experts_is_refused():
    with pytest.raises(ValueError, match=r"'vision.\*' keeps nothing: it fits no tensor of any model"):
        aligned(BASE, A, B, keep=("vision.*",))
    with pytest.raises(ValueError, match=r"'layers.\*' keeps nothing: all models have 'layers.0.q.weight', so that it is merged"):
        aligned(BASE, A, B, keep=("layers.*",))
    with pytest.raises(ValueError, match="keep takes 'visual.weight' from expert 'a' and 'audio.weight' from expert 'b'"):
        aligned(BASE, {**A, "visual.weight": torch.rand(3)}, {**B, "audio.weight": torch.rand(3)}, keep=("visual.*", "audio.*"))


def save(folder, tensors, **config):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def recipe(base, experts, method="task_arithmetic", **keys):
    models = [{"model": str(path), "parameters": {"weight": 0.5}} for path in experts]
    return Recipe.model_validate({"merge_method": method, "base_model": str(base), "models": models, **keys})


def test_a_tower_of_an_expert_is_written_as_that_expert_is_stored(tmp_path):
    """With its names, its config.json and its tokenizer, which a text model has other ones of."""
    tower = {"visual.blocks.0.weight": torch.rand(3, 3)}
    base = save(tmp_path / "base", BASE, model_type="text", torch_dtype="float32")
    both = {**{f"language.{name}": tensor for name, tensor in B.items()}, **tower}
    b = save(tmp_path / "b", both, architectures=["Both"], torch_dtype="float32")
    (base / "tokenizer_config.json").write_text('{"of": "base"}')
    (b / "tokenizer_config.json").write_text('{"of": "b"}')
    with pytest.warns(NamingNote, match="tensors of it are kept; in the merged model the names .* are those of this model"):
        run_recipe(recipe(base, [b], keep=["visual.*"], out_dtype="bfloat16"), tmp_path / "out")
    written = load_file(tmp_path / "out/model.safetensors")
    assert written.keys() == {f"language.{name}" for name in BASE} | tower.keys()
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert torch.equal(written["visual.blocks.0.weight"], tower["visual.blocks.0.weight"].bfloat16())
    name = "layers.0.q.weight"
    assert_close(written[f"language.{name}"], (BASE[name] + B[name]) / 2)
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"architectures": ["Both"], "dtype": "bfloat16"}
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text()) == {"of": "b"}


def test_the_bases_tokenizer_beside_a_tower_of_an_expert_when_asked_for(tmp_path):
    base, b = save(tmp_path / "base", BASE), save(tmp_path / "b", {**B, "visual.weight": torch.rand(3)})
    for folder in (base, b):
        (folder / "tokenizer_config.json").write_text(json.dumps({"of": folder.name}))
    run_recipe(recipe(base, [b], keep=["visual.*"], tokenizer={"source": "base"}), tmp_path / "out")
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text()) == {"of": "base"}


def test_packed_weights_keep_the_bases_and_refuse_an_experts(tmp_path):
    base = save(tmp_path / "base", {**BASE, "text.weight": torch.rand(3)})
    experts = {task: save(tmp_path / task, tensors) for task, tensors in (("a", A), ("b", B))}
    for options in ({}, {"file": tmp_path / "packed.safetensors"}):
        packed = sm.PackedWeights.from_folders(base, experts, keep="text.*", **options)
        assert packed.unchanged.keys() == {"text.weight"}
        assert sm.task_arithmetic(packed.in_memory(), 0.5).state_dict().keys() == {*BASE, "text.weight"}
    assert sm.PackedWeights.describe(base, experts, keep="text.*").layout.num_layers == len(BASE) + 1
    with pytest.raises(ValueError, match=r"keep: base .* lacks 'text.weight' of expert 'base', .* merge from file to file"):
        sm.PackedWeights.from_folders(experts["a"], {"base": base, "b": experts["b"]}, keep=["text.*"])
    packed = sm.PackedWeights.from_state_dicts({**BASE, "text.weight": torch.rand(3)}, {"a": A}, keep=["text.*"])
    assert packed.unchanged.keys() == {"text.weight"}


def test_a_wrappers_prefix_is_not_written(tmp_path):
    base = save(tmp_path / "base", {f"module._orig_mod.{name}": tensor for name, tensor in BASE.items()})
    a = save(tmp_path / "a", A)
    run_recipe(recipe(base, [a], parameters={"weight": [{"filter": "q", "value": 1.0}, {"value": 0.0}]}), tmp_path / "out")
    assert load_file(tmp_path / "out/model.safetensors").keys() == BASE.keys()
    assert sm.PackedWeights.from_folders(base, {"a": a}).layout.names == tuple(sorted(BASE))


def test_file_merges_without_a_base_keep_the_first_models(tmp_path):
    a, b = save(tmp_path / "a", {**A, "text.weight": torch.rand(3)}), save(tmp_path / "b", B)
    merge = FileMerge([("a", a), ("b", b)], lambda *_: Combination([0.5, 0.5], normalize=True), names_from=a, keep=("text.*",))
    merge_files(merge, tmp_path / "out")
    written, first = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", a))
    assert torch.equal(written["text.weight"], first["text.weight"])
