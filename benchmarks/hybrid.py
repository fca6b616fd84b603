"""What a sequence of a hybrid model holds in a block manager over one pool, against a uniform layout and the minimum.

Run `python benchmarks/hybrid.py`. For the numbers of published configs (those of `plan.py`), K and V in bfloat16,
blocks of 16: a `BlockManager` with the groups of the plan takes one sequence of 8k, 32k and 128k tokens, prefilled in
chunks and then decoded over a block's length. Held is the most that it holds while it decodes. A uniform layout keeps
every token for every layer; the minimum counts the tokens that a query reaches, without any padding.
"""

import argparse
from typing import Any

import numpy as np
from contenders import OURS, versions
from harness import Row, machine, report
from plan import LENGTHS, MODELS

from kvblocks import plan
from kvblocks.manager import BlockManager, StepArrays

BLOCK = 16
CHUNK = 2048


def step_arrays(groups: int, max_blocks: int) -> StepArrays:
    each = () if groups == 1 else (groups,)
    return StepArrays(
        np.empty(CHUNK, np.int64),
        np.empty(CHUNK, np.int64),
        np.empty((*each, CHUNK), np.int64),
        np.empty((*each, 1, max_blocks), np.int32),
        np.empty(1, np.int32),
        np.empty(2, np.int32),
        np.empty((groups, 2), np.int64),
    )


def most_held(reaches: tuple[Any, ...], length: int) -> tuple[int, int]:
    """Blocks that the manager holds at most: while the last block's tokens are decoded, and while it prefills."""
    blocks = -(-length // BLOCK)
    manager = BlockManager(len(reaches) * (blocks + 1), BLOCK, groups=reaches)
    step = step_arrays(len(reaches), blocks + 1)
    tokens = np.random.default_rng(0).integers(0, 150_000, length, dtype=np.int32)
    seq, _ = manager.admit(tokens[: length - BLOCK], reserve=0)
    prefilling = decoding = 0
    left = length - BLOCK
    while left:
        chunk = min(left, CHUNK)
        step_id = manager.prepare(seq, chunk, step)
        prefilling = max(prefilling, manager.num_blocks - manager.num_free_blocks)
        manager.commit(step_id)
        left -= chunk
    for token in tokens[length - BLOCK :]:
        manager.append(seq, int(token))
        step_id = manager.prepare(seq, 1, step)
        decoding = max(decoding, manager.num_blocks - manager.num_free_blocks)
        manager.commit(step_id)
    manager.audit()
    return decoding, prefilling


def rows() -> list[Row]:
    found = []
    for name, config in MODELS.items():
        for length in LENGTHS:
            planned = plan(config, seq_len=length)
            reaches = tuple(group.reach for group in planned.groups)
            decoding, prefilling = most_held(reaches, length)
            held, minimum = decoding * planned.block_bytes, planned.cache_bytes(length)
            uniform = minimum / (1 - planned.uniform_waste())
            waste = held / minimum - 1
            notes = {
                "groups": len(reaches),
                "blocks": decoding,
                "waste over the minimum": waste,
                "bytes while prefilling in chunks of 2048": prefilling * planned.block_bytes,
            }
            title = f"{name}, {length // 1024}k, {len(reaches)} groups, {waste:.1%} over"
            seconds = {OURS: float(held), "uniform": uniform, "minimum": float(minimum)}
            found.append(Row(title, seconds, notes=notes, measure="B"))
    return found


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    report(
        "Bytes per sequence",
        rows(),
        ours=OURS,
        workload="published configs, bfloat16, blocks of 16; held by a manager while it decodes",
        about=machine(versions()),
        name="hybrid",
    )


if __name__ == "__main__":
    main()
