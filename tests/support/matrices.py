"""Small models of matrices, a kernel and a bias, in fp64, for the methods that merge matrix by matrix."""

import json

import torch
from safetensors.torch import save_file

import samerge_ext as sm
from samerge_ext.checkpoints.adapter_tensors import PREFIX

SHAPES = {"square": (12, 12), "tall": (17, 8), "wide": (6, 13), "kernel": (8, 2, 3, 3), "bias": (7,)}
MATRICES = ("square", "tall", "wide", "kernel")


def models(tasks=3, seed=0, rank=None):
    """Base and experts as state dicts; with a rank, that of every change of a matrix."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)

    def change(shape):
        if rank is None or len(shape) == 1:
            return draw(*shape)
        return (draw(shape[0], rank) @ draw(rank, torch.Size(shape[1:]).numel())).view(shape)

    base = {name: draw(*shape) for name, shape in SHAPES.items()}
    experts = {f"task{t}": {name: base[name] + change(shape) for name, shape in SHAPES.items()} for t in range(tasks)}
    return base, experts


def packed_of(base, experts, dtype=torch.float64, **settings):
    return sm.PackedWeights.from_state_dicts(base, experts, dtype=dtype, **settings)


def task_vectors(base, experts, name):
    """T matrices [m, rest]."""
    return [(expert[name] - base[name]).flatten(1) if base[name].dim() > 1 else expert[name] - base[name]
            for expert in experts.values()]  # fmt: skip


def change_of(result, base, name):
    change = result.state_dict()[name].double() - base[name]
    return change.flatten(1) if change.dim() > 1 else change


def assert_near(found, truth, what, tolerance=1e-11):
    error = (found - truth).norm() / truth.norm()
    assert error <= tolerance, f"{what}: relative error {error:.3e} exceeds {tolerance:.1e}"


WIDTH, RANK = 24, 2


def adapters(folder, tasks=3):
    """A base of two matrices and a bias in fp32, and adapters: one of another rank, one that has nothing of the second matrix
    and a bias of its own."""
    torch.manual_seed(0)
    base = {"first.weight": torch.randn(2 * WIDTH, WIDTH), "second.weight": torch.randn(WIDTH, 2 * WIDTH)}
    base |= {"first.bias": torch.randn(2 * WIDTH), "second.bias": torch.randn(WIDTH)}
    for name in ("base", *(f"task{t}" for t in range(tasks))):
        (folder / name).mkdir()
    save_file(base, folder / "base/model.safetensors")
    for t in range(tasks):
        rank, tensors = RANK + (t == 1), {}
        for name in ("first", "second")[: 1 if t == 2 else 2]:
            out, width = base[f"{name}.weight"].shape
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, width)
            tensors[f"{name}.lora_B.weight"] = 0.1 * torch.randn(out, rank)
        if t == 2:
            tensors["first.bias"] = torch.randn(2 * WIDTH)
        save_file({PREFIX + name: tensor for name, tensor in tensors.items()}, folder / f"task{t}/adapter_model.safetensors")
        settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}
        (folder / f"task{t}/adapter_config.json").write_text(json.dumps(settings))
    experts = {f"task{t}": folder / f"task{t}" for t in range(tasks)}
    return base, sm.PackedWeights.from_folders(folder / "base", experts, task_vector_dtype="lora")


def whole_vectors(packed):
    """name -> T task vectors in fp64, as packed factors give them."""
    rows = [packed.layout.views(row) for row in packed.in_memory().task_vectors]
    return {name: [row[name].double() for row in rows] for name in rows[0]}
