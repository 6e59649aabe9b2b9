"""Folders that store a module's tensors under other names or in parts: read as the module's, written as the folder's.

transformers loads such folders by tables of its own (`transformers.conversion_mapping`), which are what is followed here: the
experts of a Mixtral are one tensor each on disk and one for all in the module, the layers of a ViT have older names on disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from samerge_ext.checkpoints.reading import CheckpointError
from samerge_ext.checkpoints.sources import Source


@dataclass
class _Group:
    """Stored tensors that are read together, and the module's tensors that they make.

    key: the name that transformers' patterns give all of them. parts: (pattern that fits, stored name), in natural order.
    converter: what makes the one of the other; None where a tensor only has another name. made: name -> shape and dtype.
    """

    key: str
    converter: Any
    parts: list[tuple[str | None, str]] = field(default_factory=list)
    made: dict[str, Tensor] = field(default_factory=dict)

    def convert(self, module: Any, tensors: Iterable[Tensor]) -> dict[str, Tensor]:
        """The module's tensors, by name, of the parts' ``tensors``."""
        if self.converter is None:
            return {self.key: next(iter(tensors))}
        converter = deepcopy(self.converter)
        for (pattern, stored), tensor in zip(self.parts, tensors, strict=True):
            converter.add_tensor(self.key, stored, pattern, tensor)
        return _single(converter.convert(self.key, model=module, config=module.config))


class Conversion:
    """Between the tensors of model folders and those of the transformers module that they are for.

    module: of the folders' architecture; its names, shapes and configuration are read, so it may be on `meta`.
    added: tensors of the module that no folder stores; the base has them too. left_out: tensors of the base that are not read.
    """

    def __init__(self, module: Any, added: Mapping[str, Tensor] | None = None, left_out: Iterable[str] = ()):
        self._module = module
        self._expected = {name: tensor.to("meta") for name, tensor in module.state_dict().items()}
        self._added, self._left_out = dict(added or {}), frozenset(left_out)

    def base(self, source: Source) -> Source:
        """The base's source under the module's names, which also says what is a buffer; raises CheckpointError where it could not
        be written again."""
        return self._written(source)[0]

    def expert(self, source: Source) -> Source:
        """An expert's source under the module's names."""
        converted, groups, _ = self._converted(source)
        return source if all(group.made.keys() == {name for _, name in group.parts} for group in groups) else converted

    def as_stored(self, source: Source) -> Source:
        """The base's source under its own names, with what is added and without what is left out."""
        return _Completed(source, self._added, self._left_out) if self._added or self._left_out else source

    def reverted(self, tensors: Iterable[tuple[str, Tensor]], base: Source) -> Iterator[tuple[str, Tensor]]:
        """The module's tensors as the base's folder stores them: its names and parts. Those that make one stored tensor
        together are held until all of them came."""
        groups = {name: group for group in self._written(base)[1] for name in group.made}
        waiting: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors:
            group = groups.get(name)
            if group is None:
                yield name, tensor
            elif group.converter is None:
                yield group.parts[0][1], tensor
            else:
                came = waiting.setdefault(group.key, {})
                came[name] = tensor
                if len(came) == len(group.made):
                    for stored, part in self._revert(waiting.pop(group.key)).items():
                        yield stored, part.clone()  # parts are views of one tensor, which files may not share
        if waiting:
            names = [name for came in waiting.values() for name in came]
            raise CheckpointError(
                f"{names[:4]} cannot be written as {base.label} stores them: others that belong to them are missing"
            )

    def _converted(self, source: Source) -> tuple[Source, list[_Group], list]:
        transforms = [] if all(name in self._expected for name in source.names) else _transforms(self._module)
        if transforms:
            groups = _groups(source, self._module, self._expected, transforms)
        else:
            groups = [_Group(name, None, [(None, name)], {name: _empty(source, name)}) for name in source.names]
        order = list(self._expected) if transforms else list(source.names)
        return _Converted(source, self._module, groups, order), groups, transforms

    def _written(self, source: Source) -> tuple[Source, list[_Group]]:
        """As `base`, with the groups; the module keeps which conversions apply, as after transformers' own loading."""
        converted, groups, transforms = self._converted(self.as_stored(source))
        self._module._weight_conversions = [transform for transform in transforms if transform.was_used()]
        for group in groups:
            if group.converter is not None:
                back = {stored: part.shape for stored, part in self._revert(group.made).items()}
                if back != {stored: source.shape(stored) for _, stored in group.parts}:
                    raise CheckpointError(
                        f"{source.label}: '{group.parts[0][1]}' is stored otherwise than transformers writes it; load the model "
                        "with transformers, save it again, and merge that"
                    )
        return converted, groups

    def _revert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        return revert_weight_conversion(self._module, dict(tensors))


class _Converted(Source):
    """A source under a module's names: every tensor made of the stored ones as it is read."""

    _stored: dict[str, _Group]

    def __init__(self, source: Source, module: Any, groups: list[_Group], order: list[str]):
        self.label = source.label
        self._source, self._module = source, module
        self._buffers = {name for name, _ in module.named_buffers()}
        self._stored = {name: group for group in groups for name in group.made}
        known = [name for name in order if name in self._stored]
        self.names = (*known, *(name for name in self._stored if name not in set(known)))
        called = {group.parts[0][1]: group.key for group in groups if group.converter is None}
        self.aliases = {called.get(a, a): called[name] for a, name in source.aliases.items() if name in called}

    def is_buffer(self, name: str) -> bool:
        name = self.aliases.get(name, name)
        group = self._stored[name]
        return name in self._buffers or (group.converter is None and self._source.is_buffer(group.parts[0][1]))

    def _shape(self, name: str) -> torch.Size:
        return self._stored[name].made[name].shape

    def _dtype(self, name: str) -> torch.dtype:
        return self._stored[name].made[name].dtype

    def _read(self, name: str) -> Tensor:
        group = self._stored[name]
        return group.convert(self._module, (self._source.read(stored) for _, stored in group.parts))[name]


class _Completed(Source):
    """A source with more tensors, held in memory, and without some."""

    def __init__(self, source: Source, added: Mapping[str, Tensor], left_out: frozenset[str]):
        self.label = source.label
        self._source, self._added = source, added
        self.names = (*(name for name in source.names if name not in left_out), *added)
        self.aliases = {alias: name for alias, name in source.aliases.items() if name not in left_out}
        self._stored = frozenset(self.names)

    def is_buffer(self, name: str) -> bool:
        return name not in self._added and self._source.is_buffer(name)

    def _shape(self, name: str) -> torch.Size:
        return self._added[name].shape if name in self._added else self._source.shape(name)

    def _dtype(self, name: str) -> torch.dtype:
        return self._added[name].dtype if name in self._added else self._source.dtype(name)

    def _read(self, name: str) -> Tensor:
        return self._added[name].clone() if name in self._added else self._source.read(name)


def _transforms(module: Any) -> list:
    """transformers' renamings and conversions for a module; none where the module or the version has no such tables."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # before transformers 5 modules were as folders are
        return []
    return get_model_conversion_mapping(module) if hasattr(module, "base_model_prefix") else []


def _groups(source: Source, module: Any, expected: Mapping[str, Tensor], transforms: list) -> list[_Group]:
    """What of a folder becomes what of the module; names that are not the module's even so stay as they are."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    groups: dict[str, _Group] = {}
    for name in sorted(source.names, key=dot_natural_key):
        key, pattern = rename_source_key(name, renamings, converters, module.base_model_prefix, dict(expected))
        if key not in expected:
            key, pattern = rename_source_key(name, [], [], module.base_model_prefix, dict(expected))
        converter = None if pattern is None else of_pattern[pattern]
        group = groups.setdefault(key, _Group(key, converter))
        if group.parts and (converter is None or group.converter is not converter):
            raise CheckpointError(f"{source.label} stores '{key}' twice, as '{group.parts[0][1]}' and as '{name}'; remove one")
        group.parts.append((pattern, name))
    for group in groups.values():
        group.made = _made(source, group, module, expected)
    return list(groups.values())


def _made(source: Source, group: _Group, module: Any, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Shape and dtype of what a group makes, as tensors without memory; raises CheckpointError where it does not fit."""
    stored = [name for _, name in group.parts]
    empty = [_empty(source, name) for name in stored]
    if group.converter is None:
        return {group.key: empty[0]}
    try:
        made = group.convert(module, empty)
        wrong = [name for name, tensor in made.items() if name not in expected or tensor.shape != expected[name].shape]
    except Exception as error:  # of any type: the shapes are not what transformers' operations are made for
        raise CheckpointError(f"{source.label}: '{stored[0]}' … do not make the module's '{group.key}': {error}") from error
    if wrong:
        name = wrong[0]
        fault = f"is {list(expected[name].shape)}" if name in expected else "does not exist"
        raise CheckpointError(
            f"{source.label}: {len(stored)} tensors as '{stored[0]}' make '{name}' {list(made[name].shape)}, which in the model "
            f"of its config.json {fault}; download the whole model, or its right config.json"
        )
    return made


def _empty(source: Source, name: str) -> Tensor:
    """A tensor's shape and dtype, as a tensor without memory."""
    return torch.empty(source.shape(name), dtype=source.dtype(name), device="meta")


def _single(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in tensors.items()}
