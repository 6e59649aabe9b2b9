"""What an instruction is, and the registers of a lane. A value that is not known is None."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

WORD = 1 << 32


@dataclass(frozen=True)
class Instruction:
    at: int
    guard: str
    name: str  # without modifiers
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    target: int | None  # of a branch


class Registers:
    """constants: offset in the first bank of constants -> bytes. special: SR_TID.X … -> number. readable: whether so many bytes
    at an address may be read."""

    def __init__(self, constants: dict[int, bytes], special: dict[str, int], readable: Callable[[int, int], bool]):
        self._special, self._readable = special, readable
        self._bank = bytearray(0x1400)
        for offset, content in constants.items():
            self._bank[offset : offset + len(content)] = content
        names = [f"{kind}{name}{number}" for kind in ("", "U") for name in "RP" for number in range(256)]
        self._registers: dict[str, int | None] = dict.fromkeys((*names, "RZ", "URZ"), 0) | {"PT": True, "UPT": True}
        self._shared: dict[int, int | None] = {}

    def _predicate(self, name: str) -> bool | None:
        value = self._registers.get(name.lstrip("!"))
        return value if value is None else bool(value) != name.startswith("!")

    def _value(self, operand: str, wide: bool = False) -> int | None:
        """32 bits, or with ``wide`` 64, unsigned."""
        if operand[0] in "-~|":
            value = self._value(operand[1:].rstrip("|"), wide)
            if value is None or operand[0] == "|":
                return None
            return (-value if operand[0] == "-" else ~value) % (WORD * WORD if wide else WORD)
        if operand.startswith("c["):
            bank, offset = re.findall(r"\[([^\]]+)\]", operand)[:2]
            place = int(offset, 16) if offset.startswith("0x") else None
            if bank != "0x0" or place is None:
                return None
            return int.from_bytes(self._bank[place : place + (8 if wide else 4)], "little")
        if register := re.match(r"(U?)R(Z|\d+)", operand):
            low = self._registers.get(register[0])
            if not wide or register[2] == "Z":
                return low
            high = self._registers.get(f"{register[1]}R{int(register[2]) + 1}")
            return None if low is None or high is None else high << 32 | low
        if re.fullmatch(r"0x[0-9a-f]+|\d+", operand):
            return int(operand, 0)
        return None

    @staticmethod
    def _words(register: str, words: int) -> list[str]:
        """The registers of a number of so many words; none of what is always zero."""
        match = re.match(r"(U?R)(\d+)", register)
        return [f"{match[1]}{int(match[2]) + word}" for word in range(words)] if match else []

    def _set(self, register: str, value: int | None, words: int = 1) -> None:
        for word, name in enumerate(self._words(register, words)):
            self._registers[name] = None if value is None else value >> 32 * word & 0xFFFFFFFF

    def _execute(self, one: Instruction, guard: bool | None) -> None:
        before = dict(self._registers) if guard is None else None
        handler = getattr(self, f"_{one.name.removeprefix('U').lower()}", None)
        if handler is None:
            handler = self._anything
        handler(one)
        if before is not None:  # it may have happened or not
            for name, value in self._registers.items():
                if before.get(name) != value:
                    self._registers[name] = None

    def _anything(self, one: Instruction) -> None:
        if one.name in ("STG", "STS", "ST", "RED", "BAR", "BSSY", "BSYNC", "WARPSYNC", "DEPBAR", "LDGDEPBAR"):
            return
        for operand in one.operands[:3]:
            if re.fullmatch(r"U?P\d", operand):
                self._registers[operand] = None
            else:
                self._set(operand, None, 2 if one.name[0] == "D" or "64" in one.modifiers else 1)
                break


def signed(value: int) -> int:
    return value - WORD if value >= WORD // 2 else value


def both(a: bool | None, b: bool | None) -> bool | None:
    if a is False or b is False:
        return False
    return None if a is None or b is None else True


def either(a: bool | None, b: bool | None) -> bool | None:
    if a or b:
        return True
    return None if a is None or b is None else False
