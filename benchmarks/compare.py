"""What of ours got slower between two results files of one device.

    python benchmarks/compare.py OLD.json NEW.json [--threshold 0.1]

Shares of the ceiling are compared, not seconds, so that a machine that was busier on one of the days does not count. Ends with
status 1 where a share fell by more than the threshold, relative to the old one, and 2 where the files cannot be compared.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from report import Record, is_ours, read, table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--threshold", type=float, default=0.1, help="how much of its share a candidate may lose")
    options = parser.parse_args()
    (old_about, old), (new_about, new) = read(options.old), read(options.new)
    if old_about["device"] != new_about["device"]:
        print(f"not comparable: {options.old} is of {old_about['device']}, {options.new} of {new_about['device']}")
        return 2
    before, after = _shares(old), _shares(new)
    common = [key for key in before if key in after]
    if not common:
        print("not comparable: no benchmark is in both files")
        return 2
    rows = [_row(key, before[key], after[key], options.threshold) for key in common]
    print(table(rows))
    for what, keys in (("missing", before.keys() - after.keys()), ("new", after.keys() - before.keys())):
        for key in sorted(keys):
            print(f"{what}: {' '.join(key)}")
    slower = sum(row["verdict"] == "slower" for row in rows)
    print(f"{slower} of {len(rows)} benchmarks got slower from {old_about['commit']} to {new_about['commit']}")
    return 1 if slower else 0


def _shares(records: list[Record]) -> dict[tuple[str, str, str], float]:
    return {(row["operator"], row["case"], row["candidate"]): row["share"] for row in records if is_ours(row)}


def _row(key: tuple[str, str, str], before: float, after: float, threshold: float) -> dict[str, str]:
    change = after / before - 1
    verdict = "slower" if change < -threshold else "faster" if change > threshold else ""
    names = dict(zip(("operator", "case", "candidate"), key, strict=True))
    return {**names, "old": f"{before:.2f}", "new": f"{after:.2f}", "change": f"{change:+.0%}", "verdict": verdict}


if __name__ == "__main__":
    sys.exit(main())
