"""Which cases run: on each device, and for each size of a run (full, quick, tiny)."""

from __future__ import annotations

import torch
from inputs import Logits, Packed

from samerge_ext.packing.quantised import FORMATS

DTYPES = (torch.float32, torch.bfloat16)
MODELS_AT_T8 = ("MiniLM", "ViT-B/32", "Llama-7B layer", "ViT-L/14")  # there the layer map is the question, not T
QUANTISED = ("tiny", "MiniLM", "88M", "1B")  # where the question is what fewer bytes bring
SHAPES = ((4096, 2), (128, 100), (4096, 1000), (256, 128256), (4096, 32000))


def packed_cases(device: str, size: str) -> list[Packed]:
    if size == "tiny":
        return [Packed("tiny", 3, dtype) for dtype in DTYPES]
    if size == "quick":
        return [Packed("MiniLM", 8, torch.float32), Packed("MiniLM", 8, torch.bfloat16), Packed("ViT-B/32", 2, torch.float32)]
    numbers = (8, 20) if device == "cuda" else (2, 8, 20)
    cases = [Packed("88M", tasks, dtype) for dtype in DTYPES for tasks in numbers]
    cases += [Packed(model, 8, dtype) for model in MODELS_AT_T8 for dtype in DTYPES]
    return cases + [Packed("1B", tasks, torch.bfloat16) for tasks in (8, 20)] if device == "cuda" else cases


def logits_cases(device: str, size: str) -> list[Logits]:
    if size == "tiny":
        return [Logits(7, 30, dtype, gradient) for dtype in DTYPES for gradient in (False, True)]
    if size == "quick":
        return [Logits(4096, 1000, dtype, True) for dtype in DTYPES] + [Logits(128, 100, torch.float32, True)]
    cases = [Logits(*shape, dtype, gradient) for shape in SHAPES for dtype in DTYPES for gradient in (False, True)]
    huge = [Logits(8192, 128256, torch.bfloat16, gradient) for gradient in (False, True)]
    return cases + huge if device == "cuda" else cases


def takes_part(candidate: str, case: object) -> bool:
    """torch.compile only where its code differs, since compiling takes half a minute a case; out= where there is a gradient."""
    if candidate == "samerge, out=":
        return case.gradient
    if candidate.split()[-1] in FORMATS:
        return case.model in QUANTISED
    if candidate != "torch.compile":
        return True
    if isinstance(case, Packed):
        return case.model == "88M"
    return isinstance(case, Logits) and case.gradient and case.rows * case.classes > 10**8
