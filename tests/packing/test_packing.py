"""Layout and PackedWeights: what is stored, where, and what is refused."""

import copy

import packing_memory
import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch import nn

import samerge_ext as sm


@pytest.fixture
def base():
    return tiny.make(0, torch.float32)


@pytest.fixture
def experts(base):
    return tiny.make_experts(base)


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def save_folder(folder, module, config=None):
    folder.mkdir()
    tensors = {n: t.clone() for n, t in module.state_dict().items() if n != "tied.weight"}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def test_layers_start_at_blocks_and_blocks_belong_to_one_layer():
    layout = sm.Layout.build(
        ["a", "b", "c", "d"],
        [torch.Size([3, 5]), torch.Size([2000]), torch.Size([1024]), torch.Size([])],
        [torch.float32] * 4,
        [True, True, False, True],
    )
    assert layout.offsets == (0, 1024, None, 3072)
    assert layout.numel == 4096 and layout.num_layers == 4 and layout.num_parameters == 15 + 2000 + 1
    assert layout.block_layer.tolist() == [0, 1, 1, 3] and layout.block_layer.dtype == torch.int32
    views = layout.views(torch.arange(4096.0))
    assert views["b"][0] == 1024 and views["a"].shape == (3, 5) and "c" not in views


def test_task_vectors_are_expert_minus_base(base, experts):
    packed = sm.PackedWeights.from_modules(base, experts)
    theta = dict(base.named_parameters())
    for row, expert in zip(packed.task_vectors, experts.values(), strict=True):
        for name, value in packed.layout.views(row).items():
            torch.testing.assert_close(value, dict(expert.named_parameters())[name] - theta[name], rtol=0, atol=0)
    assert packed.task_vectors.shape == (3, packed.layout.numel)


def test_tied_weights_are_stored_once_and_come_back_tied(base, experts):
    packed = sm.PackedWeights.from_modules(base, experts)
    assert packed.aliases == {"tied.weight": "first.weight"}
    assert "tied.weight" not in packed.layout.names
    tensors = sm.average(packed).state_dict()
    assert tensors["tied.weight"] is tensors["first.weight"]


def test_a_layer_that_no_expert_changed_is_stored_once_but_keeps_its_coefficient(base, experts):
    packed = sm.PackedWeights.from_modules(base, experts)
    assert set(packed.unchanged) == {"frozen.weight", "frozen.bias"}
    assert packed.coefficients(0.3).shape == (3, len(list(base.parameters())))
    assert torch.equal(sm.average(packed).state_dict()["frozen.weight"], base.frozen.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("task_vector_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_storage_dtypes(base, experts, dtype, task_vector_dtype):
    packed = sm.PackedWeights.from_modules(base, experts, dtype=dtype, task_vector_dtype=task_vector_dtype)
    assert packed.base.dtype == dtype and packed.task_vectors.dtype == task_vector_dtype
    exact = sm.average(sm.PackedWeights.from_modules(base, experts, dtype=torch.float64)).merged
    merged = sm.average(packed).merged
    eps = max(torch.finfo(dtype).eps, torch.finfo(task_vector_dtype).eps)
    assert (merged.double() - exact).norm() < eps * exact.norm()
    assert all(t.dtype == torch.float32 for t in sm.average(packed).state_dict().values() if t.is_floating_point())


def test_float_buffers_are_averaged_and_others_are_the_bases(base, experts):
    experts["red"].norm.num_batches_tracked += 5
    result = sm.average(sm.PackedWeights.from_modules(base, experts), module=tiny.make(1, torch.float32))
    mean = torch.stack([e.norm.running_mean for e in experts.values()]).mean(0)
    torch.testing.assert_close(result.state_dict()["norm.running_mean"], mean)
    torch.testing.assert_close(result.module.norm.running_mean, mean)
    assert result.state_dict()["norm.num_batches_tracked"] == base.norm.num_batches_tracked


def test_modules_state_dicts_and_folders_pack_alike(base, experts, tmp_path):
    by_module = sm.PackedWeights.from_modules(base, experts)
    by_state = sm.PackedWeights.from_state_dicts(base.state_dict(), {t: e.state_dict() for t, e in experts.items()})
    folders = {task: save_folder(tmp_path / task, expert) for task, expert in experts.items()}
    by_folder = sm.PackedWeights.from_folders(save_folder(tmp_path / "base", base), folders)
    expected = sm.average(by_module).state_dict()
    for packed in (by_state, by_folder):
        for name, tensor in sm.average(packed).state_dict().items():
            assert torch.equal(tensor, expected[name]), name


def test_heads_are_kept_per_task_and_saved(base, experts, tmp_path):
    for classes, module in enumerate([base, *experts.values()], start=2):
        module.head = nn.Linear(tiny.WIDTH, classes)
    packed = sm.PackedWeights.from_modules(base, experts, heads="head.*")
    assert not any(name.startswith("head") for name in packed.layout.names)
    assert packed.heads["green"]["head.weight"].shape == (4, tiny.WIDTH)
    sm.average(packed).save_pretrained(tmp_path / "out")
    from safetensors.torch import load_file

    assert torch.equal(load_file(tmp_path / "out/heads/green.safetensors")["head.bias"], experts["green"].head.bias)
    module = copy.deepcopy(base)
    model = sm.MergedModel(module, packed)
    model.select_head("blue")
    assert module.head.weight.shape == (5, tiny.WIDTH)


def test_a_head_of_the_base_alone_stays_as_it_is(base, experts):
    """Also where the module that is merged into has no place for it."""
    without = copy.deepcopy(base)
    base.pretraining_head = nn.Linear(tiny.WIDTH, 3)
    packed = sm.PackedWeights.from_modules(base, experts, heads="pretraining_head.*")
    merged = sm.average(packed, module=without).state_dict()
    assert torch.equal(merged["pretraining_head.weight"], base.pretraining_head.weight)


def test_folders_are_read_tensor_by_tensor(tmp_path):
    """Peak memory is the packed store plus one tensor of the base, of an expert, and their difference."""
    packing_memory.write_models(tmp_path)
    beyond = packing_memory.beyond_the_store(tmp_path, torch.bfloat16)
    assert beyond < 4 * packing_memory.TENSOR, f"{beyond:.0f} MiB beyond the store; a model has 128"


def test_a_missing_and_an_extra_tensor_are_named_with_the_pattern(base, experts):
    tensors = state(experts["green"])
    del tensors["second.bias"]
    tensors["classifier.out.weight"] = torch.zeros(2)
    states = {t: state(e) for t, e in experts.items()} | {"green": tensors}
    with pytest.raises(ValueError) as error:
        sm.PackedWeights.from_state_dicts(state(base), states)
    assert "expert 'green' lacks base's 'second.bias'" in str(error.value)
    assert "'classifier.out.weight'" in str(error.value) and "classifier.*" in str(error.value)


def test_a_shape_that_differs_is_named_with_both_shapes(base, experts):
    experts["blue"].second = nn.Linear(tiny.WIDTH, 3)
    with pytest.raises(ValueError, match=r"expert 'blue': 'second.weight' is \[3, 8\], in base it is \[16, 8\].*heads=\['second"):
        sm.PackedWeights.from_modules(base, experts)


def test_the_largest_numbers_of_a_dtype_are_fine():
    """Their difference overflows."""
    base = {"w": torch.tensor([-65504.0, 65504.0], dtype=torch.float16)}
    sm.PackedWeights.from_state_dicts(base, {"a": {"w": base["w"] / 2}})


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "Inf"), (-float("inf"), "Inf")])
def test_nan_and_inf_are_refused(base, experts, value, word):
    with torch.no_grad():
        experts["blue"].second.weight[1, 2] = value
    with pytest.raises(ValueError, match=f"expert 'blue': 'second.weight' holds {word}"):
        sm.PackedWeights.from_modules(base, experts)


@pytest.mark.parametrize("word", ["NaN", "Inf"])
def test_nan_and_inf_in_heads_and_buffers_are_refused(base, experts, word):
    value = float(word)
    for kind, name in (("weight", "second.weight"), ("buffer", "running_mean")):
        states = {task: {**state(expert), "running_mean": torch.ones(3)} for task, expert in experts.items()}
        states["blue"][name] = torch.full_like(states["blue"][name], value)
        heads = ["second.*"] if kind == "weight" else []
        with pytest.raises(ValueError, match=f"expert 'blue': '{name}' holds {word}"):
            sm.PackedWeights.from_state_dicts({**state(base), "running_mean": torch.zeros(3)}, states, heads=heads)


@pytest.mark.parametrize("form", [torch.float16, "int8"], ids=str)
def test_what_leaves_the_range_of_its_type_is_refused(form):
    """A base of fp32 in fp16, and a difference that only fp32 holds."""
    huge = {"w": torch.tensor([7e4, 1.0])}
    with pytest.raises(ValueError, match="base: 'w' overflows torch.float16; .*float32 or bfloat16"):
        sm.PackedWeights.from_state_dicts(huge, {"a": {"w": torch.ones(2)}}, dtype=torch.float16, task_vector_dtype=form)
    huge["v"] = torch.ones(3)  # and w is unchanged
    with pytest.raises(ValueError, match="base: 'w' overflows torch.float16"):
        sm.PackedWeights.from_state_dicts(huge, {"a": {**huge, "v": torch.zeros(3)}}, dtype=torch.float16, task_vector_dtype=form)
    if form == torch.float16:
        base = {"w": torch.tensor([-65504.0, 1.0], dtype=torch.float16)}
        with pytest.raises(ValueError, match="expert 'a': 'w' minus the base's overflows torch.float16; .*float32 or bfloat16"):
            sm.PackedWeights.from_state_dicts(base, {"a": {"w": -base["w"]}}, dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64], ids=str)
def test_a_weight_in_one_model_that_is_none_in_another_is_refused(base, experts, dtype):
    states = {"base": state(base), **{t: state(e) for t, e in experts.items()}}
    for where in ("base", "red"):
        changed = {**states, where: {**states[where], "second.bias": states[where]["second.bias"].to(dtype)}}
        with pytest.raises(ValueError, match=f"'second.bias' is (torch.float32|{dtype}) in base and .* in expert"):
            sm.PackedWeights.from_state_dicts(changed.pop("base"), changed)


def test_an_integer_checkpoint_is_refused(base, experts):
    states = {t: state(e) for t, e in experts.items()}
    states["red"]["second.weight"] = states["red"]["second.weight"].to(torch.int8)
    with pytest.raises(ValueError, match="expert 'red': 'second.weight' is torch.int8.*dequantise"):
        sm.PackedWeights.from_state_dicts(state(base), states)


def test_two_tasks_of_one_name_are_refused(base, experts):
    with pytest.raises(ValueError, match="two experts are named 'red'"):
        sm.PackedWeights.from_modules(base, [("red", experts["red"]), ("red", experts["blue"])])


@pytest.mark.parametrize("task", ["../../evil", "a/b", "a\0b", "x" * 300, ""])
def test_a_task_that_cannot_name_a_file_is_refused(base, experts, task):
    with pytest.raises(ValueError, match="is not a task name"):
        sm.PackedWeights.from_modules(base, {task: experts["red"]})


def test_no_experts_are_refused(base):
    with pytest.raises(ValueError, match="no experts"):
        sm.PackedWeights.from_modules(base, {})


def test_an_expert_that_equals_the_base_is_refused(base, experts):
    with pytest.raises(ValueError, match="expert 'same' equals base in every tensor"):
        sm.PackedWeights.from_modules(base, {**experts, "same": copy.deepcopy(base)})


def test_untied_copies_that_differ_are_refused(base, experts):
    experts["red"].tied.weight = nn.Parameter(experts["red"].tied.weight + 1)
    with pytest.raises(ValueError, match="'tied.weight' and 'first.weight' are tied in base but differ in expert 'red'"):
        sm.PackedWeights.from_modules(base, experts)


def test_a_heads_pattern_that_fits_nothing_is_refused(base, experts):
    with pytest.raises(ValueError, match=r"heads pattern 'classifer\.\*' fits no tensor of expert 'red'"):
        sm.PackedWeights.from_modules(base, experts, heads=["classifer.*"])


def test_a_dtype_that_cannot_hold_weights_is_refused(base, experts):
    with pytest.raises(ValueError, match="torch.int8 cannot hold packed weights"):
        sm.PackedWeights.from_modules(base, experts, dtype=torch.int8)


def test_coefficients_of_a_wrong_shape_or_not_finite_are_refused(base, experts):
    packed = sm.PackedWeights.from_modules(base, experts)
    with pytest.raises(ValueError, match=r"coefficients of shape \(2,\)"):
        sm.task_arithmetic(packed, [0.1, 0.2])
    with pytest.raises(ValueError, match="NaN or Inf"):
        sm.task_arithmetic(packed, float("nan"))
