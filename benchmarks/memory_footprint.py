"""Bytes of bookkeeping per block when the pool is full of cached blocks: how much a process grows.

Run `python benchmarks/memory_footprint.py`. Each contender runs in a process of its own: the manager is made, prompts
of 256 blocks are admitted and freed until every block is cached. What it keeps of the tokens is in the figure: kvblocks
keeps all of them, 64 of its bytes; vLLM, transformers and the plain Python keep hashes only.
"""

import argparse
import ctypes
import gc
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
from contenders import CONTENDERS, OURS, available, versions
from harness import Row, machine, report

BLOCK, PROMPT = 16, 256


def resident() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def grown(name: str, num_blocks: int) -> float:
    contender = CONTENDERS[name]
    rng = np.random.default_rng(0)
    longest = (PROMPT + 1) * BLOCK
    small = contender(
        2 * PROMPT, BLOCK, max_seqs=4, max_tokens=longest
    )  # imports and first-time buffers are not the blocks'
    for manager, blocks in ((small, PROMPT), (None, num_blocks)):
        if manager is None:
            before = resident()
            manager = contender(num_blocks, BLOCK, max_seqs=4, max_tokens=longest)
        for _ in range(blocks // PROMPT):
            tokens = rng.integers(0, 150_000, PROMPT * BLOCK, dtype=np.int32)
            admitted = manager.admit(manager.arrive(manager.prompt(tokens)))
            if admitted is None:
                raise RuntimeError(f"{name} has no room")
            manager.free([admitted[0]])
    del tokens, admitted
    return (resident() - before) / num_blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--contenders", nargs="+")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what a child process runs
    options = parser.parse_args()
    if options.one:
        print(grown(options.one, options.blocks))
        return
    found = {}
    for name in available(options.contenders):
        command = [sys.executable, __file__, "--one", name, "--blocks", str(options.blocks)]
        child = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if child.returncode:
            print(f"without {name}: {child.stderr.strip().splitlines()[-1]}")
        else:
            found[name] = float(child.stdout.split()[-1])
            print(f"{name}: {found[name]:.0f} bytes per block")
    workload = (
        f"{options.blocks:,} blocks of {BLOCK} tokens, all cached, by prompts of {PROMPT} blocks; resident growth"
    )
    row = Row("bytes per cached block", found, measure="B")
    report("Memory", [row], ours=OURS, workload=workload, about=machine(versions()), name="memory_footprint")


if __name__ == "__main__":
    main()
