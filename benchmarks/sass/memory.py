"""Constants, global and shared memory, and what other lanes have."""

from __future__ import annotations

import ctypes
import re

from .floats import Floats
from .registers import WORD, Instruction

BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
SHARED_WINDOW = 1  # the upper half of a general address of shared memory: SR_SWINHI


class Lane(Floats):
    def _shfl(self, one: Instruction) -> None:
        self._set(one.operands[1], self._value(one.operands[2]))

    def _size(self, one: Instruction) -> int:
        return next((BYTES[name] for name in one.modifiers if name in BYTES), 4)

    def _ldc(self, one: Instruction) -> None:
        size = self._size(one)
        operand = one.operands[1]
        if register := re.search(r"\[(U?R\w+)(?:\+(-?0x[0-9a-f]+))?\]$", operand):
            index = self._value(register[1])
            known = index is not None and operand.startswith("c[0x0]")
            operand = f"c[0x0][{hex(index + int(register[2] or '0', 16))}]" if known else "unknown"
        value = self._value(operand, size == 8)
        self._set(one.operands[0], value if value is None or size >= 4 else value % (1 << 8 * size), max(1, size // 4))

    def _address(self, operand: str) -> int | None:
        inside = re.findall(r"\[([^\]]*)\]", operand)[-1]
        address: int | None = 0
        for part in re.findall(r"-?[^+]+", inside):
            name, _, kind = part.partition(".")
            value = int(name, 16) if re.fullmatch(r"-?0x[0-9a-f]+", name) else self._value(name, kind.startswith("64"))
            address = None if address is None or value is None else address + value
        return address

    def _read(self, one: Instruction, operand: str) -> int | None:
        address, size = self._address(operand), self._size(one)
        if address is None or not self._readable(address, size):
            return None
        value = int.from_bytes(ctypes.string_at(address, size), "little")
        if {"S8", "S16"} & set(one.modifiers):
            value = (value - (1 << 8 * size) * (value >> (8 * size - 1))) % WORD
        return value

    def _ldgsts(self, one: Instruction) -> None:
        value, address = self._read(one, one.operands[1]), self._address(one.operands[0])
        for word in range(self._size(one) // 4 if address is not None else 0):
            self._shared[address + 4 * word] = None if value is None else value >> 32 * word & 0xFFFFFFFF

    def _ldg(self, one: Instruction) -> None:
        value = self._read(one, next(name for name in reversed(one.operands) if "[" in name))
        self._set(self._target(one), value, max(1, self._size(one) // 4))

    @staticmethod
    def _target(one: Instruction) -> str:
        return next(name for name in one.operands if not re.match("!?P", name))

    def _ld(self, one: Instruction) -> None:
        address = self._address(one.operands[1])
        self._of_shared(one, address % WORD if address is not None and address >> 32 == SHARED_WINDOW else None)

    def _lds(self, one: Instruction) -> None:
        self._of_shared(one, self._address(one.operands[1]))

    def _of_shared(self, one: Instruction, address: int | None) -> None:
        for word in range(max(1, self._size(one) // 4)):
            value = None
            if address is not None and (left := [place for place in self._shared if place <= address + 4 * word]):
                value = self._shared[max(left)]  # what nobody wrote another warp did: nearest to it, this one
            register = re.match(r"(U?R)(\d+)", one.operands[0])
            if register:
                self._set(f"{register[1]}{int(register[2]) + word}", value)

    def _sts(self, one: Instruction) -> None:
        address, words = self._address(one.operands[0]), max(1, self._size(one) // 4)
        register = re.match(r"(U?R)(Z|\d+)", one.operands[1])
        for word in range(words if address is not None and register else 0):
            name = register[0] if register[2] == "Z" else f"{register[1]}{int(register[2]) + word}"
            self._shared[address + 4 * word] = self._registers.get(name)
