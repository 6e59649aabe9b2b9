import pytest
import tiny
import torch
from helpers import MOMENTS_TOLERANCE_FP32, NARROW, SIGMA_TOLERANCE

import samerge_ext as sm
from samerge_ext.memory import PeakMemory


def pack(shift=0.0, dtype=torch.float32, **options):
    """Layers of one to four dimensions, on both sides of the direct threshold; the last two no expert has changed."""
    shapes = {"matrix": (190, 200), "vector": (33,), "kernel": (8, 3, 4, 4), "number": (), "still": (20, 30), "bias": (7,)}
    generator = torch.Generator().manual_seed(0)
    draw = lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    base = {name: draw(shape) * 0.1 + shift for name, shape in shapes.items()}
    experts = {}
    for task in ("news", "spam"):
        experts[task] = dict(base)
        for name in ("matrix", "vector", "kernel", "number"):
            experts[task][name] = base[name] + 0.02 * draw(shapes[name])
    experts["spam"]["kernel"] = base["kernel"]  # packed, but the task vector is zero
    to = lambda state: {name: value.to(dtype if dtype == torch.float64 else torch.float32) for name, value in state.items()}
    experts = {task: to(state) for task, state in experts.items()}
    return sm.PackedWeights.from_state_dicts(to(base), experts, dtype=dtype, device=torch.get_default_device(), **options)


def truth(packed, of, top_k=3):  # -> [T, L, 3 + top_k] fp64
    out = torch.zeros(packed.num_tasks, packed.layout.num_layers, 3 + top_k, dtype=torch.float64, device="cpu")
    base = packed.layout.views(packed.base.cpu())
    for t, row in enumerate(packed.task_vectors.cpu()):
        views = packed.layout.views(row)
        for l, name in enumerate(packed.layout.names):
            if of == "task_vectors":
                weight = views[name].double() if name in views else out.new_zeros(packed.layout.shapes[l])
            else:
                weight = base[name].double() + views[name].double() if name in views else packed.unchanged[name].cpu().double()
            flat = weight.reshape(weight.shape[0], -1) if weight.dim() > 1 else weight.reshape(1, -1)
            sigma = torch.linalg.svdvals(flat)[:top_k]
            moments = torch.stack([weight.mean(), weight.var(correction=0), weight.norm()])
            out[t, l, :3], out[t, l, 3 : 3 + len(sigma)] = moments, sigma
    return out


def close(packed, of, **options):
    actual, expected = sm.layer_stats(packed, of=of, **options).double().cpu(), truth(packed, of)
    assert actual.shape == expected.shape
    room = expected[..., :3].abs() * MOMENTS_TOLERANCE_FP32
    room[..., 0] += expected[..., 2] * MOMENTS_TOLERANCE_FP32 / 10  # a mean may cancel
    assert ((actual - expected)[..., :3].abs() <= room).all(), (actual - expected)[..., :3].abs() / expected[..., :3]
    small = 1e-7 * expected[..., 3:4]
    assert ((actual - expected)[..., 3:].abs() <= SIGMA_TOLERANCE * expected[..., 3:] + small).all()


@pytest.mark.parametrize("of", ("experts", "task_vectors"))
def test_every_number(each_level, of):
    close(pack(), of)


@pytest.mark.parametrize("of", ("experts", "task_vectors"))
@pytest.mark.parametrize("dtype", (*NARROW, torch.float64), ids=str)
def test_storage(each_backend, of, dtype):
    packed = pack(dtype=dtype)
    assert sm.layer_stats(packed, of=of).dtype == packed.coefficient_dtype
    close(packed, of)
    if dtype != torch.float64:
        close(pack(dtype=torch.float32, task_vector_dtype=dtype), of)


def test_a_mean_far_above_the_deviation(each_level):
    close(pack(shift=1000.0), "experts")


def test_layers_that_nothing_changed(each_backend):
    packed = pack()
    still = [packed.layout.names.index(name) for name in ("still", "bias")]
    assert all(packed.layout.offsets[l] is None for l in still)
    assert not sm.layer_stats(packed, of="task_vectors")[:, still].any()
    assert not sm.layer_stats(packed, of="task_vectors")[1, packed.layout.names.index("kernel")].any()
    assert sm.layer_stats(packed)[:, still, 2].all()


def test_number_of_values(each_backend):
    packed, three = pack(), sm.layer_stats(pack())
    assert torch.equal(sm.layer_stats(packed, top_k=0), three[..., :3])
    assert sm.layer_stats(packed, top_k=5).shape == (2, 6, 8)
    vector = packed.layout.names.index("vector")
    assert torch.equal(three[:, vector, 2], three[:, vector, 3]) and not three[:, vector, 4:].any()


def test_modules(each_backend):
    base = tiny.make(0)
    close(sm.PackedWeights.from_modules(base, tiny.make_experts(base), device=torch.get_default_device()), "experts")


def test_not_finite_names_layer_and_task(each_backend):
    packed = pack()
    packed.layout.views(packed.task_vectors[1])["vector"][3] = torch.inf
    for of in ("experts", "task_vectors"):
        with pytest.raises(ValueError, match=rf"layer 'vector' of spam \({of}\) holds NaN or infinity"):
            sm.layer_stats(packed, of=of)


def test_errors_name_the_argument():
    for message, options in (("of is 'weights'", {"of": "weights"}), ("top_k is -1", {"top_k": -1}), ("rtol 0", {"rtol": 0})):
        with pytest.raises(ValueError, match=message):
            sm.layer_stats(pack(), **options)


def test_no_copy_of_the_weights():
    """Extra memory stays within 64 MiB where one layer alone has that many bytes, and all of them eight times as many."""
    base = {f"layer{l}": torch.randn(16384, 512) * 0.02 for l in range(2)}  # 32 MiB each
    experts = {f"task{t}": {n: w + 0.01 * torch.randn(512) for n, w in base.items()} for t in range(4)}
    packed = sm.PackedWeights.from_state_dicts(base, experts)
    del base, experts
    sm.layer_stats(packed, top_k=0)
    for of in ("experts", "task_vectors"):
        with PeakMemory("cpu") as peak:
            sm.layer_stats(packed, of=of)
        assert peak.rise <= 64 * 2**20, f"{peak.rise / 2**20:.0f} MiB"
