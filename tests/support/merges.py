"""Models in folders with configuration and tokenizer, and merges of them from file to file."""

import torch

from samerge_ext.checkpoints.saving import save_checkpoint
from samerge_ext.elementwise.file_merge import FileMerge
from samerge_ext.elementwise.piecewise import Combination
from samerge_ext.methods.arcee_fusion import ArceeFusion
from samerge_ext.methods.breadcrumbs import Breadcrumbs
from samerge_ext.methods.dare import Dare
from samerge_ext.methods.della import Della
from samerge_ext.methods.distac import shortening
from samerge_ext.methods.nuslerp import NuSlerp
from samerge_ext.methods.ram import Ram
from samerge_ext.methods.sce import Sce
from samerge_ext.methods.ties import Ties
from samerge_ext.methods.wudi import Wudi

TASKS = ("news", "spam")
SHAPES = {"embed": (700, 300), "layers.0.w": (40, 50), "layers.0.b": (50,), "layers.1.w": (40, 50), "scale": ()}


def rules(method, density=0.3):
    elect = Combination([0.7, 0.4], 0.9, normalize=True, elect=True)
    return {
        "arithmetic": lambda name, shape, dtype: Combination([0.7, 0.4]),
        "ties": lambda name, shape, dtype: Ties(shape.numel(), dtype, [density, 0.5], elect),
        "dare": lambda name, shape, dtype: Dare(name, [density, 0.5], 3, Combination([0.7, 0.4])),
        "dare_ties": lambda name, shape, dtype: Dare(name, [density, 0.5], 3, elect),
        "wudi": lambda name, shape, dtype: Wudi(name, shape, 2) if len(shape) > 1 else Combination([1.0, 1.0]),
        "breadcrumbs": lambda name, shape, dtype: Breadcrumbs(shape.numel(), dtype, [density, 0.5], [0.1, 0.2], elect, True),
        "della": lambda name, shape, dtype: Della(name, shape, [density, 0.5], [0.1, 0.2], 3, elect),
        "sce": lambda name, shape, dtype: Sce(shape.numel(), dtype, 2, 0.4),
        "nuslerp": lambda name, shape, dtype: NuSlerp(shape, [0.7, 0.4]),
        "nuslerp of rows": lambda name, shape, dtype: NuSlerp(shape, [0.7, 0.4], "rows"),
        "nuslerp of columns": lambda name, shape, dtype: NuSlerp(shape, [0.7, 0.4], "columns"),
        "fusion": lambda name, shape, dtype: ArceeFusion(shape),  # of the first task
        "ram": lambda name, shape, dtype: Ram(2, 0.05, 0.1),
    }[method]


# Of those, what mergekit has beside task vectors that are added up, trimmed or dropped.
OTHERS = ("breadcrumbs", "della", "sce", "nuslerp", "nuslerp of rows", "nuslerp of columns", "fusion", "ram")


def write(folder, shapes=None, dtype=torch.bfloat16, tasks=TASKS, **files):
    """A base and experts in folders, with configuration and tokenizer."""
    for seed, name in enumerate(("base", *tasks)):

        def tensors(seed=seed):
            for i, (tensor, shape) in enumerate((shapes or SHAPES).items()):
                base = torch.randn(shape, generator=torch.Generator().manual_seed(i))
                change = torch.randn(shape, generator=torch.Generator().manual_seed(100 * seed + i))
                yield tensor, (base + 0.1 * bool(seed) * change).to(dtype)

        extra = {"config.json": '{"model_type": "x", "torch_dtype": "float32"}', "tokenizer.json": "{}"}
        save_checkpoint(folder / name, tensors(), extra_files=extra | files)
    return folder


def merge_of(models, method="ties", align=False, **keys):
    experts = [(task, models / task) for task in TASKS]
    keys |= {"identity": {"method": method, "out_dtype": str(keys.get("out_dtype"))}, "card": "card"}
    return FileMerge(experts, rules(method), models / "base", models / "base", factors_of=shortening if align else None, **keys)
