"""Small models of matrices, a kernel and a bias, in fp64, for the methods that merge matrix by matrix."""

import torch

import samerge_ext as sm

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
