"""An expert of other makers among ours: the same backbone fine-tuned to tell which phrases of site reliability engineers mean one
thing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

import samerge_ext as sm
from samerge_ext.demo.cells import accuracies_of
from samerge_ext.demo.corpora import package_file
from samerge_ext.demo.experts import encode, load_folder, text_batches
from samerge_ext.demo.report import FLOOR, Cell
from samerge_ext.demo.workbench import Workbench

GUEST = "sre-embedding-model"
METHODS: dict[str, Callable[..., sm.Result]] = {
    FLOOR: lambda packed, module: sm.task_arithmetic(packed, 0.3, module=module),
    "WUDI": lambda packed, module: sm.wudi(packed, module=module),
}


def guest_study(bench: Workbench, out: Path) -> Iterator[tuple[str, Cell]]:
    """Merges of our experts with and without the guest: accuracy on our tasks, and how far the similarities of phrases on the
    guest's card are ranked as the guest ranks them.

    Raises ValueError on the small variant, whose backbone is another one; MissingData where the guest is not installed.
    """
    if not bench.full:
        raise ValueError("the guest has all six layers of the backbone, as the full variant has; add --full")
    folder = package_file(GUEST, "sre_embedding_model/model_weights/config.json").parent
    guest, phrases = load_folder(folder), phrases_of(folder)
    as_guest = similarities(guest, bench, phrases)

    def cells(label: str, module: nn.Module, accuracies: dict[str, float]) -> Iterator[tuple[str, Cell]]:
        yield "accuracy on test texts, %", Cell(label, bench.seed, accuracies)
        alike = rank_correlation(similarities(module, bench, phrases), as_guest)
        yield "rank correlation of similarities with the guest's, %", Cell(label, bench.seed, {"phrases": alike})

    yield from cells("pretrained", bench.module(), bench.test.accuracies(bench.module()))
    for experts, who in ((bench.experts, "without the guest"), ({**bench.experts, "guest": folder}, "with the guest")):
        packed = sm.PackedWeights.from_folders(bench.base, experts)
        for label, merge in METHODS.items():
            result = merge(packed, bench.module())
            assert result.module is not None
            yield from cells(f"{label}, {who}", result.module, accuracies_of(result, bench.test))
    yield from cells("the guest", guest, bench.test.accuracies(guest))


def phrases_of(folder: Path) -> list[str]:
    """The phrases that the model's card shows, each once."""
    _, metadata, _ = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    shown = yaml.safe_load(metadata)["widget"]
    return list(dict.fromkeys(phrase for group in shown for phrase in (group["source_sentence"], *group["sentences"])))


@torch.inference_mode()
def similarities(module: nn.Module, bench: Workbench, phrases: list[str]) -> Tensor:
    """The cosine of every pair of phrases [n (n − 1) / 2]."""
    (batch,) = text_batches(phrases, bench.protocol, len(phrases))
    features = encode(module, batch)
    first, second = torch.triu_indices(len(phrases), len(phrases), offset=1)
    return (features @ features.T)[first, second]


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's, of numbers [n] without ties."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (first, second)])
    return torch.corrcoef(ranks)[0, 1].item()
