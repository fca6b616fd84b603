"""What a decode step costs: one more token for each of a batch of sequences of 8,192 tokens, every array of the step.

Run `python benchmarks/decode_step.py`. kvblocks: append, prepare, commit. Time of a step, averaged over 64 steps
(each sequence passes four block boundaries), median of several such rounds; contenders take turns round by round.
The plain Python fills the same arrays, SGLang its table of slots; the others are only asked for their bookkeeping.
"""

import argparse
import gc
import statistics
import time

import numpy as np
from contenders import OURS, available, versions
from harness import Row, machine, report

BLOCK = 16
STEPS = 4 * BLOCK


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 256, 1024])
    parser.add_argument("--tokens", type=int, default=8192, help="of each sequence (default: 8192)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contenders", nargs="+")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    options = parser.parse_args()
    contenders = available(options.contenders)
    now = {"wall": time.perf_counter, "cpu": time.thread_time}[options.clock]
    rows = []
    for size in options.batches:
        longest = options.tokens + STEPS * (options.rounds + 1) + BLOCK
        managers, batches = {}, {}
        for name, contender in contenders.items():
            rng = np.random.default_rng(0)
            manager = contender(size * (longest // BLOCK + 2), BLOCK, max_seqs=size, max_tokens=longest)
            keys = []
            for _ in range(size):
                tokens = rng.integers(0, 150_000, options.tokens, dtype=np.int32)
                admitted = manager.admit(manager.arrive(manager.prompt(tokens)))
                if admitted is None:
                    raise RuntimeError(f"{name} has no room for {size} sequences")
                keys.append(admitted[0])
            managers[name], batches[name] = manager, keys
        tokens = np.arange(size, dtype=np.int32)
        took: dict[str, list[float]] = {name: [] for name in managers}
        gc.collect()
        gc.freeze()
        for number in range(options.rounds + 1):
            for name, manager in managers.items():
                batch = manager.batch(batches[name])
                start = now()
                for _ in range(STEPS):
                    manager.step(batch, tokens)
                if number:  # the first one warms up
                    took[name].append((now() - start) / STEPS)
        gc.unfreeze()
        rows.append(
            Row(f"batch {size:,}", {name: statistics.median(times) for name, times in took.items()}, size, "tokens/s")
        )
        del managers, batches
    workload = (
        f"sequences of {options.tokens:,} tokens in blocks of {BLOCK}, no two alike; {options.clock} time of a step"
    )
    report("Decode step", rows, ours=OURS, workload=workload, about=machine(versions()), name="decode_step")


if __name__ == "__main__":
    main()
