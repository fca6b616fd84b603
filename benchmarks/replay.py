"""How long a manager works to replay a request trace: the first requests of a trace file, at most 32 at once.

Run `python benchmarks/replay.py --trace FILE` (JSON lines as `kvblocks replay` reads them); without it a small trace
is made up. Only the calls into a manager are timed, less what reading the clock takes. All requests reach every
contender in the same order, and a decode step runs all live sequences at once. kvblocks fills the arrays of every step
in that time; the others are not asked to.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from contenders import OURS, Contender, available, versions
from harness import Row, clock_cost, machine, report

from kvblocks.replay import TraceRequest, read_trace, small_trace

PARTS = ("admit", "decode", "free")


class OutOfTime(Exception):
    pass


class Run:
    """One contender over one trace."""

    def __init__(self, contender: type[Contender], num_blocks: int, longest: int, concurrency: int, clock: str) -> None:
        self.manager = contender(num_blocks, 16, max_seqs=concurrency, max_tokens=longest)
        self.concurrency = concurrency
        self.now: Callable[[], float] = {"wall": time.perf_counter, "cpu": time.thread_time}[clock]
        self.tick = clock_cost(self.now)
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.prompt_tokens = self.cached_tokens = self.decoded_tokens = self.steps = self.requests = 0

    def replay(self, requests: Sequence[TraceRequest], limit: float) -> None:
        """Raises OutOfTime once `limit` seconds were spent in calls."""
        live: list[list[Any]] = []  # key, tokens still to decode
        for request in requests:
            if sum(self.seconds.values()) > limit:
                raise OutOfTime
            while len(live) >= self.concurrency:
                self.decode(live)
            prompt = self.manager.prompt(request.prompt())
            start = self.now()
            arrived = self.manager.arrive(prompt)
            admitted = self.manager.admit(arrived)
            self.spend("admit", start)
            while admitted is None:
                if not live:
                    raise RuntimeError(f"{self.manager.name} has no room for {request.input_length} tokens")
                self.decode(live)
                start = self.now()
                admitted = self.manager.admit(arrived)
                self.spend("admit", start)
            key, cached = admitted
            self.requests += 1
            self.prompt_tokens += request.input_length
            self.cached_tokens += cached
            if request.output_length:
                live.append([key, request.output_length])
            else:
                self.free([key])
        while live:
            self.decode(live)

    def decode(self, live: list[list[Any]]) -> None:
        batch = self.manager.batch([key for key, _ in live])
        tokens = np.arange(self.decoded_tokens, self.decoded_tokens + len(live), dtype=np.int32)
        start = self.now()
        self.manager.step(batch, tokens)
        self.spend("decode", start)
        self.steps += 1
        self.decoded_tokens += len(live)
        done = []
        for i in reversed(range(len(live))):
            live[i][1] -= 1
            if not live[i][1]:
                done.append(live[i][0])
                last = live.pop()  # the last fills the gap, so that few rows of a step change
                if i < len(live):
                    live[i] = last
        if done:
            self.free(done)

    def free(self, keys: list[Any]) -> None:
        start = self.now()
        self.manager.free(keys)
        self.spend("free", start)

    def spend(self, part: str, start: float) -> None:
        self.seconds[part] += self.now() - start - self.tick


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", type=Path, help="JSON lines (default: a small trace is made up)")
    parser.add_argument("--requests", type=int, default=2000, help="of the trace, from its start (default: 2000)")
    parser.add_argument("--blocks", type=int, nargs="+", default=[131_072, 1_000_000])
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--contenders", nargs="+")
    parser.add_argument("--repeats", type=int, default=5, help="of contenders that take less than 5 s; others run once")
    parser.add_argument("--limit", type=float, default=60, help="seconds after which a contender is stopped")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    options = parser.parse_args()
    requests = read_trace(options.trace, options.requests) if options.trace else small_trace(options.requests)
    contenders = available(options.contenders)
    longest = max(request.input_length + request.output_length for request in requests) + 1
    rows = []
    for num_blocks in options.blocks:
        rows += compare(contenders, requests, num_blocks, longest, options)
    name = options.trace.name if options.trace else "a small made-up trace"
    workload = (
        f"first {len(requests)} requests of {name}: {sum(r.input_length for r in requests):,} prompt tokens, "
        f"{sum(r.output_length for r in requests):,} decoded, {options.concurrency} live at once, blocks of 16; "
        f"{options.clock} time inside the calls, medians; left out: who took over {options.limit:g} s"
    )
    report("Replay", rows, ours=OURS, workload=workload, about=machine(versions()), name="replay")


def compare(
    contenders: dict[str, type[Contender]],
    requests: Sequence[TraceRequest],
    num_blocks: int,
    longest: int,
    options: argparse.Namespace,
) -> list[Row]:
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    notes: dict[str, object] = {}
    for repeat in range(options.repeats):
        for name, contender in contenders.items():
            if repeat and (name not in runs or sum(runs[name][0].values()) > 5):
                continue
            run = Run(contender, num_blocks, longest, options.concurrency, options.clock)
            gc.collect()
            gc.freeze()
            try:
                run.replay(requests, options.limit)
            except OutOfTime:
                print(f"{name}, {num_blocks} blocks: stopped after {run.requests} of {len(requests)} requests")
                notes[f"{name} stopped after requests"] = run.requests
                del runs[name]
                continue
            finally:
                gc.unfreeze()
            hit = run.cached_tokens / run.prompt_tokens
            each = run.seconds["decode"] / max(run.decoded_tokens, 1)
            runs[name].append({**run.seconds})
            notes[f"{name} hit rate"] = round(hit, 4)
            if not repeat:
                parts = ", ".join(f"{part} {seconds:.3f}" for part, seconds in run.seconds.items())
                total = sum(run.seconds.values())
                print(
                    f"{name}, {num_blocks} blocks: {total:.3f} s ({parts}), {1e6 * each:.3f} µs a decoded token, "
                    f"hit rate {hit:.1%}"
                )
    rows = []
    for part in ("total", *PARTS):
        seconds = {
            name: statistics.median(sum(run.values()) if part == "total" else run[part] for run in found)
            for name, found in runs.items()
        }
        rows.append(Row(f"{num_blocks:,} blocks: {part}", seconds, notes=notes if part == "total" else {}))
    decoded = sum(request.output_length for request in requests)
    per_token = {name: seconds / decoded for name, seconds in rows[2].seconds.items()}
    rows.append(Row(f"{num_blocks:,} blocks: one decoded token", per_token))
    return rows


if __name__ == "__main__":
    main()
