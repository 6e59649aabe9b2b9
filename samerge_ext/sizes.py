"""Amounts of memory, as people write and read them."""

from __future__ import annotations

import re

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(size: int | str, name: str = "memory_budget") -> int:
    """A number of bytes from one, or a text such as "16GB" (powers of 1000) or "512MiB" (of 1024)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?B|)", str(size).strip().upper())
    if not found or not 0 < float(found[1]) * UNITS[found[2]] < 2**63:
        raise ValueError(f"{name}={size!r:.200}; give a number of bytes, or a text such as '16GB' or '512MiB'")
    return int(float(found[1]) * UNITS[found[2]])


def show_bytes(num_bytes: int) -> str:
    """A number of bytes as people read it: "1.81 GB"."""
    for unit in ("GB", "MB", "KB"):
        if num_bytes >= UNITS[unit]:
            return f"{num_bytes / UNITS[unit]:.3g} {unit}"
    return f"{num_bytes} B"
