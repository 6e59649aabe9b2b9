"""A base and its experts under one set of names, that of the base: what is mapped, tied, left out, kept per task, or refused."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from samerge_ext.checkpoints import advice
from samerge_ext.checkpoints.architecture import Architecture
from samerge_ext.checkpoints.naming import correspondence, prefix_between
from samerge_ext.checkpoints.sources import Experts, Source, matches


class NamingNote(UserWarning):
    """Says how the tensors of one model were found in another."""


@dataclass(frozen=True)
class Aligned:
    """heads: names of the tensors that belong to a task. kept: name -> the expert that a tensor which the base lacks is from."""

    base: Source
    experts: Experts
    heads: tuple[str, ...]
    kept: dict[str, Source]


def align(
    base: Source,
    experts: Experts,
    heads: Sequence[str] = (),
    keep: Sequence[str] = (),
    folder: str | Path | None = None,
) -> Aligned:
    """The same models with every expert's tensors under the base's names.

    Beyond names that agree: prefixes, wrappers, gamma and beta (`naming.correspondence`); a tensor that is stored in one model
    and tied to another in the next; buffers that a model makes for itself. What was found is said in a `NamingNote`.
    heads: patterns of tensors that belong to a task; those of the base that no expert has stay as they are.
    keep: patterns of tensors that not all models have: the base's, or else the first expert's that has them, stay as they are.
    folder: of the model that is written, whose configuration tells the architecture; None where none is written.

    Raises ValueError for models whose tensors differ, naming the difference and what to do, and for a pattern of heads that
    fits no tensor, or takes out of a written model what it needs.
    """
    heads, keep = tuple(heads), tuple(keep)
    known = _architecture(base, experts, folder)
    renamed: list[tuple[str, Source]] = []
    ties: dict[str, str] = {}
    for task, expert in experts:
        if set(expert.names) == set(base.names):
            renamed.append((task, expert))
            continue
        found = correspondence(_shapes(base), _shapes(expert), known.rename)
        missing = [name for name in base.names if name not in found]
        extra = [name for name in expert.names if name not in found.values()]
        tied = {name: other for name in missing if (other := _tied_to(base, name, found, known))}
        ties.update(tied)
        missing = [name for name in missing if name not in tied]
        inherited = {n for n in missing if known.ignores(n, base.shape(n)) or matches(n, (*heads, *keep))}
        missing = [name for name in missing if name not in inherited]
        theirs = {there: here for here, there in found.items()}
        left = [n for n in extra if not (known.ignores(n, expert.shape(n)) or matches(n, (*heads, *keep)))]
        left = [name for name in left if not _tied_to(expert, name, theirs, known)]
        if missing or left:
            raise ValueError(advice.of_names(base, expert, missing, left))
        _note(base, expert, found)
        if inherited or any(ours != there for ours, there in found.items()):
            own = {name: name for name in extra if matches(name, (*heads, *keep))}
            expert = Renamed(expert, {**found, **own}, base, inherited)
        renamed.append((task, expert))
    if ties:
        once = {name: name for name in base.names if name not in ties}
        base = Renamed(base, once, base, set(), ties)
    return Aligned(base, renamed, _heads(base, renamed, heads, folder), _kept(base, renamed, keep))


def as_in_base(base: Source, expert: Source, folder: str | Path | None) -> Source:
    """One expert's tensors under the base's names, as `align` finds them; what it lacks is the base's."""
    if set(base.names) <= set(expert.names):
        return expert
    found = correspondence(_shapes(base), _shapes(expert), _architecture(base, [("", expert)], folder).rename)
    return Renamed(expert, found, base, set(base.names) - found.keys())


class Renamed(Source):
    """A model under other names.

    stored: name here -> name in ``source``. inherited: names whose tensors are those of ``base``.
    ties: other name of a tensor -> name here, beside those of the source.
    """

    def __init__(
        self, source: Source, stored: dict[str, str], base: Source, inherited: set[str], ties: dict[str, str] | None = None
    ):
        self.label, self.files = source.label, source.files
        self._source, self._base, self._places = source, base, {**stored, **{name: name for name in inherited}}
        self._inherited = frozenset(inherited)
        self.names = tuple(self._places)
        self._stored = frozenset(self._places)
        here = {there: name for name, there in stored.items()}
        self.aliases = {alias: here[name] for alias, name in source.aliases.items() if name in here and alias not in self._stored}
        self.aliases.update(ties or {})

    def is_buffer(self, name: str) -> bool:
        return self._at(name)[0].is_buffer(self._at(name)[1])

    def weight_dtype(self, name: str) -> torch.dtype:
        source, place = self._at(self.aliases.get(name, name))
        return source.weight_dtype(place)

    def _shape(self, name: str) -> torch.Size:
        source, place = self._at(name)
        return source.shape(place)

    def _dtype(self, name: str) -> torch.dtype:
        source, place = self._at(name)
        return source.dtype(place)

    def _read(self, name: str) -> Tensor:
        source, place = self._at(name)
        return source.read(place)

    def _read_into(self, name: str, start: int, out: Tensor) -> None:
        source, place = self._at(name)
        source.read_into(place, start, out)

    def _at(self, name: str) -> tuple[Source, str]:
        return self._base if name in self._inherited else self._source, self._places[name]


def _shapes(source: Source) -> dict[str, torch.Size]:
    return {name: source.shape(name) for name in (*source.names, *source.aliases)}


def _architecture(base: Source, experts: Experts, folder: str | Path | None) -> Architecture:
    """transformers' own tables are read only where names differ: importing it takes longer than many merges."""
    if folder is None or all(set(expert.names) == set(base.names) for _, expert in experts):
        return Architecture()
    return Architecture.of_folder(folder)


def _note(base: Source, expert: Source, found: dict[str, str]) -> None:
    other = {ours: theirs for ours, theirs in found.items() if ours != theirs}
    if other:
        prefixes = sorted({prefix for ours, theirs in other.items() if (prefix := prefix_between(ours, theirs))})
        by = f" (prefix {', '.join(map(repr, prefixes))})" if prefixes else ""
        ours, theirs = next(iter(other.items()))
        text = f"{expert.label}: {len(other)} tensors have other names than in {base.label}{by}: '{theirs}' is '{ours}'"
        warnings.warn(text, NamingNote, stacklevel=4)


def _tied_to(source: Source, name: str, found: dict[str, str], known: Architecture) -> str | None:
    """The tensor, one that both models have, that ``name`` is another name of, and which only one of them stores twice."""
    if not known.ties or not advice.TIED.search(name):
        return None
    if name in source.aliases:
        return source.aliases[name] if source.aliases[name] in found else None
    kind = source.shape(name), source.dtype(name)
    alike = (other for other in found if (source.shape(other), source.dtype(other)) == kind)
    candidates = (other for other in alike if advice.may_be_tied(name, other))
    return next((other for other in candidates if torch.equal(source.read(other), source.read(name))), None)


def _kept(base: Source, experts: Experts, keep: tuple[str, ...]) -> dict[str, Source]:
    """The tensors that no merge changes: those of the base that no expert has, and of experts where the base has none."""
    kept = {name: base for name in base.names if experts and all(_inherits(expert, name) for _, expert in experts)}
    for _, expert in experts:
        kept.update({n: expert for n in expert.names if matches(n, keep) and n not in base and n not in kept})
    return kept


def _heads(base: Source, experts: Experts, patterns: Sequence[str], folder: str | Path | None) -> tuple[str, ...]:
    """The names of the tensors that belong to a task: those that fit a pattern in an expert that has its own."""
    own = [
        [name for name in expert.names if matches(name, tuple(patterns)) and not _inherits(expert, name)] for _, expert in experts
    ]
    for pattern in patterns:
        for _, expert in experts:
            if not any(matches(name, (pattern,)) for name in (*expert.names, *expert.aliases, *base.names, *base.aliases)):
                last = advice.some(expert.names[-3:])
                raise ValueError(f"heads pattern '{pattern}' fits no tensor of {expert.label}, whose last tensors are {last}")
    if folder is not None:
        for name in own[0] if own else ():
            everywhere = name in base and all(name in e and e.shape(name) == base.shape(name) for _, e in experts)
            if everywhere and advice.is_backbone(name):
                pattern = next(p for p in patterns if matches(name, (p,)))
                raise ValueError(
                    f"heads pattern '{pattern}' takes '{name}' out of the merged model, which needs it, and all experts have it: "
                    "name the tasks' last modules alone, and leave this pattern out"
                )
    return tuple(dict.fromkeys(name for names in own for name in names))


def _inherits(source: Source, name: str) -> bool:
    return isinstance(source, Renamed) and name in source._inherited
