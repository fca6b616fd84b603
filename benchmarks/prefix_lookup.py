"""How fast a cached prompt is found: 32,768 tokens, all but the last block's in the prefix cache, blocks of 16.

Run `python benchmarks/prefix_lookup.py`. `match` is the request with its hashes and the lookup alone; `admit` also
takes the blocks, computes the tokens that are left and frees the sequence again.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from contenders import OURS, Contender, available, versions
from harness import Row, compare, machine, report

BLOCK = 16
BURST = 32  # calls in a row, so that the prompt and its blocks are in the processor's cache for all but the first


def match(manager: Contender, prompt: Any, times: int) -> None:
    for _ in range(times):
        manager.lookup(manager.arrive(prompt))


def admit(manager: Contender, prompt: Any, times: int) -> None:
    for _ in range(times):
        admitted = manager.admit(manager.arrive(prompt))
        if admitted is not None:
            manager.free([admitted[0]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--contenders", nargs="+")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    options = parser.parse_args()
    tokens = np.random.default_rng(0).integers(0, 150_000, options.tokens, dtype=np.int32)
    matches: dict[str, Callable[[], object]] = {}
    admits: dict[str, Callable[[], object]] = {}
    for name, contender in available(options.contenders).items():
        manager = contender(4 * options.tokens // BLOCK, BLOCK, max_seqs=2, max_tokens=options.tokens + BLOCK)
        prompt = manager.prompt(tokens)
        admit(manager, prompt, 1)
        found = manager.lookup(manager.arrive(prompt))
        if found < options.tokens - BLOCK:
            raise RuntimeError(f"{name} found only {found} of {options.tokens} tokens")
        matches[name] = partial(match, manager, prompt, BURST)
        admits[name] = partial(admit, manager, prompt, BURST)
    rows = []
    for what, calls in (("match", matches), ("admit, compute the rest, free", admits)):
        seconds = {name: took / BURST for name, took in compare(calls, options.repeats, options.clock).items()}
        rows.append(Row(what, seconds, options.tokens, "tokens/s"))
    workload = f"a prompt of {options.tokens:,} tokens, cached; {options.clock} time, medians"
    report("Prefix lookup", rows, ours=OURS, workload=workload, about=machine(versions()), name="prefix_lookup")


if __name__ == "__main__":
    main()
