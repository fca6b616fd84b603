"""What blocks cost before a cache holds anything: a manager of a million, and blocks taken and given back.

Run `python benchmarks/allocation.py`. `churn` admits prompts of 256 blocks without a prefix cache and frees them, one
at a time, and with three quarters of the pool live, so that blocks do not stay in the processor's cache. Requests are
made before the clock runs.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from contenders import OURS, Contender, Tokens, available, versions
from harness import Row, compare, machine, report

BLOCK, PROMPT = 16, 256
SLOW = 10.0  # seconds of a contender before it is measured less often


def construct(contenders: dict[str, type[Contender]], num_blocks: int, repeats: int, clock: str) -> Row:
    makers: dict[str, Callable[[], object]] = {}
    for name, contender in contenders.items():
        makers[name] = partial(contender, num_blocks, BLOCK, max_seqs=64, max_tokens=8192)
    return Row(f"construct {num_blocks:,} blocks", compare(makers, repeats, clock))


def churn(contenders: dict[str, type[Contender]], num_blocks: int, live: int, repeats: int, clock: str) -> Row:
    """Blocks a second: `live` prompts are admitted, then freed, over and over until 256 prompts were."""
    now = {"wall": time.perf_counter, "cpu": time.thread_time}[clock]
    tokens = np.random.default_rng(0).integers(0, 150_000, PROMPT * BLOCK, dtype=np.int32)
    took: dict[str, list[float]] = {name: [] for name in contenders}
    managers = {
        name: contender(
            num_blocks, BLOCK, max_seqs=max(live, 64), max_tokens=PROMPT * BLOCK + BLOCK, prefix_caching=False
        )
        for name, contender in contenders.items()
    }
    gc.collect()
    gc.freeze()
    for _ in range(repeats + 1):
        for name, manager in managers.items():
            if sum(took[name]) > SLOW:
                continue  # once is enough
            rounds = max(1, 256 // live) if not took[name] or took[name][0] < SLOW / 1000 else 1
            times: list[float] = []
            while len(times) < rounds and sum(times) < SLOW / 10:
                times.append(churned(manager, tokens, live, now))
            took[name].append(statistics.fmean(times))
    gc.unfreeze()
    medians = {name: statistics.median(times[1:] or times) for name, times in took.items()}
    what = "one prompt at a time" if live == 1 else f"{live} prompts live"
    return Row(f"churn, {num_blocks:,} blocks, {what}", medians, live * PROMPT, "blocks/s")


def churned(manager: Contender, tokens: Tokens, live: int, now: Callable[[], float]) -> float:
    requests = [manager.arrive(manager.prompt(tokens)) for _ in range(live)]
    start = now()
    admitted = [manager.reserve(request) for request in requests]
    manager.free([found[0] for found in admitted if found is not None])
    return now() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, nargs="+", default=[131_072, 1_000_000])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--contenders", nargs="+")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    options = parser.parse_args()
    contenders = available(options.contenders)
    rows = [construct(contenders, options.blocks[-1], 3, options.clock)]
    for num_blocks in options.blocks:
        rows.append(churn(contenders, num_blocks, 1, options.repeats, options.clock))
        rows.append(churn(contenders, num_blocks, num_blocks * 3 // 4 // PROMPT, options.repeats, options.clock))
    workload = f"prompts of {PROMPT} blocks of {BLOCK} tokens; {options.clock} time, medians"
    report("Allocation", rows, ours=OURS, workload=workload, about=machine(versions()), name="allocation")


if __name__ == "__main__":
    main()
