"""Decode attention over blocks on CPU: the compiled kernel against two rivals.

One is plain torch over the same blocks, the other torch's own attention over K and V that lie in one piece, given for
nothing.

Run `python benchmarks/attention.py`; `--quick` for a look in a minute. `--threads` says how many torch may use. Beside
the ratios stands the share of the machine's read bandwidth, measured in the same run with as many threads.
"""

import argparse
import functools
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from harness import Row, compare, machine, report
from torch import Tensor

from kvblocks.attention import call
from kvblocks.storage.cache import PagedKVCache

HEADS = ((9, 3, 64), (14, 2, 64), (32, 8, 128))  # of queries, of K and V, and dims of a head
BATCHES = (1, 8, 32)
LENGTHS = (128, 1024, 4096, 16384)
BLOCK = 16
MOST_BYTES = 1 << 30  # of K and V: larger ones say nothing new and take minutes


@dataclass
class Step:
    """One token for each of `num_seqs` sequences of equal length.

    As with `StepBuffers`, what its arrays say is listed by the first layer that reads them; this is one of the others.
    """

    block_table: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    num_seqs: int
    num_tokens: int
    max_query_len: int
    max_seq_len: int
    derived: dict[Hashable, Any] = field(default_factory=dict)


def read_bandwidth() -> float:
    """Bytes a second that torch reads of a gibibyte that no cache holds, with the threads that it has."""
    memory = torch.ones(1 << 28)
    fastest = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        memory.sum()
        fastest = min(fastest, time.perf_counter() - start)
    return memory.nbytes / fastest


def decode(
    heads: tuple[int, int, int], batch: int, length: int, dtype: torch.dtype, bandwidth: float, repeats: int
) -> Row:
    queries, kv_heads, dim = heads
    per_seq = -(-length // BLOCK)
    cache = PagedKVCache(batch * per_seq, kv_heads, dim, BLOCK, dtype, "cpu", layout="NHD")
    cache.key_cache.normal_()
    cache.value_cache.normal_()
    table = torch.randperm(batch * per_seq, dtype=torch.int32).view(batch, per_seq)
    starts, lens = torch.arange(batch + 1, dtype=torch.int32), torch.full((batch,), length, dtype=torch.int32)
    step = Step(table, lens, starts, batch, batch, 1, length)
    keys, values = torch.randn(2, batch, kv_heads, length, dim).to(dtype)
    query = torch.randn(batch, queries, dim).to(dtype)
    reach = call._Reach(None, None)
    contenders: dict[str, Callable[[], object]] = {
        "compiled": functools.partial(call.paged_attention, query, cache, step),
        "plain torch": lambda: call._on_torch(query, cache, step, table, dim**-0.5, reach, None, None),
        "contiguous": lambda: torch.nn.functional.scaled_dot_product_attention(
            query[:, :, None], keys, values, enable_gqa=True
        ),
    }
    seconds = compare(contenders, repeats)
    nbytes = keys.nbytes + values.nbytes
    share = nbytes / seconds["compiled"] / bandwidth
    name = f"{str(dtype).removeprefix('torch.')} {queries}/{kv_heads} of {dim}, {batch} x {length:,}: {share:.0%}"
    return Row(name, seconds, nbytes / 1e9, "GB/s", {"share of read bandwidth": share})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="short sequences of one shape only")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bandwidth = read_bandwidth()
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for heads in HEADS[: 1 if args.quick else None]:
            for batch in BATCHES[: 2 if args.quick else None]:
                for length in LENGTHS[: 2 if args.quick else None]:
                    if 2 * batch * length * heads[1] * heads[2] * dtype.itemsize <= MOST_BYTES:
                        rows.append(decode(heads, batch, length, dtype, bandwidth, args.repeats))
    about = machine(("torch",)) | {"threads": str(args.threads), "read bandwidth": f"{bandwidth / 1e9:.1f} GB/s"}
    report(
        "Decode attention on CPU; after each workload the share of read bandwidth",
        rows,
        ours="compiled",
        workload=f"blocks of {BLOCK} in random order, layout NHD; contiguous: scaled_dot_product_attention",
        about=about,
        name="attention",
    )


if __name__ == "__main__":
    with torch.no_grad():
        main()
