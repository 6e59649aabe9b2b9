"""What to do where two models do not have the same tensors: advice for each kind of difference."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from samerge_ext.checkpoints.coded import QUANTISED
from samerge_ext.checkpoints.sources import Source

SCALES = re.compile(r"\.(scales|biases|zeros|zero_point)$")  # of codes that are called as weights are: MLX
HEADS = re.compile(r"(^|_)(heads?|classifiers?|classification|score|cls|predictions?|logits?|fc|proj|out|output|pooler)\d*$")
EMBEDDINGS = re.compile(r"embed|(^|\.)(wte|wpe|shared|cls_token|word_embeddings)(\.|$)")
NORMS = re.compile(r"norm|(^|\.)ln_?\w*(\.|$)", re.IGNORECASE)
STACK = re.compile(r"(^|\.)\d+\.")
FUSED, SPLIT = re.compile(r"experts\.\w+_proj(_bias)?$"), re.compile(r"experts\.\d+\.")  # experts of a mixture
TIED = re.compile(r"embed|lm_head|shared|wte|embed_out|cls\.|decoder\.(weight|bias)$|predictions|generator|output\.weight$")


def some(names: Iterable[str]) -> str:
    """The first of the names, quoted, and how many more there are."""
    names = list(names)
    listed = ", ".join(f"'{name}'" for name in names[:4])
    return listed + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def is_backbone(name: str) -> bool:
    """Whether a tensor belongs to what all tasks share: a block of a stack, embeddings or a norm, outside of a last module."""
    first = name.split(".")[0]
    if HEADS.search(first):
        return False
    return bool(STACK.search(name) or EMBEDDINGS.search(name) or NORMS.search(name))


def may_be_tied(name: str, other: str) -> bool:
    """Embeddings and heads, and a head's bias to that of its own decoder; equal biases or norms may just be untrained."""
    if name.endswith("weight"):
        return bool(TIED.search(other)) and not (NORMS.search(name) or NORMS.search(other))
    inner, outer = sorted((name.rpartition(".")[0], other.rpartition(".")[0]), key=len, reverse=True)
    return name.endswith("bias") and other.endswith("bias") and inner.rpartition(".")[0] == outer


def heads_advice(names: Sequence[str], others: Iterable[str] = ()) -> str:
    """How to keep tensors per task, for those that a task can have of its own; empty where one of them is the backbone's.

    others: the models' further tensors, which no pattern takes along.
    """
    if not names or any(is_backbone(name) for name in names):
        return ""
    shared = set(others) - set(names)
    patterns = dict.fromkeys(_pattern(name, shared) for name in names)
    return f"If these belong to the task, keep them per task with heads={list(patterns)}."


def _pattern(name: str, shared: Iterable[str]) -> str:
    """Of the largest module around a tensor that has none of the shared ones; of the tensor alone where there is no such."""
    parts = name.split(".")
    modules = (f"{'.'.join(parts[:depth])}." for depth in range(1, len(parts)))
    return next((f"{module}*" for module in modules if not any(other.startswith(module) for other in shared)), name)


def of_names(base: Source, expert: Source, missing: Sequence[str], extra: Sequence[str]) -> str:
    """The message for tensors that only one of two models has."""
    lacks = f"lacks {base.label}'s {some(missing)}" if missing else ""
    has = f"has, and {base.label} lacks, {some(extra)}" if extra else ""
    return f"{expert.label} {'; and '.join(filter(None, (lacks, has)))}. {_what_to_do(base, expert, missing, extra)}".rstrip()


def _what_to_do(base: Source, expert: Source, missing: Sequence[str], extra: Sequence[str]) -> str:
    for source, names in ((base, missing), (expert, extra)):
        if any(QUANTISED.search(name) or SCALES.search(name) for name in names):
            return f"{source.label} is quantised: dequantise it first, and merge the dequantised model."
    if not missing and extra and all(TIED.search(name) for name in extra) and (tied := _embedding(base, expert, extra[0])):
        return (
            f"{expert.label} is untied: its '{extra[0]}' differs from its '{tied}', and {base.label} ties them. "
            "Merge it with experts of an untied base, or untie the base (store its embeddings under both names)."
        )
    if not extra and missing and all(TIED.search(name) for name in missing) and (tied := _embedding(expert, base, missing[0])):
        return (
            f"{base.label} is untied: its '{missing[0]}' differs from its '{tied}', and {expert.label} ties them, as one tensor. "
            "Untie the expert: store its embeddings under both names."
        )
    for fused, names, others in ((base, missing, extra), (expert, extra, missing)):
        if any(FUSED.search(name) for name in names) and any(SPLIT.search(name) for name in others):
            return (
                f"{fused.label} stores all experts of a mixture as one tensor, the other model one by one: load it with "
                "transformers' from_pretrained, save it with save_pretrained, which stores them one by one, and merge that."
            )
    if advice := heads_advice([*missing, *extra], (*base.names, *expert.names)):
        return advice
    only = sorted({name.split(".")[0] for name in extra} - {name.split(".")[0] for name in base.names})
    if extra and not missing and only and all(name.split(".")[0] in only for name in extra):
        return f"A part that only {expert.label} has cannot be merged; keep it, from file to file, with keep={_parts(extra)}."
    if missing and not extra and all(name.split(".")[0] not in {n.split(".")[0] for n in expert.names} for name in missing):
        return f"A part that only {base.label} has cannot be merged; keep the base's with keep={_parts(missing)}."
    ours, theirs = _layers(base.names), _layers(expert.names)
    if ours != theirs:
        return f"{base.label} has {ours} layers, {expert.label} has {theirs}: only models of one size merge."
    return "They are not models of one architecture; check both paths, and that no prefix or renaming of a conversion is left."


def _parts(names: Iterable[str]) -> list[str]:
    """Patterns of the parts of a model that tensors are in."""
    return sorted({f"{name.split('.')[0]}.*" if "." in name else name for name in names})


def _embedding(tied: Source, untied: Source, name: str) -> str | None:
    """The tensor that ``name`` would be tied to: an embedding that both models have, of its shape."""
    shape = untied.shape(name)
    names = (n for n in tied.names if n in untied and n != name and EMBEDDINGS.search(n) and may_be_tied(name, n))
    return next((n for n in names if untied.shape(n) == shape), None)


def _layers(names: Iterable[str]) -> int:
    """How many layers the longest stack has."""
    numbers = [int(found[1]) for name in names if (found := re.search(r"(?:^|\.)(\d+)\.", name))]
    return max(numbers, default=-1) + 1
