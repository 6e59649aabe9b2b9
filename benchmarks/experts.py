"""Real experts for the benchmarks, where there are some: those that `samerge demo --full` and `make demo` leave behind."""

from __future__ import annotations

import os
from pathlib import Path

DEMO_EXPERTS = Path(__file__).parent.parent / ".cache-demo" / "experts" / "full"


def experts_folder() -> Path:
    return Path(os.environ.get("SAMERGE_BENCH_EXPERTS", DEMO_EXPERTS))


def expert_folders(folder: Path) -> tuple[Path, dict[str, Path]] | None:
    """The base and the experts of the first seed; None where there is not one `base*` and some `*seed0*`."""
    bases, experts = sorted(folder.glob("base*")), {path.name: path for path in sorted(folder.glob("*seed0*"))}
    return (bases[0], experts) if len(bases) == 1 and experts else None
