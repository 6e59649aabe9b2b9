"""YAML from people: what JSON could say, within bounds, since a few lines of aliases can stand for more than there is memory."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

from samerge_ext.checkpoints.reading import cut, shown

MAX_BYTES = 256 << 10  # of a file: some seconds
MAX_DEPTH = 32
MAX_SIZE = 1 << 20  # characters and nodes, with aliases written out


def parse_yaml(text: str | bytes) -> Any:
    """The value of a YAML text: objects, lists, texts, numbers, booleans and null; dates are texts.

    Raises ValueError for what is no such text, or one of more than `MAX_BYTES`, `MAX_DEPTH` or `MAX_SIZE`; its message goes on
    after the text's name.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"has more than {MAX_BYTES} bytes, which no recipe has")
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        return yaml.load(text, _Loader)
    except UnicodeDecodeError as error:
        where = f"byte {error.start} is {error.object[error.start]:#x}"
        raise ValueError(f"is not UTF-8 ({where}); save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise ValueError(f"is not valid YAML: {cut(str(error), 500)}") from error
    except Exception as error:  # of many types, from values that are not of their tag
        raise ValueError(f"is not valid YAML: a value is not of its type ({cut(repr(error), 200)})") from error


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML would take the last, and keeps the bounds."""

    def __init__(self, stream: str):
        super().__init__(stream)
        self._depth = 0
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        is_alias = self.check_event(yaml.AliasEvent)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.YAMLError(f"it is nested more than {MAX_DEPTH} deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None and not is_alias:
            self._sizes[node] = self._size(node)
        elif node not in self._sizes:
            raise yaml.YAMLError("an alias stands for what it is in")
        return node

    def _size(self, node: yaml.Node) -> int:
        """With aliases written out; those in it have been counted."""
        if isinstance(node, yaml.ScalarNode):
            if node.tag == "tag:yaml.org,2002:int" and len(node.value) > 100:  # sums of digits take quadratic time
                raise yaml.YAMLError(f"{shown(node.value)} is a number of {len(node.value)} digits")
            size = 1 + len(node.value.encode())  # half a pair of surrogates has no bytes
        else:
            held = (part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,)))
            size = 1 + sum(self._sizes[part] for part in held)
        if size > MAX_SIZE:
            raise yaml.YAMLError("its aliases stand for more than a recipe can hold")
        return size

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in lines:
                    first, second = lines[key.value] + 1, key.start_mark.line + 1
                    raise yaml.YAMLError(f"{shown(key.value)} is there twice, in line {first} and in line {second}")
                lines[key.value] = key.start_mark.line
        return super().construct_mapping(node, deep)


# Without the tags of dates, bytes, sets and the like: nothing is written so in a recipe.
_Loader.yaml_implicit_resolvers = {
    character: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:timestamp"]
    for character, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
}
