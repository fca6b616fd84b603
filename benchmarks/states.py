"""What a sequence of a model with states takes: the engine and manager of its plan, the exact minimum, vLLM's pages.

Run `python benchmarks/states.py`. For the numbers of published configs, K and V in bfloat16, blocks of 16: a
`CacheEngine` and a `BlockManager` are made from the plan for one sequence of 8k, 32k and 128k tokens, and nothing
more fits in. The sequence is prefilled in chunks and then decoded over a block's length. Taken is all that the engine
has allocated, once without a checkpoint and once with one, from which a prompt that begins alike would go on. The
minimum counts the tokens and the states without any padding. vLLM pads each state to a page, and its layers to groups
of one size: with `--mamba-cache-mode none`, which keeps no checkpoints, and with `align`, which keeps a page more for
each state.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from harness import machine

from kvblocks import BlockManager, CacheEngine, Plan, StepBuffers, plan

BLOCK = 16
CHUNK = 2048
LENGTHS = (8192, 32768, 131072)
CONFIGS = Path(__file__).resolve().parent.parent / "tests" / "data" / "configs"
MODELS: Mapping[str, Any] = {
    "Qwen3-Next 80B": CONFIGS / "qwen3-next-80b-a3b.json",
    "Qwen3.5 35B": CONFIGS / "qwen3.5-35b-a3b.json",
    "Nemotron 3 Nano": CONFIGS / "nemotron-3-nano-30b-a3b.json",
    "Falcon-H1 7B": CONFIGS / "falcon-h1-7b.json",
    "Kimi Linear 48B": CONFIGS / "kimi-linear-48b-a3b.json",
}


def taken(planned: Plan, length: int) -> int:
    """Bytes that the engine of a plan for one sequence allocates, after a sequence of `length` tokens went through."""
    config = planned.cache_config()
    engine = CacheEngine(config, planned.storage_dtype, "cpu", layout="NHD", num_states=planned.num_states or 0)
    manager = BlockManager.for_config(config, num_states=planned.num_states, watermark=0)
    step = StepBuffers.for_config(config, max_seqs=1, max_tokens=CHUNK, max_seq_len=length)
    tokens = np.random.default_rng(0).integers(0, 150_000, length, dtype=np.int32)

    def run(seq: int, number: int) -> None:
        step_id = manager.prepare([seq], [number], step)
        engine.move(step)
        manager.commit(step_id)

    seq, at = manager.admit(tokens[:-BLOCK], reserve=0)
    while at < length - BLOCK:
        end = min(at + CHUNK, length - BLOCK)
        checkpoint = manager.next_checkpoint(seq)
        end = checkpoint if at < checkpoint < end else end
        run(seq, end - at)
        at = end
    found = manager.match(tokens)
    if (found > 0) != bool(planned.checkpoints):
        raise AssertionError(f"{found} tokens of the prompt are found again with {planned.checkpoints} checkpoints")
    for token in tokens[-BLOCK:]:
        manager.append(seq, int(token))
        run(seq, 1)
    manager.audit()
    return engine.memory_bytes


def row(model: Any, length: int) -> dict[str, int]:
    """Bytes of one sequence, by what they are."""
    asked = {"seq_len": length, "concurrency": 1, "block_size": BLOCK}
    alone, both = plan(model, **asked, checkpoints=0), plan(model, **asked)
    vllm = plan(model, seq_len=length, engine="vllm")
    states = vllm.blocks_for(1) - len(vllm.groups)  # blocks beside the first of each group's tokens
    found = {
        "minimum": alone.cache_bytes(length),
        "kvblocks": taken(alone, length),
        "with a checkpoint": taken(both, length),
        "vLLM": vllm.sequence_bytes(length),
    }
    return found | {"vLLM, align": found["vLLM"] + states * vllm.block_bytes}


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    rows = {f"{name}, {length // 1024}k": row(model, length) for name, model in MODELS.items() for length in LENGTHS}
    heads = list(next(iter(rows.values())))
    print(*[f"{key}: {value}" for key, value in machine().items()], "", sep="\n")
    print(f"| MB of a sequence | {' | '.join(heads)} |\n| --- |{' ---: |' * len(heads)}")
    for title, found in rows.items():
        over = [f"{found[head] / 1e6:,.1f} (+{found[head] / found['minimum'] - 1:.2%})" for head in heads[1:]]
        print(f"| {title} | {found['minimum'] / 1e6:,.1f} | {' | '.join(over)} |")
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "states.json").write_text(json.dumps({"rows": rows, **machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
