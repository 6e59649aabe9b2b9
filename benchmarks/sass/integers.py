"""Integers and predicates."""

from __future__ import annotations

import operator
import re
import struct

from .registers import WORD, Instruction, Registers, both, either, signed

NUMBER = re.compile(r"-?\d+(\.\d+)?(e[-+]?\d+)?")
COMPARE = {"LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge, "EQ": operator.eq, "NE": operator.ne}


class Integers(Registers):
    def _mov(self, one: Instruction) -> None:
        self._set(one.operands[0], self._value(one.operands[1]))

    _mov32i = _r2ur = _mov

    def _imad(self, one: Instruction) -> None:
        target, *rest = one.operands
        carries = [name for name in rest if re.fullmatch(r"!?U?P[T\d]", name)]
        a, b, c = (name for name in rest if name not in carries)
        wide = "WIDE" in one.modifiers or "HI" in one.modifiers
        x, y, z = self._value(a), self._value(b), self._value(c, wide)
        if None in (x, y, z):
            self._set(target, None, 2 if "WIDE" in one.modifiers else 1)
            return
        if wide and "U32" not in one.modifiers:
            x, y = signed(x), signed(y)
        total = x * y + z
        if "X" in one.modifiers and carries:
            carry = self._predicate(carries[-1])
            total = None if carry is None else total + carry
        if total is not None and "HI" in one.modifiers:
            total = (total % (WORD * WORD)) >> 32
        self._set(target, None if total is None else total % (WORD * WORD), 2 if "WIDE" in one.modifiers else 1)

    def _iadd3(self, one: Instruction) -> None:
        target, *rest = one.operands
        numbers = [name for name in rest if not re.fullmatch(r"!?U?P[T\d]", name)]
        out = [name for name in rest[: rest.index(numbers[0])]]
        inward = rest[rest.index(numbers[-1], len(out) + len(numbers) - 1) + 1 :] if "X" in one.modifiers else []
        values: list[int | None] = [self._predicate(name) for name in inward]
        for name in numbers:
            value = self._value(name)
            if value is not None and name.startswith(("-R", "-UR")):  # not x, and one more where it is the lower half
                value = ~-value % WORD + ("X" not in one.modifiers)
            values.append(value)
        total = None if None in values else sum(int(value) for value in values)
        self._set(target, total)
        for place, name in enumerate(out):
            if name not in ("PT", "UPT"):
                self._registers[name] = None if total is None else total >= WORD * (place + 1)

    def _viadd(self, one: Instruction) -> None:
        x, y = self._value(one.operands[1]), self._value(one.operands[2])
        self._set(one.operands[0], None if x is None or y is None else x + y)

    def _lea(self, one: Instruction) -> None:
        target, *rest = one.operands
        out = rest.pop(0) if re.fullmatch(r"U?P[T\d]", rest[0]) else None
        inward = rest.pop() if re.fullmatch(r"!?U?P[T\d]", rest[-1]) else None
        values = [self._value(name) for name in rest]
        carry = self._predicate(inward) if inward and "X" in one.modifiers else False
        if None in values or carry is None:
            self._set(target, None)
            if out:
                self._registers[out] = None
            return
        if "HI" in one.modifiers and "SX32" in one.modifiers:
            low, added, shift = values
            total = (signed(low) << shift >> 32) % WORD + added + carry
        elif "HI" in one.modifiers:
            low, added, high, shift = values
            total = ((high << 32 | low) << shift >> 32) % WORD + added + carry
        else:
            low, added, shift = values
            total = (low << shift) % WORD + added
        self._set(target, total)
        if out and out not in ("PT", "UPT"):
            self._registers[out] = total >= WORD

    def _lop3(self, one: Instruction) -> None:
        rest = list(one.operands)
        out = rest.pop(0) if re.fullmatch(r"U?P[T\d]", rest[0]) else None
        target, *names = rest
        table = int(names[3], 16)
        values = [self._value(name) for name in names[:3]]
        result: int | None = 0
        if None in values:
            unknown = [value is None for value in values]
            known_zero = not unknown[0] and values[0] == 0 and table == 0xC0  # and
            result = 0 if known_zero or (not unknown[1] and values[1] == 0 and table == 0xC0) else None
        else:
            for row in range(8):
                if table >> row & 1:
                    term = WORD - 1
                    for value, bit in zip(values, (4, 2, 1)):
                        term &= value if row & bit else ~value
                    result |= term % WORD
        self._set(target, result)
        if out and out not in ("PT", "UPT"):
            self._registers[out] = None if result is None else result != 0

    def _shf(self, one: Instruction) -> None:
        target, low, shift, high = one.operands
        x, n, y = self._value(low), self._value(shift), self._value(high)
        if None in (x, n, y):
            self._set(target, None)
            return
        both = y << 32 | x
        if "L" in one.modifiers:
            result = (both << n) >> 32 if "HI" in one.modifiers else x << n
        elif "HI" in one.modifiers:
            upper = both >> 32 if {"U64", "S64"} & set(one.modifiers) else y
            result = (signed(upper) if {"S32", "S64"} & set(one.modifiers) else upper) >> n
        else:
            result = both >> n
        self._set(target, result % WORD)

    def _prmt(self, one: Instruction) -> None:
        target, a, table, b = one.operands
        x, selector, y = self._value(a), self._value(table), self._value(b)
        if None in (x, selector, y):
            self._set(target, None)
            return
        both = y << 32 | x
        picked = [both >> 8 * (selector >> 4 * place & 7) & 0xFF for place in range(4)]
        signs = [selector >> 4 * place & 8 for place in range(4)]
        picked = [(0xFF if byte & 0x80 else 0) if sign else byte for byte, sign in zip(picked, signs)]
        self._set(target, sum(byte << 8 * place for place, byte in enumerate(picked)))

    def _sel(self, one: Instruction) -> None:
        target, a, b, which = one.operands
        chosen = self._predicate(which)
        self._set(target, None if chosen is None else self._value(a if chosen else b))

    def _isetp(self, one: Instruction) -> None:
        first, second, a, b, joined, *low = one.operands
        x, y = self._value(a), self._value(b)
        below = self._predicate(low[0]) if low else None
        if x is None or y is None:
            result = None
        else:
            if "U32" not in one.modifiers:
                x, y = signed(x), signed(y)
            kind = next(name for name in one.modifiers if name in COMPARE)
            result = COMPARE[kind](x, y) if not low or x != y else below
            if low and kind in ("EQ", "NE") and x == y:
                result = below
        self._join(one, result, first, second, joined)

    def _join(self, one: Instruction, result: bool | None, first: str, second: str, joined: str) -> None:
        combine = both if "AND" in one.modifiers else either
        also = self._predicate(joined)
        for name, value in ((first, result), (second, None if result is None else not result)):
            if name not in ("PT", "UPT"):
                self._registers[name] = combine(value, also)

    def _plop3(self, one: Instruction) -> None:
        first, second, *names = one.operands
        values = [self._predicate(name) for name in names[:3]]
        for name, table in zip((first, second), names[3:5]):
            if name in ("PT", "UPT"):
                continue
            place = None if None in values else sum(bit * value for bit, value in zip((4, 2, 1), values))
            self._registers[name] = None if place is None else bool(int(table, 16) >> place & 1)

    def _fchk(self, one: Instruction) -> None:
        self._registers[one.operands[0]] = False  # divisor and dividend are ordinary

    def _hfma2(self, one: Instruction) -> None:
        """A constant is moved as two halves; all else is arithmetic."""
        halves = [struct.unpack("<H", struct.pack("<e", float(part)))[0] for part in one.operands[-2:] if NUMBER.fullmatch(part)]
        moved = [part.lstrip("-") for part in one.operands[1:3]] == ["RZ", "RZ"] and len(halves) == 2
        self._set(one.operands[0], halves[0] << 16 | halves[1] if moved else None)

    def _p2r(self, one: Instruction) -> None:
        mask, kind = self._value(one.operands[3]), one.operands[1].removesuffix("R")
        bits = [self._registers.get(f"{kind}{number}") if mask >> number & 1 else False for number in range(7)]
        self._set(one.operands[0], None if None in bits else sum(bool(bit) << number for number, bit in enumerate(bits)))

    _p2ur = _p2r

    def _vote(self, one: Instruction) -> None:
        *targets, source = one.operands  # of lanes that all have the same
        value = self._predicate(source)
        for target in targets:
            if "R" in target:
                self._set(target, None if value is None else (WORD - 1) * value)
            elif target not in ("PT", "UPT"):
                self._registers[target] = value

    _voteu = _vote

    def _vimnmx(self, one: Instruction) -> None:
        target, a, b, which = one.operands
        x, y, smaller = self._value(a), self._value(b), self._predicate(which)
        if None in (x, y, smaller):
            self._set(target, None)
            return
        key = int if "U32" in one.modifiers else signed
        self._set(target, (min if smaller else max)(x, y, key=key))

    def _r2p(self, one: Instruction) -> None:
        value, mask = self._value(one.operands[1]), self._value(one.operands[2])
        for number in range(7):
            if mask >> number & 1:
                self._registers[f"P{number}"] = None if value is None else bool(value >> number & 1)

    def _cs2r(self, one: Instruction) -> None:
        self._set(one.operands[0], 0 if "SRZ" in one.operands[1] else None, 1 if "32" in one.modifiers else 2)

    def _s2r(self, one: Instruction) -> None:
        self._set(one.operands[0], self._special.get(one.operands[1]))

    _s2ur = _s2r
