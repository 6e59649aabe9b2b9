"""Three tiny models, and mergekit's recipes for them."""

import warnings

import torch
import yaml
from folders import read_all
from safetensors.torch import save_file

from samerge_ext.recipes.recipe import load_recipe
from samerge_ext.recipes.run import run_recipe

SHAPES = {"embed.weight": (6, 4), "layers.0.mlp.weight": (4, 4), "layers.1.mlp.weight": (4, 4), "norm.bias": (4,)}


def write_models(folder):
    """The folders base, a and b, with a configuration."""
    for seed, name in enumerate(("base", "a", "b")):
        generator = torch.Generator().manual_seed(seed)
        (folder / name).mkdir()
        tensors = {name: torch.randn(shape, generator=generator, dtype=torch.float32) for name, shape in SHAPES.items()}
        save_file(tensors, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text('{"dtype": "float32"}')
    return folder


def recipe(method="task_arithmetic", models=("a", "b"), **keys):
    entries = [{"model": m, "parameters": {"weight": 0.5}} if isinstance(m, str) else m for m in models]
    return {"merge_method": method, "base_model": "base", "models": entries, **keys}


def load(root, content):
    path = root / "recipe.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return load_recipe(path, {})


def merged(root, content, out="out"):
    run_recipe(load(root, content), root / out, overwrite=True)
    return read_all(root / out)


def same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def told(work):
    """What a function returns, and the warnings it gives."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = work()
    return result, "\n".join(str(warning.message) for warning in said)
