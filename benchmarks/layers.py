"""What the layers of a pass cost beside the model: writing K and V and attending, for each of 30 layers of one step.

The step is given to each call, so that its slots, lengths and tables are checked and listed once for all layers. The
rival gives each layer slots of its own and a step that keeps nothing, so that all of it is done again in each layer.
The kernels are the same: what differs is the Python around them, in CPU time of one thread.

Run `python benchmarks/layers.py`; `--quick` for a look.
"""

import argparse
from types import SimpleNamespace

import torch
from harness import Row, compare, machine, report
from torch import Tensor

from kvblocks import BlockManager, CacheConfig, CacheEngine, StepBuffers, paged_attention

LAYERS, HEADS, KV_HEADS, DIM = 30, 9, 3, 64
ARRAYS = ("block_table", "seq_lens", "query_start_loc", "num_seqs", "num_tokens", "max_query_len", "max_seq_len")


def decode(batch: int, length: int, dtype: torch.dtype, repeats: int) -> Row:
    config = CacheConfig(
        num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=DIM, num_gpu_blocks=batch * (length // 16 + 2)
    )
    engine, manager = CacheEngine(config, dtype, "cpu", layout="NHD"), BlockManager.for_config(config)
    step = StepBuffers.for_config(config, max_seqs=batch, max_tokens=batch * length, max_seq_len=length + 1)
    seqs = [manager.admit([number] * length)[0] for number in range(batch)]
    manager.commit(manager.prepare(seqs, length, step))
    manager.append(seqs, [1] * batch)
    manager.prepare(seqs, 1, step)
    engine.move(step)
    rows: Tensor = torch.randn(batch, HEADS + 2 * KV_HEADS, DIM).to(dtype)
    query, keys, values = rows.split([HEADS, KV_HEADS, KV_HEADS], 1)
    forgetful = SimpleNamespace(**{name: getattr(step, name) for name in ARRAYS})

    def once() -> None:
        step.derived.clear()
        for cache in engine:
            cache.write(keys, values, step)
            paged_attention(query, cache, step)

    def every_layer() -> None:
        for cache in engine:
            cache.write(keys, values, step.slot_mapping[: step.num_tokens])
            paged_attention(query, cache, forgetful)

    seconds = compare({"kvblocks": once, "every layer": every_layer}, repeats, clock="cpu")
    return Row(f"{LAYERS} layers, {batch} x {length} tokens, {dtype}".replace("torch.", ""), seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        decode(batch, length, torch.float32, 9 if args.quick else 101)
        for batch, length in ((1, 16), (1, 256), (8, 16), (32, 16))
    ]
    report(
        "Layers of a pass, beside the model",
        rows,
        ours="kvblocks",
        workload=f"{LAYERS} layers write one token for each sequence and attend, {HEADS}/{KV_HEADS} heads of {DIM}",
        about=machine(),
        name="layers",
    )


if __name__ == "__main__":
    main()
