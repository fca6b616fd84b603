"""One manager of ten million blocks and a hundred thousand sequences: made, filled, audited, freed, evicted, audited.

Run `python benchmarks/scale.py`; it takes about 3 GiB. Each sequence has its own 1,600 tokens; 32 sequences are
prefilled in a step. The wall time of the manager's calls, and the memory of the process after each phase.
"""

import argparse
import resource
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
from contenders import OURS
from harness import Row, machine, report

from kvblocks.manager import BlockManager
from kvblocks.replay import host_step

BLOCK, AT_ONCE = 16, 32


def resident() -> float:
    """GiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**30


class Scale:
    def __init__(self, num_blocks: int, num_seqs: int) -> None:
        self.blocks_each = num_blocks // num_seqs
        self.num_seqs = num_seqs
        tokens = self.blocks_each * BLOCK
        self.step = host_step(AT_ONCE, AT_ONCE * tokens, self.blocks_each)
        self.rng = np.random.default_rng(0)
        self.rows: list[Row] = []
        start = time.perf_counter()
        self.manager = BlockManager(num_blocks, BLOCK, max_seqs=num_seqs)
        self.done("construct", time.perf_counter() - start, num_blocks, "blocks/s")

    def done(self, what: str, seconds: float, amount: float, unit: str) -> None:
        memory = resident()
        print(f"{what}: {seconds:.3f} s, {memory:.2f} GiB resident", flush=True)
        self.rows.append(Row(f"{what} ({memory:.2f} GiB)", {OURS: seconds}, amount, unit, {"GiB resident": memory}))

    def fill(self, what: str) -> npt.NDArray[np.int64]:
        """Admit and compute prompts until every block is held."""
        clock, seconds, seqs = time.perf_counter, 0.0, []
        tokens = self.blocks_each * BLOCK
        for first in range(0, self.num_seqs, AT_ONCE):
            count = min(AT_ONCE, self.num_seqs - first)
            prompts = self.rng.integers(0, 150_000, (count, tokens), dtype=np.int32)
            start = clock()
            batch = [self.manager.admit(prompt)[0] for prompt in prompts]
            self.manager.commit(self.manager.prepare(batch, [tokens] * count, self.step))
            seconds += clock() - start
            seqs += batch
        self.done(what, seconds, self.manager.num_blocks, "blocks/s")
        return np.array(seqs)

    def timed(self, what: str, call: object, *args: object) -> None:
        start = time.perf_counter()
        call(*args)  # type: ignore[operator]
        self.done(what, time.perf_counter() - start, self.manager.num_blocks, "blocks/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=10_000_000)
    parser.add_argument("--seqs", type=int, default=100_000)
    options = parser.parse_args()
    scale = Scale(options.blocks, options.seqs)
    manager = scale.manager
    seqs = scale.fill("fill: admit, prepare, commit")
    scale.timed("audit, all held", manager.audit)
    scale.timed("free every sequence: all cached", manager.free, seqs)
    scale.timed("audit, all cached", manager.audit)
    seqs = scale.fill("fill again: every block evicted")
    scale.timed("audit, all held again", manager.audit)
    if manager.stats().evictions < options.seqs * scale.blocks_each:
        raise RuntimeError(f"only {manager.stats().evictions} blocks were evicted")
    workload = (
        f"{options.blocks:,} blocks of {BLOCK}, {options.seqs:,} sequences of {scale.blocks_each} blocks; wall time"
    )
    about = machine(("kvblocks", "numpy"))
    report("Scale", scale.rows, ours=OURS, workload=workload, about=about, name="scale")


if __name__ == "__main__":
    main()
