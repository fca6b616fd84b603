"""What a CUDA device shows: how fast blocks move, what a step costs, and decoding with and without a captured graph.

Run `python benchmarks/cuda.py`; `--quick` for a minute, `--layouts NHD HDN` and `--dtypes float8_e4m3fn` for others.
Movement is timed on the device, with its caches flushed before every call, in GB/s of K and V moved (each byte is read
and written once, and counted once). "copy bandwidth" is what moving as many bytes takes at the speed of the device's
own copy of 1 GiB (its own fill, for `zero_blocks`), so the ratio in that column is the share of it that kvblocks
reaches. Host times are what the host spends in a call.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import torch
from harness import Row, compare, machine, report
from storage import by_token
from torch import Tensor

from kvblocks import BlockManager, CacheConfig, CacheEngine, PagedKVCache, StepBuffers, paged_attention
from kvblocks.sizes import LAYOUTS

HEADS, DIM, BLOCK = 8, 128, 16
QUERY_HEADS, LAYERS = 32, 32
CONTEXT = 8192
OURS = "kvblocks"
_FLUSH_BYTES = 256 << 20  # more than the caches of any device hold


class Clock:
    """Times on the device, the device's caches flushed before each."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.flushed = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def seconds(self, work: Callable[[], object]) -> float:
        """Median device time; the flush keeps the device busy while the host enqueues the work."""
        work()
        pairs = []
        for _ in range(self.repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flushed.zero_()
            self.flushed.zero_()
            start.record()
            work()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3

    def host_seconds(self, work: Callable[[], object]) -> float:
        times = []
        for _ in range(self.repeats):
            torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        return statistics.median(times)


def bandwidth(clock: Clock) -> tuple[float, float]:
    """Bytes a second of the device's own copy and fill of 1 GiB."""
    source = torch.randint(2**31 - 1, (1 << 28,), dtype=torch.int32, device="cuda")
    target = torch.zeros_like(source)
    return source.nbytes / clock.seconds(lambda: target.copy_(source)), source.nbytes / clock.seconds(target.zero_)


def movement(
    clock: Clock, copied: float, filled: float, dtype: torch.dtype, layout: str, tokens: int
) -> tuple[list[Row], list[Row]]:
    """Rows of device time, and of host time, of the four calls that move the K and V of so many tokens."""
    num_blocks = -(-tokens // BLOCK)
    cache = PagedKVCache(4 * num_blocks, HEADS, DIM, BLOCK, dtype, "cuda", layout=layout)
    keys, values = (torch.randn(tokens, HEADS, DIM, device="cuda").to(dtype) for _ in range(2))
    out = (torch.empty_like(keys), torch.empty_like(values))
    order = torch.randperm(4 * num_blocks, device="cuda")
    table, targets = order[:num_blocks], order[num_blocks : 2 * num_blocks]
    pairs = torch.stack([table, targets], 1)
    in_blocks = (table[:, None] * BLOCK + torch.arange(BLOCK, device="cuda")).flatten()[:tokens]
    scattered = torch.randperm(4 * num_blocks * BLOCK, device="cuda")[:tokens]
    views = by_token(cache)
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    sides = [side.view(integers) for side in (cache.key_cache, cache.value_cache)]

    def torch_write(slots: Tensor) -> None:
        for view, rows in zip(views, (keys, values), strict=True):
            rows = rows.view(tokens, *view.shape[2:]).view(integers)
            view.view(integers)[slots // BLOCK, slots % BLOCK] = rows

    def torch_gather() -> list[Tensor]:
        return [view.view(integers)[table].reshape(-1, HEADS, DIM)[:tokens] for view in views]

    def torch_copy() -> None:
        for side in sides:
            side[targets] = side[table]

    def torch_zero() -> None:
        for side in sides:
            side[table] = 0

    token_bytes = 2 * HEADS * DIM * dtype.itemsize
    calls: dict[str, tuple[int, float, Callable[[], object], Callable[[], object]]] = {
        "write, blocks": (
            tokens,
            copied,
            functools.partial(cache.write, keys, values, in_blocks),
            functools.partial(torch_write, in_blocks),
        ),
        "write, tokens": (
            tokens,
            copied,
            functools.partial(cache.write, keys, values, scattered),
            functools.partial(torch_write, scattered),
        ),
        "gather": (tokens, copied, functools.partial(cache.gather, table, tokens, out=out), torch_gather),
        "copy_blocks": (num_blocks * BLOCK, copied, functools.partial(cache.copy_blocks, pairs), torch_copy),
        "zero_blocks": (num_blocks * BLOCK, filled, functools.partial(cache.zero_blocks, table), torch_zero),
    }
    device, host = [], []
    for label, (moved, speed, ours, theirs) in calls.items():
        nbytes = moved * token_bytes
        name = f"{layout} {str(dtype).removeprefix('torch.')} {label}, {moved:,} tokens, {nbytes / 2**20:.3g} MiB"
        seconds = {OURS: clock.seconds(ours), "copy bandwidth": nbytes / speed, "torch indexing": clock.seconds(theirs)}
        device.append(Row(name, seconds, 1e-9 * nbytes, "GB/s"))
        host.append(Row(name, {OURS: clock.host_seconds(ours), "torch indexing": clock.host_seconds(theirs)}))
    return device, host


class Batch:
    """Sequences that decode together, and the layers of a model that are attention and nothing else."""

    def __init__(self, size: int) -> None:
        longest = CONTEXT + 4096
        self.size = size
        config = CacheConfig(
            num_layers=LAYERS, num_kv_heads=HEADS, head_dim=DIM, num_gpu_blocks=size * (longest // BLOCK + 1)
        )
        self.manager = BlockManager(config.num_gpu_blocks, BLOCK, prefix_caching=False)
        self.step = StepBuffers.for_config(
            config, max_seqs=size, max_tokens=max(size, CONTEXT), max_seq_len=longest + 1, device="cuda"
        )
        # Layers share memory, as all of it would not fit; not so few that a device's caches would hold it.
        layers = min(LAYERS, -(-_FLUSH_BYTES * LAYERS // config.memory_bytes("bfloat16")))
        self.caches = CacheEngine(config.replace(num_layers=layers), "bfloat16", "cuda", layout="NHD")
        for cache in self.caches:
            cache.key_cache.normal_()
            cache.value_cache.normal_()
        self.qkv = torch.randn(size, QUERY_HEADS + 2 * HEADS, DIM, device="cuda").bfloat16()
        self.seqs = []
        for number in range(size):
            seq, _ = self.manager.admit([number] * CONTEXT)
            self.manager.commit(self.manager.prepare([seq], CONTEXT, self.step))
            self.seqs.append(seq)
        self.tokens = [1] * size

    def prepare(self) -> None:
        self.manager.append(self.seqs, self.tokens)
        self.manager.commit(self.manager.prepare(self.seqs, 1, self.step))

    def layers(self) -> Tensor:
        q, k, v = self.qkv[:, :QUERY_HEADS], self.qkv[:, QUERY_HEADS:-HEADS], self.qkv[:, -HEADS:]
        for layer in range(LAYERS):
            cache = self.caches[layer % len(self.caches)]
            cache.write(k, v, self.step)
            out = paged_attention(q, cache, self.step)
        return out


def steps(clock: Clock, sizes: list[int]) -> list[Row]:
    """What a decode step costs before the model runs: on the host, and on the device (one copy, one kernel)."""
    rows = []
    for size in sizes:
        batch = Batch(size)
        host = Batch.__new__(Batch)
        host.manager, host.seqs, host.tokens = batch.manager, batch.seqs, batch.tokens
        host.step = StepBuffers(size, max(size, CONTEXT), batch.step.max_blocks_per_seq)
        name = f"batch {size}, sequences of {CONTEXT:,}: "
        on_host = {OURS: clock.host_seconds(batch.prepare), "without a device": clock.host_seconds(host.prepare)}
        rows.append(Row(name + "append, prepare, commit, on the host", on_host))
        rows.append(Row(name + "copy and spread, on the device", {OURS: clock.seconds(batch.prepare)}))
    return rows


def decode(sizes: list[int], repeats: int) -> list[Row]:
    rows = []
    for size in sizes:
        batch = Batch(size)
        batch.prepare()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            batch.layers()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            batch.layers()

        def run(enqueue: Callable[[], object], batch: Batch = batch) -> None:
            batch.prepare()
            enqueue()
            torch.cuda.synchronize()

        contenders = {
            OURS + ", graph": functools.partial(run, graph.replay),
            OURS + ", eager": functools.partial(run, batch.layers),
        }
        seconds = compare(contenders, repeats)
        rows.append(Row(f"batch {size}, {LAYERS} layers, sequences of {CONTEXT:,}", seconds, size, "tokens/s"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float8_e4m3fn"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256, 2048, 8192, 16 * 8192])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="NHD, bfloat16, fewer sizes")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"benchmarks/cuda.py needs a CUDA device, and torch {torch.__version__} sees none: nothing was measured.")
        return
    if options.quick:
        options.layouts, options.dtypes, options.repeats = ["NHD"], ["bfloat16"], 10
        options.tokens, options.batches = [1, 256, 8192], [1, 32]
    clock = Clock(options.repeats)
    copied, filled = bandwidth(clock)
    about = machine(["torch", "triton", "numpy"])
    about["GPU"] = torch.cuda.get_device_name()
    about["copy bandwidth"] = f"{copied / 1e9:.0f} GB/s copied, {filled / 1e9:.0f} GB/s filled (1 GiB)"
    device, host = [], []
    for dtype in options.dtypes:
        for layout in options.layouts:
            for tokens in options.tokens:
                rows = movement(clock, copied, filled, getattr(torch, dtype), layout, tokens)
                device += rows[0]
                host += rows[1]
                torch.cuda.empty_cache()
    workload = f"K and V of {HEADS} heads of {DIM}, blocks of {BLOCK} tokens scattered over a cache 4 times as large"
    path = report("Block movement", device, ours=OURS, workload=workload, about=about, name="cuda-movement")
    report("Block movement, host", host, ours=OURS, workload="the same calls", about={}, name="cuda-host")
    rows = steps(clock, options.batches)
    report("Steps", rows, ours=OURS, workload="one more token for each sequence", about={}, name="cuda-steps")
    rows = decode(options.batches, options.repeats)
    workload = (
        f"prepare, then write and attention of {QUERY_HEADS} query heads in every layer, bfloat16, NHD; wall time"
    )
    report("Decode", rows, ours=OURS + ", graph", workload=workload, about={}, name="cuda-decode")
    print(f"written to {path.parent}")


if __name__ == "__main__":
    main()
