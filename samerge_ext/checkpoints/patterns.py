"""Regular expressions from files, for whose matching there is a bound."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from samerge_ext.checkpoints.reading import cut

LENGTH = 100  # characters of a module's name, mostly fewer
# In how many ways all expressions of a file may fit a name, which a backtracking matcher tries one by one: some seconds for all
# layers of a model. A name fits in one for each of its characters, a list of names likewise, `(a+)+` in 2^LENGTH.
MAX_WAYS = 10**9
MAX_CHARACTERS = 1_000_000  # of all expressions: compiling as many takes seconds


class Patterns:
    """PEFT's values by name: each for the modules whose names, or the ends of which after a dot, a regular expression fits.

    Raises ValueError for what is no regular expression, and for those that may take as good as for ever.
    """

    def __init__(self, values: Mapping[str, float]):
        self._values, self._checked = list(values.values()), 0
        if sum(map(len, values)) > MAX_CHARACTERS:
            raise ValueError(f"its expressions have more than {MAX_CHARACTERS} characters")
        try:
            whole = [rf"(.*\.)?({text})$" for text in values]  # as in peft
            self._parsed = [parser.parse(text) for text in whole]
            self._compiled = [re.compile(text) for text in whole]
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"no regular expression: {cut(str(error))}") from error
        self._check(LENGTH)

    def find(self, module: str) -> float | None:
        """The value of the first expression that fits a module's name."""
        self._check(len(module))
        fitting = (value for pattern, value in zip(self._compiled, self._values, strict=True) if pattern.match(module))
        return next(fitting, None)

    def _check(self, length: int) -> None:
        if length > self._checked:
            if sum(_ways(parts, length) for parts in self._parsed) > MAX_WAYS:
                raise ValueError("fits in too many ways to try them all; write it without repetitions of repetitions")
            self._checked = length


def _ways(parts: Iterable[tuple[Any, Any]], length: int) -> int:
    """In how many ways parts of an expression may fit within a name of ``length``, at most; all above `MAX_WAYS` are the same."""
    ways = 1
    for code, value in parts:
        ways = min(ways * _ways_of(code, value, length), MAX_WAYS + 1)
    return ways


def _ways_of(code: Any, value: Any, length: int) -> int:
    if code in (codes.MAX_REPEAT, codes.MIN_REPEAT, codes.POSSESSIVE_REPEAT):
        low, high, body = value
        inner, ways, total = _ways(body, length), 1, 0
        for times in range(min(int(high), length) + 1):
            total += ways if times >= min(low, length) else 0
            ways = min(ways * inner, MAX_WAYS + 1)
        return total
    if code is codes.BRANCH:
        return sum(_ways(branch, length) for branch in value[1])
    if code is codes.SUBPATTERN:
        return _ways(value[-1], length)
    if code is codes.ATOMIC_GROUP:
        return _ways(value, length)
    if code in (codes.ASSERT, codes.ASSERT_NOT):
        return _ways(value[1], length)
    if code is codes.GROUPREF_EXISTS:
        return sum(_ways(part, length) for part in value[1:] if part)
    return 1  # a character, a place, or what a group held
