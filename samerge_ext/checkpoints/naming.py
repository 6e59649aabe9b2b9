"""One tensor, two names: which tensor of one model is which of another.

Wrappers put a prefix before every name (`module.` of DistributedDataParallel, `_orig_mod.` of torch.compile); old checkpoints
call a norm's weight and bias gamma and beta; a model with a head has its backbone under a name of its own (`bert.`,
`transformer.`, `model.language_model.`), which the backbone saved alone does without.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch

Shapes = Mapping[str, torch.Size]

# Buffers that a model makes from its configuration: newer versions no longer store them, or do not load them.
DERIVED_BUFFERS = re.compile(
    r"(^|\.)(position_ids|inv_freq|original_inv_freq|masked_bias|token_type_ids|bias_mask|causal_mask|attn_mask|attention_mask"
    r"|rotary_emb\.(cos|sin)_cached|relative_position_index|embed_positions\.weights?_buffer)$"
)
CAUSAL_MASK = re.compile(r"(^|\.)(attn|attention|self_attn|crossattention)\.(bias|mask)$")
# What torch.compile, FSDP and activation checkpointing put into the names of the modules that they wrap.
WRAPPERS = re.compile(r"(^|\.)(?:(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+")
MOST_INSERTED = 3  # components of a name that a prefix has at most


def is_derived_buffer(name: str, shape: torch.Size) -> bool:
    """Whether a tensor is a buffer that a model makes for itself: positions, rotary frequencies, causal masks [1, 1, n, n]."""
    if CAUSAL_MASK.search(name):
        return len(shape) in (2, 4) and shape[-1] == shape[-2]
    return DERIVED_BUFFERS.search(name) is not None


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Stored name of each tensor of a model -> its name without wrappers: those of torch.compile, FSDP and activation
    checkpointing wherever they are, `module.` of DistributedDataParallel where all names begin with it."""
    plain = {name: WRAPPERS.sub(r"\1", name) for name in names}
    while plain and all(name.startswith("module.") for name in plain.values()):
        plain = {stored: name.removeprefix("module.") for stored, name in plain.items()}
    count = Counter(plain.values())
    return {stored: name if count[name] == 1 else stored for stored, name in plain.items()}


def correspondence(ours: Shapes, theirs: Shapes, rename: Callable[[str], str] | None = None) -> dict[str, str]:
    """Our name -> their name of the same tensor, for all that are found; each of both at most once.

    Names that agree come first, then those that agree without wrappers, gamma and beta, then those that one side has under a
    prefix, the prefix that fits most tensors of equal shape first. rename: what an architecture calls a stored name.
    """
    found = {name: name for name in ours if name in theirs}
    for simplify in (_plain, *((lambda name: _plain(rename(name)),) if rename else ())):
        left_of_ours, left_of_theirs = _simplified(ours, found.keys(), simplify), _simplified(theirs, found.values(), simplify)
        found.update({left_of_ours[name]: left_of_theirs[name] for name in left_of_ours if name in left_of_theirs})
        left_of_ours, left_of_theirs = _simplified(ours, found.keys(), simplify), _simplified(theirs, found.values(), simplify)
        for pairs in _by_prefix(left_of_ours, left_of_theirs, ours, theirs):
            found.update(pairs)
    return found


def prefix_between(name: str, other: str) -> str:
    """What one of two names of a tensor has that the other lacks: "bert." of "bert.pooler.dense.bias" and "pooler.dense.bias"."""
    long, short = sorted((_plain(name), _plain(other)), key=len, reverse=True)
    return next((f"{'.'.join(parts)}." for rest, (_, parts) in _shortened(long) if rest == short), "")


def _plain(name: str) -> str:
    """A name without wrappers, gamma and beta."""
    name = re.sub(r"^(module\.)+", "", WRAPPERS.sub(r"\1", name))
    return re.sub(
        r"(norm|ln)(_?\w*\.)(gamma|beta)$",
        lambda m: f"{m[1]}{m[2]}{'weight' if m[3] == 'gamma' else 'bias'}",
        name,
        flags=re.IGNORECASE,
    )


def _simplified(names: Iterable[str], found: Iterable[str], simplify: Callable[[str], str]) -> dict[str, str]:
    """Simplified -> stored, of what is not found yet; a name that two tensors would have stays as it is."""
    found = set(found)
    left = [name for name in names if name not in found]
    count = Counter(map(simplify, left))
    return {(simplify(name) if count[simplify(name)] == 1 else name): name for name in left}


def _by_prefix(
    ours: dict[str, str], theirs: dict[str, str], our_shapes: Shapes, their_shapes: Shapes
) -> Iterator[dict[str, str]]:
    """Pairs, stored name -> stored name, of one prefix after the other, until none fits a tensor of equal shape."""
    ours, theirs = dict(ours), dict(theirs)
    while ours and theirs:
        groups: dict[tuple, dict[str, str]] = {}
        for side, (short, long) in enumerate(((ours, theirs), (theirs, ours))):
            for name in long:
                for rest, prefix in _shortened(name):
                    if rest in short:
                        pair = (rest, name) if side == 0 else (name, rest)
                        groups.setdefault((side, *prefix), {})[pair[0]] = pair[1]

        def fitting(pairs: dict[str, str]) -> int:
            return sum(our_shapes[ours[a]] == their_shapes[theirs[b]] for a, b in pairs.items())

        best = max(groups.values(), key=fitting, default={})
        if not fitting(best):
            return
        yield {ours[a]: theirs[b] for a, b in best.items()}
        for a, b in best.items():
            del ours[a], theirs[b]


def _shortened(name: str) -> Iterator[tuple[str, tuple[int, tuple[str, ...]]]]:
    """A name without some components near its beginning, none of which is a number; and which these are, and where."""
    parts = name.split(".")
    for place in range(min(MOST_INSERTED, len(parts) - 1)):
        for count in range(1, min(MOST_INSERTED, len(parts) - place - 1) + 1):
            cut = parts[place : place + count]
            if any(part.isdigit() for part in cut):
                break
            yield ".".join(parts[:place] + parts[place + count :]), (place, tuple(cut))
