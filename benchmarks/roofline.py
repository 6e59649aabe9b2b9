"""A roofline and bars from a results file.

    python benchmarks/roofline.py RESULTS.json [OUT.png]

Left: operations per second over operations per byte that must be moved, one point per case, under the bandwidth of the best
ceiling measured and the rate of a product of fp32 matrices. Right: each candidate's share of the ceiling, median over the
cases, with the smallest and the largest.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from report import Record, is_ours, read

MARKERS = "osD^v"


def main(source: Path, target: Path) -> None:
    about, records = read(source)
    records = [row for row in records if row["operations"]]  # of the operators; a SAM step is held against passes
    if not records:
        raise SystemExit(f"{source} holds no operators")
    operators = list(dict.fromkeys(row["operator"] for row in records))
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 6), layout="constrained")
    _roofline(left, about, records, operators)
    _bars(right, records, operators)
    figure.suptitle(f"{about['device']}, torch {about['torch']}, commit {about['commit']}")
    figure.savefig(target, dpi=120)
    print(f"written to {target}")


def _roofline(axes, about: dict, records: list[Record], operators: list[str]) -> None:
    bandwidth = max(row["yardstick_GB_per_s"] for row in records) * 1e9
    peak = about["matmul_fp32_per_s"]
    intensities = [row["operations"] / row["bytes"] for row in records]
    span = np.geomspace(min(intensities) / 4, max(4 * max(intensities), 2 * peak / bandwidth), 100)
    roof = np.minimum(span * bandwidth, peak) / 1e9
    axes.loglog(span, roof, color="black", label=f"{bandwidth / 1e9:.3g} GB/s, then products of fp32 matrices")
    for operator, marker in zip(operators, MARKERS, strict=False):
        for color, ours in (("lightgray", False), ("tab:blue", True)):
            rows = [row for row in records if row["operator"] == operator and is_ours(row) == ours]
            points = [(row["operations"] / row["bytes"], row["operations"] / row["median_s"] / 1e9) for row in rows]
            label = f"{operator}, {'ours' if ours else 'others'}"
            if points:
                axes.scatter(*zip(*points, strict=True), marker=marker, color=color, edgecolor="gray", label=label)
    axes.set(xlabel="operations per byte", ylabel="10⁹ operations per second")
    axes.legend(fontsize="small")


def _bars(axes, records: list[Record], operators: list[str]) -> None:
    shares: dict[tuple[str, str], list[float]] = {}
    for row in sorted(records, key=lambda row: operators.index(row["operator"])):
        shares.setdefault((row["operator"], row["candidate"]), []).append(row["share"])
    middle = np.array([median(values) for values in shares.values()])
    reach = [middle - [min(values) for values in shares.values()], [max(values) for values in shares.values()] - middle]
    colors = ["tab:blue" if candidate.startswith("samerge") else "lightgray" for _, candidate in shares]
    axes.barh([f"{operator}: {candidate}" for operator, candidate in shares], middle, xerr=reach, color=colors, capsize=3)
    axes.axvline(1, color="black")
    axes.invert_yaxis()
    axes.set_xlabel("share of the ceiling, median over the cases (whiskers: smallest and largest)")


if __name__ == "__main__":
    results = Path(sys.argv[1])
    main(results, Path(sys.argv[2]) if len(sys.argv) > 2 else results.with_suffix(".png"))
