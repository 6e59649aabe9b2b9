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
from samerge_ext.checkpoints.naming import correspondence, is_derived_buffer, prefix_between
from samerge_ext.checkpoints.sources import Experts, Source, matches


class NamingNote(UserWarning):
    """Says how the tensors of one model were found in another."""


@dataclass(frozen=True)
class Aligned:
    """heads: names of the tensors that belong to a task. kept: name -> the model that a tensor which is not merged is from.
    host: the task whose expert has tensors that are kept and that the base lacks, so that its configuration describes the merged
    model; None where there is none."""

    base: Source
    experts: Experts
    heads: tuple[str, ...]
    kept: dict[str, Source]
    host: str | None = None


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
    fits no tensor, or takes out of a written model what it needs, for one of keep that keeps nothing, and where tensors of two
    experts would be kept.
    """
    heads, keep = tuple(heads), tuple(keep)
    known = _architecture(base, experts, folder)
    views = [_view(base, expert, heads, keep, known) for _, expert in experts]
    for (_, expert), view in zip(experts, views, strict=True):
        _note(base, expert, view.found)
    never_merged = {name for view in views for name in view.inherited if matches(name, keep)}
    ties = {name: other for view in views for name, other in view.ties.items()}
    renamed = [(task, view.of(expert, base, never_merged)) for (task, expert), view in zip(experts, views, strict=True)]
    if ties:
        base = Renamed(base, {name: name for name in base.names if name not in ties}, base, set(), ties)
    kept = _kept(base, renamed, keep)
    return Aligned(base, renamed, _heads(base, renamed, heads, folder), kept, _host(renamed, kept))


@dataclass(frozen=True)
class _View:
    """How one expert's tensors are the base's. found: name in the base -> name in the expert; own: as found, of tensors that the
    base lacks. inherited: names of those that the expert lacks and takes from the base. ties: tensor of the base that the expert
    has as another one -> that one."""

    found: dict[str, str]
    own: dict[str, str]
    inherited: set[str]
    ties: dict[str, str]

    def of(self, expert: Source, base: Source, never_merged: set[str]) -> Source:
        """The expert under the base's names; the base's tensors in place of those that are never merged."""
        inherited = self.inherited | (never_merged & self.found.keys())
        if not inherited and all(ours == theirs for ours, theirs in self.found.items()):
            return expert
        stored = {ours: theirs for ours, theirs in self.found.items() if ours not in inherited}
        return Renamed(expert, {**stored, **self.own}, base, inherited)


def _view(base: Source, expert: Source, heads: tuple[str, ...], keep: tuple[str, ...], known: Architecture) -> _View:
    """Raises ValueError where tensors are left that only one of the two has."""
    if set(expert.names) == set(base.names):
        return _View({name: name for name in base.names}, {}, set(), {})
    found = correspondence(_shapes(base), _shapes(expert), known.rename)
    missing = [name for name in base.names if name not in found]
    extra = [name for name in expert.names if name not in found.values()]
    ties = {name: other for name in missing if (other := _tied_to(base, name, found, known))}
    missing = [name for name in missing if name not in ties]
    inherited = {n for n in missing if known.ignores(n, base.shape(n)) or matches(n, (*heads, *keep))}
    missing = [name for name in missing if name not in inherited]
    theirs = {there: here for here, there in found.items()}
    left = [n for n in extra if not (known.ignores(n, expert.shape(n)) or matches(n, (*heads, *keep)))]
    left = [name for name in left if not _tied_to(expert, name, theirs, known)]
    if missing or left:
        raise ValueError(advice.of_names(base, expert, missing, left))
    own = {n: n for n in extra if matches(n, heads) or (matches(n, keep) and not known.ignores(n, expert.shape(n)))}
    return _View(found, own, inherited, ties)


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

    def stored_name(self, name: str) -> str:
        source, place = self._at(self.aliases.get(name, name))
        return name if source is self._base else source.stored_name(place)

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
        own = [name for name in expert.names if matches(name, keep) and name not in base and name not in kept]
        kept.update({name: expert for name in own if not is_derived_buffer(name, expert.shape(name))})
    for pattern in keep:
        if not any(matches(name, (pattern,)) for name in kept):
            merged = next((name for name in base.names if matches(name, (pattern,))), None)
            why = f"all models have '{merged}', so that it is merged" if merged else "it fits no tensor of any model"
            raise ValueError(f"keep pattern '{pattern}' keeps nothing: {why}; leave it out, or mend it")
    return kept


def _host(experts: Experts, kept: dict[str, Source]) -> str | None:
    """The task of the expert that kept tensors are from."""
    hosts = {task: names for task, expert in experts if (names := [name for name, source in kept.items() if source is expert])}
    if len(hosts) > 1:
        (one, first), (other, second), *_ = hosts.items()
        raise ValueError(
            f"keep takes '{first[0]}' from expert '{one}' and '{second[0]}' from expert '{other}', and no config.json describes "
            "a model with both; keep those of one expert"
        )
    return next(iter(hosts), None)


def _heads(base: Source, experts: Experts, patterns: Sequence[str], folder: str | Path | None) -> tuple[str, ...]:
    """The names of the tensors that belong to a task: those that fit a pattern in an expert that has its own."""
    own = [
        [name for name in expert.names if matches(name, tuple(patterns)) and not _inherits(expert, name)] for _, expert in experts
    ]
    known = {name for source in (base, *(expert for _, expert in experts)) for name in (*source.names, *source.aliases)}
    for pattern in patterns:
        if experts and not any(matches(name, (pattern,)) for name in known):
            expert = experts[0][1]
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
