"""Runs a warp of a kernel's machine code (SASS, as nvdisasm prints it) to count what it issues, without a GPU.

One lane stands for its warp, and other lanes have what it has. Integers, predicates and floating point are computed, memory is
read where the arguments point; other warps leave in shared memory what this one does. A branch on something unknown is not
taken, and counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from .memory import Lane
from .registers import Instruction, both

ROW = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\d|!?U?PT) +)?([\w.]+)\s*(.*?) *;")
# What an instruction keeps busy beside its scheduler.
UNITS = {
    "fp32": "FADD FMUL FFMA FFMA32I HADD2 HFMA2 HMUL2",
    "multiply": "IMAD",
    "integer": "IADD3 VIADD LEA LOP3 SHF PRMT ISETP FSETP SEL FSEL FMNMX VIMNMX VIMNMX3 VIADDMNMX PLOP3 F2FP I2FP IABS MOV "
    "P2R R2P CS2R VOTE",
    "fp64": "DADD DMUL DFMA DSETP",
    "special": "MUFU F2F F2I I2F POPC FLO S2R S2UR BREV",
    "memory": "LDG STG LDS STS LD ST LDGSTS SHFL RED ATOM ATOMG ATOMS LDSM ERRBAR MEMBAR",
}
UNIT_OF = {name: unit for unit, names in UNITS.items() for name in names.split()}


@dataclass
class Issued:
    """Of one warp. in_flight: the most bytes that a lane had asked global memory for when it had to wait for some of them."""

    names: Counter[str] = field(default_factory=Counter)
    units: Counter[str] = field(default_factory=Counter)
    in_flight: int = 0
    requests: int = 0  # to global memory
    unknown: Counter[int] = field(default_factory=Counter)  # branches nobody could know, by address

    @property
    def total(self) -> int:
        return sum(self.names.values())


def functions(text: str) -> dict[str, list[Instruction]]:
    """By mangled name, of what `nvdisasm -c` prints."""
    found = {}
    for section in re.split(r"^\s*\.section\s+\.text\.", text, flags=re.MULTILINE)[1:]:
        name = re.match(r"[\w$]+", section)[0]
        labels, rows = {}, []
        for line in section.splitlines():
            if label := re.match(r"([.\w$]+):$", line.strip()):
                labels[label[1]] = len(rows)
            elif row := ROW.search(line):
                rows.append(row)
        offsets = {label: int(rows[index][1], 16) for label, index in labels.items() if index < len(rows)}
        found[name] = [_instruction(row, offsets) for row in rows]
    return found


def _instruction(row: re.Match, labels: dict[str, int]) -> Instruction:
    at, guard, name, rest = row.groups()
    target = re.search(r"`\((?:\.text\.)?([.\w$]+)\)", rest)
    operands = tuple(part.strip().replace(".reuse", "") for part in re.split(r",(?![^\[]*\])", rest) if part.strip())
    return Instruction(int(at, 16), guard or "PT", *_split(name), operands, labels.get(target[1]) if target else None)


def _split(name: str) -> tuple[str, tuple[str, ...]]:
    first, *modifiers = name.split(".")
    return first, tuple(modifiers)


class Warp(Lane):
    def __init__(
        self,
        code: list[Instruction],
        constants: dict[int, bytes],
        special: dict[str, int],
        readable: Callable[[int, int], bool],
    ):
        super().__init__(constants, special, readable)
        self._code = code
        self._index = {each.at: index for index, each in enumerate(code)}
        self._pending: dict[str, int] = {}  # register -> number of the load
        self._asked: dict[int, int] = {}  # number of a load -> bytes
        self.issued = Issued()

    def run(self, most: int = 2_000_000) -> Issued:
        """Until the warp exits. Raises RuntimeError where that takes more than ``most`` instructions, or nobody knows the way."""
        at: int | None = 0
        while at is not None:
            if self.issued.total >= most:
                raise RuntimeError(f"not at its end after {most} instructions")
            one = self._code[at]
            self._count(one)
            guard = self._predicate(one.guard)
            if one.name in ("BRA", "EXIT", "RET", "CALL", "BRX"):
                at = self._next(one, guard, at)
                continue
            at += 1
            if guard is not False:
                self.issued.requests += one.name in ("LDG", "STG", "LDGSTS")
                self._execute(one, guard)
        return self.issued

    def _next(self, one: Instruction, goes: bool | None, at: int) -> int | None:
        """Where to go on after a branch; None at the end."""
        if "DIV" in one.modifiers:  # lanes do not part
            goes = False
        elif one.name == "BRA" and len(one.operands) > 1:
            goes = both(goes, self._predicate(one.operands[0]))
        if goes is None:
            self.issued.unknown[one.at] += 1
        if not goes:
            return at + 1
        if one.name == "EXIT":
            return None
        target = self._value(one.operands[0]) if one.name == "RET" else one.target
        if target is None or one.name == "BRX":
            raise RuntimeError(f"{one}: the disassembly does not show where to")
        return self._index[target]

    # ------------------------------------------------------------------------------------------------------------- counting
    def _count(self, one: Instruction) -> None:
        if one.name == "NOP":
            return
        self.issued.names[one.name] += 1
        self.issued.units["uniform" if one.name.startswith("U") else UNIT_OF.get(one.name, "control")] += 1
        if one.name == "LDGSTS":
            self._asked[self._next_load()] = self._size(one)
        elif one.name == "DEPBAR":
            self._wait(max([-1, *self._asked]))
        registers = (name for operand in one.operands for name in re.findall(r"\bU?R\d+\b", operand))
        if waited := [self._pending[name] for name in registers if name in self._pending]:
            self._wait(max(waited))

    def _next_load(self) -> int:
        return max([-1, *self._asked, *self._pending.values()]) + 1

    def _wait(self, last: int) -> None:
        """For this load and, as they come in order, for all before it."""
        self.issued.in_flight = max(self.issued.in_flight, sum(self._asked.values()))
        self._asked = {number: size for number, size in self._asked.items() if number > last}
        self._pending = {name: number for name, number in self._pending.items() if number > last}

    def _set(self, register: str, value: int | None, words: int = 1) -> None:
        super()._set(register, value, words)
        for name in self._words(register, words):
            self._pending.pop(name, None)

    def _ldg(self, one: Instruction) -> None:
        super()._ldg(one)
        number = self._next_load()
        self._asked[number] = self._size(one)
        for name in self._words(self._target(one), max(1, self._size(one) // 4)):
            self._pending[name] = number
