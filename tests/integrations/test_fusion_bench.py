"""Our wrappers against plain autograd; FusionBench is not needed."""

import copy
import gc
import weakref

import pytest
import torch
from helpers import PATH_TOLERANCE, assert_alike, assert_close
from merged_by_autograd import Literal, names_of, problem, weights
from safetensors.torch import load_file, save_model
from tiny import TASKS, make_batches, make_heads
from torch import nn
from torch.func import functional_call

import samerge_ext as sm
from samerge_ext.integrations.fusion_bench import LayerWiseMergedModel, TaskWiseMergedModel

T = len(TASKS)


def layer_wise(dtype=torch.float64, literal=None, **options):
    """Our model and the literal one at the same weights."""
    base, experts = problem(dtype)
    start = weights(T, len(names_of(base)), **({"low": -0.5, "high": 1.5} if options.get("clamp_weights", True) else {}))
    truth = Literal(start, base, experts, **(literal or {"coefficients": lambda w: w.clamp(0, 1)}))
    return LayerWiseMergedModel(start.clone(), base, experts, tie_weights=True, strict=False, **options), truth


def losses(model, batches, heads):
    return [(model(batches[task][0]) @ heads[task]).square().mean() for task in TASKS]


def assert_same_gradient(ours, truth):
    """After several forwards, of which each then goes backward by itself."""
    for model in (ours, truth):
        for loss in losses(model, make_batches(), make_heads()):
            loss.backward(retain_graph=True)
    assert_alike(ours.merge_weight.grad, truth.learned.grad, "the gradient by merge_weight")


def softmax_after_clamp(w):
    return w.clamp(0, 1).softmax(0)


def without_smallest_half(task_vector):
    if task_vector.dim() == 2:
        for row in task_vector:
            row[row.abs().argsort(stable=True)[: len(row) // 2]] = 0
    return task_vector


@pytest.mark.parametrize(
    "options, literal",
    [
        ({}, None),
        ({"clamp_weights": False}, {}),
        ({"normalized_merging_weights": True}, {"coefficients": softmax_after_clamp}),
        ({"clamp_weights": False, "sparsity_ratio": 0.5}, {"change": without_smallest_half}),
    ],
    ids=["clamped", "as they are", "normalised", "sparse"],
)
def test_layer_wise_gradient_is_that_of_plain_autograd(options, literal):
    ours, truth = layer_wise(literal=literal, **options)
    merged, expected = ours.merge_weights(), truth.merge()
    for name in truth.names:
        assert_close(merged[name], expected[name], name)
    assert_same_gradient(ours, truth)


def test_task_wise_gradient_is_that_of_plain_autograd():
    base, experts = problem()
    start, layers = weights(T, low=-0.5, high=1.5), len(names_of(base))
    truth = Literal(start, base, experts, lambda w: w.clamp(0, 1)[:, None].expand(T, layers))
    ours = TaskWiseMergedModel(start.clone(), base, experts, tie_weights=True, strict=False)
    ours.merge_weights()
    truth.merge()
    assert_same_gradient(ours, truth)


def test_masks_multiply_task_vectors_and_get_gradients():
    ours, truth = layer_wise(clamp_weights=False, literal={})
    masks = []
    for model in (ours, truth):
        generator = torch.Generator().manual_seed(5)
        shapes = {name: dict(truth.base.named_parameters())[name].shape for name in truth.names}
        mask = {n: torch.rand(s, generator=generator, dtype=torch.float64, requires_grad=True) for n, s in shapes.items()}
        (model.merge_weights if model is ours else model.merge)(mask)
        masks.append(mask)
    assert_same_gradient(ours, truth)
    for name in truth.names:
        assert_alike(masks[0][name].grad, masks[1][name].grad, f"the gradient by the mask of {name}")
    with pytest.raises(ValueError, match="nothing for 'norm.bias'"):
        ours.merge_weights({name: m for name, m in masks[0].items() if name != "norm.bias"})


def test_a_loop_of_steps_learns_the_same_weights():
    """FusionBench's loop: every task's backward keeps the graph, then a step, then the next merge."""
    ours, truth = layer_wise(clamp_weights=False, literal={})
    batches, heads, learned = make_batches(), make_heads(), {ours: ours.merge_weight, truth: truth.learned}
    for model, parameter in learned.items():
        optimizer = torch.optim.Adam([parameter], lr=1e-2)
        merge = model.merge_weights if model is ours else model.merge
        merge()
        for step in range(10):
            for task in TASKS:
                logits = model(batches[task][step % 3]) @ heads[task]
                loss = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
                loss.backward(retain_graph=True)
            optimizer.step()
            optimizer.zero_grad()
            merge()
    assert (learned[ours] - learned[truth]).norm() <= PATH_TOLERANCE[torch.float64] * learned[truth].norm()
    assert (learned[ours] - weights(*learned[ours].shape)).abs().min() > 0  # all were learned


def test_the_published_samerging_loop_learns_what_samerging_does_in_its_published_way():
    """As the published code is described: two backward loops on the weights merged before the step, so that the perturbation
    changes nothing, through KL of softmax().log()."""
    base, experts = problem()
    for buffer, *others in zip(base.buffers(), *(expert.buffers() for expert in experts), strict=True):
        for other in others:  # FusionBench keeps the base's BatchNorm statistics, and we average the experts'
            other.copy_(buffer)
    packed = sm.PackedWeights.from_modules(base, dict(zip(TASKS, experts)), dtype=torch.float64)
    module, teachers, layers, names = copy.deepcopy(base), copy.deepcopy(experts), len(names_of(base)), names_of(base)
    ours = LayerWiseMergedModel(torch.full((T, layers), 0.3, dtype=torch.float64), base, experts, False, True, False)
    batches, heads, optimizer = make_batches(), make_heads(), torch.optim.Adam([ours.merge_weight], 1e-3, weight_decay=5e-4)

    def gradient(step):
        ours.merge_weight.grad = None
        for task, teacher in zip(TASKS, teachers):
            batch = batches[task][step % 3]
            p, q = (torch.softmax(model(batch) @ heads[task] / 2.0, -1) for model in (teacher, ours))
            (p.detach() * (p.detach().log() - q.log())).sum(-1).mean().backward(retain_graph=True)
        return ours.merge_weight.grad

    ours.merge_weights()
    for step in range(4):
        first = gradient(step)
        with torch.no_grad():
            ours.merge_weight.add_(epsilon := 0.07 * first / first.norm())
        assert torch.equal(gradient(step), first)
        with torch.no_grad():
            ours.merge_weight.sub_(epsilon)
        optimizer.step()
        ours.merge_weights()
    config = sm.SAMergingConfig(sam="published", steps=4, learning_rate=1e-3, progress=False)
    result = sm.samerging(module, packed, batches, lambda module, batch, task: module(batch) @ heads[task], config=config)
    expected = result.coefficients[:, [packed.layout.names.index(name) for name in names]]
    assert (ours.merge_weight - expected).norm() <= PATH_TOLERANCE[torch.float64] * expected.norm()


def test_gradients_of_gradients_and_of_chosen_inputs():
    ours, truth = layer_wise(clamp_weights=False, literal={})
    ours.merge_weights()
    truth.merge()
    found = []
    for model, parameter in ((ours, ours.merge_weight), (truth, truth.learned)):
        loss = sum(losses(model, make_batches(), make_heads()))
        (first,) = torch.autograd.grad(loss, [parameter], create_graph=True)
        first.square().sum().backward()
        found.append((first, parameter.grad))
    for ours_, truth_, what in zip(*found, ("first", "second")):
        assert_alike(ours_, truth_, f"the {what} gradient")


def test_a_graph_outlives_the_next_merge():
    ours, truth = layer_wise(clamp_weights=False, literal={})
    before = ours.merge_weights()
    kept = {name: tensor.clone() for name, tensor in before.items()}
    truth.merge()
    graphs = [sum(losses(model, make_batches(), make_heads())) for model in (ours, truth)]
    with torch.no_grad():
        ours.merge_weight.add_(1.0)
    after = ours.merge_weights()
    for loss in graphs:
        loss.backward()
    assert_alike(ours.merge_weight.grad, truth.learned.grad, "the gradient by the earlier merge")
    assert all(torch.equal(before[name], kept[name]) for name in kept)
    assert not torch.equal(after["first.weight"], before["first.weight"])


def test_a_graph_holds_neither_the_weights_that_were_merged_nor_itself():
    ours, truth = layer_wise(clamp_weights=False, literal={})
    storage = torch.multiprocessing.reductions.StorageWeakRef(ours.merge_weights()["first.weight"].untyped_storage())
    truth.merge()
    kept, outputs = sum(losses(ours, make_batches(), make_heads())), []
    ours.pretrained_model.norm.register_forward_hook(lambda module, inputs, out: outputs.append(weakref.ref(out)) and None)
    passing = sum(losses(ours, make_batches(), make_heads()))
    gc.disable()
    try:
        ours.merge_weights()
        assert storage.expired()  # although two losses are at hand
        del passing
        assert outputs and all(output() is None for output in outputs)
    finally:
        gc.enable()
    kept.backward()
    sum(losses(truth, make_batches(), make_heads())).backward()
    assert_alike(ours.merge_weight.grad, truth.learned.grad, "the gradient by weights that are made again")


def test_weights_are_not_made_again_of_a_base_that_was_changed():
    ours, _ = layer_wise()
    ours.merge_weights()
    loss = sum(losses(ours, make_batches(), make_heads()))
    ours.merge_and_unload()
    with pytest.raises(RuntimeError, match="of the base was changed in place since this forward pass"):
        loss.backward()


def test_activations_that_were_changed_are_refused():
    ours, _ = layer_wise()
    seen = []
    ours.pretrained_model.norm.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0]) and None)
    loss = losses(ours, make_batches(), make_heads())[0]
    seen[0].detach().zero_()
    with pytest.raises(RuntimeError, match="was changed in place before its backward"):
        loss.backward()


def test_the_gradient_of_a_layer_is_contracted_before_the_backward_goes_on():
    """Otherwise autograd keeps the gradients of all layers at once: a model's worth."""
    ours, _ = layer_wise()
    merged, order = ours.merge_weights(), []
    merged["second.weight"].register_hook(lambda gradient: order.append("gradient of second"))
    ours.pretrained_model.norm.register_forward_hook(
        lambda module, inputs, out: out.register_hook(lambda gradient: order.append("backward of norm")) and None
    )
    losses(ours, make_batches(), make_heads())[0].backward()
    assert order == ["gradient of second", "backward of norm"]


def test_experts_become_task_vectors_in_one_buffer():
    base, experts = problem()
    layers, originals, mine = names_of(base), copy.deepcopy(experts), experts[0].second.weight.data
    expected = mine.clone()
    ours = LayerWiseMergedModel(weights(T, len(layers)), base, experts)
    for task_vector, original, expert in zip(ours.task_vectors, originals, experts, strict=True):
        assert task_vector is expert and not hasattr(expert.frozen, "weight")
        differences = dict(task_vector.named_parameters())
        assert list(differences) == layers
        for name in layers:
            assert torch.equal(differences[name], original.get_parameter(name) - base.get_parameter(name))
    assert len({p.untyped_storage().data_ptr() for p in ours.task_vectors.parameters()}) == 1
    assert torch.equal(mine, expected)  # what the caller held stays as it was
    assert [name for name, p in ours.named_parameters() if p.requires_grad] == ["merge_weight"]


def test_the_forward_merges_where_nothing_is_merged():
    ours, truth = layer_wise()
    truth.merge()
    batch = make_batches()["red"][0]
    assert_alike(ours(batch), truth(batch), "the first forward")
    assert_alike(ours.forward_model(args=(batch,)), truth(batch), "forward_model")


@pytest.mark.parametrize("into_copy", [False, True])
def test_merge_and_unload_returns_an_ordinary_model(into_copy, tmp_path):
    ours, truth = layer_wise()
    expected, statistics = truth.merge(), ours.pretrained_model.norm.running_mean.clone()
    pretrained = copy.deepcopy(ours.pretrained_model)
    model = ours.merge_and_unload(copy=into_copy)
    assert (model is ours.pretrained_model) != into_copy
    for name in truth.names:
        assert_close(model.get_parameter(name), expected[name], name)
    assert torch.equal(model.frozen.weight, pretrained.frozen.weight) and torch.equal(model.norm.running_mean, statistics)
    if into_copy:
        assert torch.equal(ours.pretrained_model.first.weight, pretrained.first.weight)
    save_model(model, str(tmp_path / "model.safetensors"))  # which refuses views of a larger buffer
    assert torch.equal(load_file(tmp_path / "model.safetensors")["second.weight"], model.second.weight)


def test_tied_parameters_are_merged_as_one_where_asked_and_as_in_fusion_bench_otherwise():
    batch = make_batches()["red"][0]
    base, experts = problem()
    ours = LayerWiseMergedModel(weights(T, len(names_of(base))), base, experts)
    merged = ours.merge_weights()
    expected = functional_call(copy.deepcopy(base), {n: t.detach() for n, t in merged.items()}, batch, tie_weights=False)
    assert torch.equal(ours(batch), expected) and merged["tied.weight"] is base.tied.weight
    ours.tie_weights = True
    merged = ours.merge_weights()
    assert merged["tied.weight"] is merged["first.weight"] and not torch.equal(ours(batch), expected)
    expected = ours(batch)
    model = ours.merge_and_unload()
    assert model.tied.weight is model.first.weight and torch.equal(model(batch), expected)


def test_training_mode_reaches_the_models():
    ours, truth = layer_wise()
    ours.merge_weights()
    truth.merge()
    ours.train()
    truth.base.train()
    batch = make_batches()["red"][0]
    assert_alike(ours(batch), truth(batch), "a forward in training mode")
    assert_close(ours.pretrained_model.norm.running_mean, truth.base.norm.running_mean, "the running mean")


@torch.no_grad()  # a copy can be made of no tensor that has a graph
def test_models_that_are_moved_or_changed_are_merged_as_they_are_then():
    ours, _ = layer_wise(clamp_weights=False)
    parent = nn.ModuleDict({"layer": ours}).float()
    assert len({p.untyped_storage().data_ptr() for p in ours.task_vectors.parameters()}) == 1  # moved as one
    assert ours.merge_weights()["second.weight"].dtype == torch.float32
    parent.double()
    for task_vector in ours.task_vectors:
        task_vector.second.weight.data = torch.zeros_like(task_vector.second.weight)  # no longer in the buffer
        task_vector.norm.weight.data.zero_()  # within it
    other = copy.deepcopy(ours)
    for model in (ours, other):
        merged = model.merge_weights()
        for name in ("second.weight", "norm.weight"):
            assert torch.equal(merged[name], model.pretrained_model.get_parameter(name))
        assert not torch.equal(merged["first.weight"], model.pretrained_model.first.weight)
    other.task_vectors[0] = copy.deepcopy(other.task_vectors[0])
    other.task_vectors[0].second.weight.data.fill_(1.0)
    assert not torch.equal(other.merge_weights()["second.weight"], ours.merge_weights()["second.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_types_sum_wide(dtype):
    base, experts = problem(dtype)
    wide, wide_experts = copy.deepcopy(base).double(), [copy.deepcopy(expert) for expert in experts]
    for expert in wide_experts:
        for name in names_of(base):  # what is kept of an expert, in its own type
            expert.get_parameter(name).data = (expert.get_parameter(name) - base.get_parameter(name)).detach()
        expert.double()
        for name in names_of(base):
            expert.get_parameter(name).data += wide.get_parameter(name).data
    start = weights(T, len(names_of(base))).to(dtype)
    truth = Literal(start.double(), wide, wide_experts)
    merged, expected = LayerWiseMergedModel(start, base, experts, clamp_weights=False).merge_weights(), truth.merge()
    for name in truth.names:
        assert merged[name].dtype == dtype
        assert_close(merged[name], expected[name], name)


def test_task_vectors_may_be_narrower_than_the_models():
    base, experts = problem(torch.float32)
    full = TaskWiseMergedModel(torch.full((T,), 0.3), *copy.deepcopy((base, experts))).merge_weights()
    ours = TaskWiseMergedModel(torch.full((T,), 0.3), base, experts, task_vector_dtype=torch.bfloat16)
    assert {p.dtype for p in ours.task_vectors.parameters()} == {torch.bfloat16}
    merged = ours.merge_weights()
    assert_close(merged["second.weight"].bfloat16(), full["second.weight"].bfloat16(), "second.weight")
    assert merged["second.weight"].dtype == torch.float32 and not torch.equal(merged["second.weight"], full["second.weight"])


def test_the_buffer_goes_with_the_wrapper():
    ours, _ = layer_wise()
    model, task_vector = ours.merge_and_unload(), ours.task_vectors[0].second.weight
    storage = torch.multiprocessing.reductions.StorageWeakRef(task_vector.untyped_storage())
    del ours, task_vector
    gc.collect()
    assert storage.expired() and model.second.weight.isfinite().all()
