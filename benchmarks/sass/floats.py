"""Floating point, as far as branches need it: fp32 by fp64, which is not rounded between."""

from __future__ import annotations

import math
import operator
import re
import struct
from collections.abc import Callable

from .integers import COMPARE, Integers
from .registers import WORD, Instruction, signed

SPECIAL_FUNCTIONS = {
    "EX2": lambda x: 2.0**x if x < 1024 else math.inf,
    "RCP": lambda x: 1 / x if x else math.inf,
    "LG2": lambda x: math.log2(x) if x > 0 else -math.inf,
}


class Floats(Integers):
    def _float(self, operand: str, wide: bool = False) -> float | None:
        if match := re.fullmatch(r"([-+|]*)(\d[\d.]*(?:e[-+]?\d+)?|INF|QNAN)\|?", operand.strip()):
            return float(match[1].strip("|") + match[2].replace("QNAN", "nan"))
        sign, name = (-1, operand[1:]) if operand[0] == "-" else (1, operand)
        bits = self._value(name.strip("|"), wide)
        if bits is None:
            return None
        value = struct.unpack(*("<d", bits.to_bytes(8, "little")) if wide else ("<f", bits.to_bytes(4, "little")))[0]
        return sign * (abs(value) if name[0] == "|" else value)

    def _set_float(self, target: str, value: float | None, wide: bool = False) -> None:
        bits = None
        if value is not None:
            try:
                bits = int.from_bytes(struct.pack("<d" if wide else "<f", value), "little")
            except OverflowError:
                bits = 0x7F800000 if value > 0 else 0xFF800000
        self._set(target, bits, 2 if wide else 1)

    def _of_floats(self, one: Instruction, compute: Callable[..., float]) -> None:
        wide = one.name[0] == "D"
        values = [self._float(name, wide) for name in one.operands[1:] if not re.fullmatch(r"!?P[T\d]", name)]
        self._set_float(one.operands[0], None if None in values else compute(*values), wide)

    def _fadd(self, one: Instruction) -> None:
        self._of_floats(one, operator.add)

    def _fmul(self, one: Instruction) -> None:
        self._of_floats(one, operator.mul)

    def _ffma(self, one: Instruction) -> None:
        self._of_floats(one, lambda a, b, c: a * b + c)

    _dadd, _dmul, _dfma = _fadd, _fmul, _ffma

    def _mufu(self, one: Instruction) -> None:
        if one.modifiers[0] == "RCP64H":  # of the upper half of a double, as far as that goes
            upper = self._value(one.operands[1])
            x = None if upper is None else struct.unpack("<d", (upper << 32).to_bytes(8, "little"))[0]
            self._set(one.operands[0], struct.unpack("<Q", struct.pack("<d", 1 / x))[0] >> 32 if x else None)
        elif one.modifiers[0] in SPECIAL_FUNCTIONS:
            self._of_floats(one, SPECIAL_FUNCTIONS[one.modifiers[0]])
        else:
            self._anything(one)

    def _fmnmx(self, one: Instruction) -> None:
        smaller = self._predicate(one.operands[3])
        self._of_floats(one, min if smaller else max) if smaller is not None else self._set(one.operands[0], None)

    def _fsel(self, one: Instruction) -> None:
        chosen = self._predicate(one.operands[3])
        self._set_float(one.operands[0], None if chosen is None else self._float(one.operands[1 if chosen else 2]))

    def _fsetp(self, one: Instruction) -> None:
        first, second, a, b, joined = one.operands
        x, y = self._float(a, one.name[0] == "D"), self._float(b, one.name[0] == "D")
        result: bool | None = None
        if x is not None and y is not None:
            kind, unordered = one.modifiers[0], math.isnan(x) or math.isnan(y)
            if kind in ("NAN", "NUM"):
                result = unordered == (kind == "NAN")
            else:
                result = kind[-1] == "U" if unordered else COMPARE[kind.removesuffix("U")](x, y)
        self._join(one, result, first, second, joined)

    _dsetp = _fsetp

    def _f2f(self, one: Instruction) -> None:
        to, of = one.modifiers[0], one.modifiers[1]
        if {to, of} <= {"F32", "F64"}:
            self._set_float(one.operands[0], self._float(one.operands[1], of == "F64"), to == "F64")
        else:
            self._anything(one)

    def _i2f(self, one: Instruction) -> None:
        value = self._value(one.operands[1], bool({"U64", "S64"} & set(one.modifiers)))
        if value is not None and not {"U32", "U64"} & set(one.modifiers):
            value = signed(value)
        self._set_float(one.operands[0], value, "F64" in one.modifiers)

    _i2fp = _i2f

    def _f2i(self, one: Instruction) -> None:
        value = self._float(one.operands[1], "F64" in one.modifiers)
        wide = bool({"U64", "S64"} & set(one.modifiers))
        known = value is not None and math.isfinite(value)
        self._set(one.operands[0], int(value) % (WORD * WORD) if known else None, 2 if wide else 1)
