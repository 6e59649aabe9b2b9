"""What a learned merge by several GPUs would take, on paper: python benchmarks/ranks_on_paper.py

Nothing here has run. Memory and bytes are those of docs/distributed.md, which tests count on CPUs; seconds are the largest of
three that would run side by side: arithmetic, memory traffic of merging and contracting, and what comes over the slowest link.
"""

from __future__ import annotations

from dataclasses import dataclass

# Of an H100 SXM: NVIDIA's data sheet, dense bf16 and HBM3. What models reach of them is an estimate.
FLOPS, REACHED = 989e12, 0.4
HBM, OF_HBM = 3.35e12, 0.8
GPU_BYTES = 80e9
# Bytes a second into one GPU: NVLink 4 has 450 GB/s each way; InfiniBand NDR 400 Gb/s for each GPU. What collectives reach: 0.8.
NVLINK, INFINIBAND, OF_LINK = 450e9, 50e9, 0.8
PASSES = 2  # of a step with SAM
BF16, INT4 = 2.0, 0.53  # bytes a number; int4 with its scales in groups of 64
EXAMPLES, LENGTH = 4, 512  # of a task's batch: texts, and tokens of each


@dataclass(frozen=True)
class Case:
    """units: blocks of the model. of_task_vectors: bytes a number of them."""

    name: str
    numbers: float
    units: int
    experts: int
    gpus: int
    a_node: int = 8
    of_task_vectors: float = BF16

    @property
    def turns(self) -> int:
        return -(-self.experts // self.gpus)

    @property
    def tokens(self) -> int:
        """That a GPU runs in a turn: with more GPUs than tasks, of its part of a batch."""
        return LENGTH * -(-EXAMPLES // max(1, self.gpus // self.experts))

    @property
    def shared_out(self) -> float:
        return (self.gpus - 1) / self.gpus


@dataclass(frozen=True)
class Cost:
    memory: float  # bytes of a GPU, without activations
    received: float  # bytes of a GPU in a step
    arithmetic: float  # seconds of a step
    traffic: float
    links: float

    @property
    def seconds(self) -> float:
        return max(self.arithmetic, self.traffic, self.links)


def cost(case: Case, streamed: bool) -> Cost:
    n, turns = case.numbers, case.turns
    weights, stores = BF16 * n, (BF16 + case.experts * case.of_task_vectors) * n / case.gpus
    # Resident: weights and gradient. Streamed: the weights of two units, and the gradient of one, up to three times.
    memory = stores + (2 * weights if not streamed else (2 + 3) * weights / case.units)
    # Streamed, every turn gathers twice, forward and backward, and scatters once; resident, a pass does each once.
    moved = PASSES * (3 * turns if streamed else 2) * weights * case.shared_out
    reads = PASSES * (3 * turns if streamed else 2) * stores
    products = 8 if streamed else 6  # operations for a number and token: forward, backward by both; streamed once more forward
    link = NVLINK if case.gpus <= case.a_node else INFINIBAND
    return Cost(
        memory,
        moved,
        PASSES * turns * products * n * case.tokens / (REACHED * FLOPS),
        reads / (OF_HBM * HBM),
        moved / (OF_LINK * link),
    )


CASES = (
    Case("8 × 7B", 7e9, 32, 8, 1, of_task_vectors=INT4),
    Case("8 × 7B", 7e9, 32, 8, 4),
    Case("8 × 7B", 7e9, 32, 8, 8),
    Case("8 × 70B", 70e9, 80, 8, 8, of_task_vectors=INT4),
    Case("8 × 70B", 70e9, 80, 8, 16, of_task_vectors=INT4),
    Case("8 × 70B", 70e9, 80, 8, 64),
)


def main() -> None:
    header = ["models", "task vectors", "GPUs", "way", "GB of a GPU", "GB received"]
    header += ["arithmetic, s", "memory, s", "links, s", "step, s"]
    print(f"| {' | '.join(header)} |\n|---|---|---:|---|{'---:|' * 6}")
    for case in CASES:
        for streamed in (False, True):
            found = cost(case, streamed)
            fits = found.memory < GPU_BYTES
            form = "int4" if case.of_task_vectors == INT4 else "bf16"
            seconds = [found.arithmetic, found.traffic, found.links, found.seconds]
            shown = [f"{value:.2g}" for value in seconds] if fits else ["does not fit", "", "", ""]
            row = [case.name, form, str(case.gpus), "streamed" if streamed else "resident", f"{found.memory / 1e9:.0f}"]
            print(f"| {' | '.join([*row, f'{found.received / 1e9:.0f}', *shown])} |")


if __name__ == "__main__":
    main()
