"""Blocks on their way out: into host memory against memcpy, and a `DiskStore` against the disk itself.

Run `python benchmarks/tiers.py [--folder FOLDER]`, the folder on the disk in question. Blocks go into slots of a
`HostArena` and back on one thread; memcpy copies as many bytes for each block, in one piece. For the disk there are
objects of 1 MiB, and plain O_DIRECT writes and reads: all contenders move the same memory with as many threads and take
turns. `store alone` is `DiskStore.store` and `load` of one batch; with checksums
each object is sealed before it is stored and verified after it was loaded, with xxh3-128 or under a secret.

With `--model smollm2` (or a folder) a prompt is answered with one token: computed again, and found in the device's
pool, in host memory, or in a folder by a pool that has just been made. And `prepare` is timed while eight threads load
and store blocks: how long it may take when all of them want the interpreter.
"""

import argparse
import ctypes
import itertools
import mmap
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import RESULTS, Row, compare, machine, report

from kvblocks import BlockManager, CacheConfig, CacheEngine, StepBuffers
from kvblocks.memory import zeroed
from kvblocks.sizes import HEADER_BYTES
from kvblocks.tiers import Block, DiskStore, ObjectFormat, Status, Ticket, Tiers

OBJECT, BLOCK_SIZE = 1 << 20, 16
RAW, ALONE = "plain O_DIRECT", "store alone"


class Raw:
    """Objects at fixed places of a preallocated file; each round of writes takes the other half, as the store does."""

    def __init__(self, file: Path, buffers: list[memoryview], threads: int) -> None:
        self.buffers, self.threads, self.half = buffers, threads, 0
        self.fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        os.posix_fallocate(self.fd, 0, 2 * len(buffers) * OBJECT)
        self.pool = ThreadPoolExecutor(threads)

    def write(self) -> None:
        self.half = 1 - self.half
        self._each(os.pwritev)

    def read(self) -> None:
        self._each(os.preadv)

    def _each(self, call: Callable[[int, list[memoryview], int], int]) -> None:
        count = len(self.buffers)

        def share(first: int) -> None:
            for i in range(first, count, self.threads):
                moved = call(self.fd, [self.buffers[i]], (self.half * count + i) * OBJECT)
                if moved != OBJECT:
                    raise OSError(f"{moved} bytes moved of {OBJECT}")

        for _ in self.pool.map(share, range(self.threads)):
            pass


class Verified:
    """A store whose objects are sealed and verified, by as many threads as the store has."""

    def __init__(self, store: DiskStore, form: ObjectFormat, buffers: list[memoryview], threads: int) -> None:
        self.store, self.form, self.buffers, self.threads = store, form, buffers, threads
        self.blocks: list[Block] = form.blocks(form.root(), np.arange(len(buffers) * BLOCK_SIZE), BLOCK_SIZE)
        self.keys = [form.key(block, 0, "all") for block in self.blocks]
        self.pool = ThreadPoolExecutor(threads)

    def write(self) -> None:
        def one(i: int) -> None:
            self.form.seal(self.blocks[i], 0, "all", self.buffers[i])
            check(self.store.store([self.keys[i]], [self.buffers[i]]))

        self._each(one)

    def read(self) -> None:
        def one(i: int) -> None:
            check(self.store.load([self.keys[i]], [self.buffers[i]]))
            if not self.form.verify(self.blocks[i], 0, "all", self.buffers[i]):
                raise ValueError("other bytes were loaded than were stored")

        self._each(one)

    def _each(self, one: Callable[[int], None]) -> None:
        def share(first: int) -> None:
            for i in range(first, len(self.keys), self.threads):
                one(i)

        for _ in self.pool.map(share, range(self.threads)):
            pass


def check(statuses: list[Status]) -> None:
    if any(status is not Status.OK for status in statuses):
        raise ValueError(f"the store answered {set(statuses)}")


def moves(heads: int, dim: int, mebibytes: int, repeats: int) -> list[Row]:
    """Blocks of 8 layers in bfloat16, in a random order, so that no piece follows on the one before."""
    config = CacheConfig.for_memory(
        num_layers=8, num_kv_heads=heads, head_dim=dim, memory_bytes=mebibytes << 20, dtype="bfloat16"
    )
    count = config.num_gpu_blocks
    engine = CacheEngine(config, "bfloat16", "cpu", layout="NHD", prefault=True, host_blocks=count)
    nbytes, arena = engine.group_bytes(), engine.arena
    if arena is None:
        raise ValueError("the engine was given host_blocks and has no arena")
    arena.buffer[:] = bytes(arena.memory_bytes)
    pairs = torch.stack([torch.randperm(count), torch.randperm(count)], 1)
    flat = zeroed(count * nbytes, prefault=True)  # huge pages, as the other two have
    sources = [flat.data_ptr() + block * nbytes for block in pairs[:, 0].tolist()]
    targets = [arena.address + HEADER_BYTES + slot * arena.slot_bytes for slot in pairs[:, 1].tolist()]

    def memcpy(to: list[int], source: list[int]) -> None:
        for i in range(count):
            ctypes.memmove(to[i], source[i], nbytes)

    piece = engine.memory_of(0)[0][1]
    what = f"{count} blocks of {len(engine.memory_of(0))} pieces of {piece // 1024} KiB"
    gibibytes = count * nbytes / 2**30
    each = {
        f"{what} into slots": {
            "kvblocks": lambda: engine.copy_to_host(arena, pairs),
            "memcpy": lambda: memcpy(targets, sources),
        },
        f"{what} out of slots": {
            "kvblocks": lambda: engine.copy_from_host(arena, pairs),
            "memcpy": lambda: memcpy(sources, targets),
        },
    }
    return [Row(workload, compare(calls, repeats), gibibytes, "GiB/s") for workload, calls in each.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=RESULTS, help="on the disk to measure (default: %(default)s)")
    parser.add_argument("--mebibytes", type=int, default=256, help="moved in each direction at a time")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2000, help="that are timed beside busy threads")
    parser.add_argument("--model", help="smollm2, or a folder: what answers prompts; none without it")
    parser.add_argument("--prompt", type=int, default=1200, help="tokens of the prompt that it answers")
    options = parser.parse_args()
    rows = [row for heads, dim in ((8, 128), (2, 64)) for row in moves(heads, dim, options.mebibytes, options.repeats)]
    report(
        "Blocks and host memory",
        rows,
        ours="kvblocks",
        workload="8 layers in bfloat16, blocks of 16 tokens, NHD, one thread; wall time, medians",
        about=machine(("kvblocks", "torch")),
        name="tiers-moves",
    )
    disk(options)
    prepare_beside_workers(options)
    if options.model is not None:
        first_token(options)


def prepare_beside_workers(options: argparse.Namespace) -> None:
    """Steps of 64 sequences, alone and while eight threads look up, load and verify objects of 1 MiB."""
    blocks, length = 256, 16
    config = CacheConfig(num_layers=8, num_kv_heads=8, head_dim=256, num_gpu_blocks=blocks, block_size=BLOCK_SIZE)
    engine = CacheEngine(config, "bfloat16", "cpu", layout="NHD", host_blocks=blocks)
    manager = BlockManager.for_config(config, host_blocks=blocks)
    # More than the host pool holds, so that each is loaded again when its turn comes.
    prompts = [np.full(length * BLOCK_SIZE + 1, number) for number in range(2 * blocks // length)]
    step = StepBuffers.for_config(config, max_seqs=64, max_tokens=1024, max_seq_len=1024)

    def commit(sequences: list[int], query_lens: list[int]) -> None:
        step_id = manager.prepare(sequences, query_lens, step)
        engine.move(step)
        manager.commit(step_id)

    with tempfile.TemporaryDirectory(dir=options.folder) as name, DiskStore(name, "2GiB", threads=8) as store:
        tiers = Tiers(manager, engine, [store], namespace="0" * 64, threads=8, deadline=60)
        for prompt in prompts:
            sequence, _ = manager.admit(prompt)
            commit([sequence], [len(prompt)])
            manager.free([sequence])
            if not tiers.flush(60):
                raise ValueError("the blocks were not stored within a minute")
        sequences = [manager.admit([number], reserve=0)[0] for number in range(64)]
        alone = [timed_prepare(manager, engine, sequences, step) for _ in range(options.steps)]
        tickets: list[Ticket] = []
        busy, polls = [], []
        waiting = itertools.cycle(prompts)
        for _ in range(options.steps):
            start = time.perf_counter()
            tiers.poll()
            polls.append(time.perf_counter() - start)
            for ticket in [ticket for ticket in tickets if ticket.done]:
                tickets.remove(ticket)
                tiers.release(ticket)
            while len(tickets) < 4:
                tickets.append(tiers.fetch(next(waiting)))
            busy.append(timed_prepare(manager, engine, sequences, step))
        for ticket in tickets:
            tiers.release(ticket)
        hits = tiers.stats()[0].hits
        tiers.close()
    print(f"{options.steps} steps of 64 sequences; beside them {hits} objects of 1 MiB were loaded and verified")
    named = (("prepare alone", alone), ("prepare beside eight threads", busy), ("poll beside eight threads", polls))
    for what, times in named:
        p50, p99 = np.percentile(times, [50, 99])
        print(
            f"  {what}: median {1e6 * p50:.0f} µs, 99th percentile {1e6 * p99:.0f} µs, most {1e6 * max(times):.0f} µs"
        )


def timed_prepare(manager: BlockManager, engine: CacheEngine, sequences: list[int], step: StepBuffers) -> float:
    start = time.perf_counter()
    step_id = manager.prepare(sequences, 1, step)
    seconds = time.perf_counter() - start
    engine.move(step)
    manager.abort(step_id)
    time.sleep(0.0005)  # the pass, during which others have the interpreter
    return seconds


def first_token(options: argparse.Namespace) -> None:
    """Seconds until the first token of a prompt, by where its blocks lie."""
    import transformers

    from kvblocks import Pool, generate, smollm2

    model: Any
    if options.model == "smollm2":
        model, _ = smollm2.load()
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(options.model)
    prompt = torch.randint(100, 10_000, (options.prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    blocks = -(-options.prompt // BLOCK_SIZE)
    # Device blocks for one prompt alone, so that another one lets the first be evicted.
    sizes: dict[str, Any] = {"num_blocks": blocks + blocks // 4 + 2, "weights_version": "1"}
    block_bytes = Pool(model, num_blocks=1).config.block_bytes(model.dtype)
    sizes["host_memory"] = 5 * blocks * (block_bytes + 8192)
    rng = iter(range(10_000, 1 << 40))

    def other() -> list[int]:
        return [next(rng) % 40_000 for _ in prompt]

    def answer(pool: Any, tokens: list[int], expected: int) -> float:
        before = pool.manager.stats().hit_tokens
        start = time.perf_counter()
        generate(model, [tokens], pool=pool, max_new_tokens=1, max_batch_tokens=2048, temperature=0.0).run()
        seconds = time.perf_counter() - start
        found = pool.manager.stats().hit_tokens - before
        if found != expected:
            raise ValueError(f"{found} tokens were found and not {expected}")
        return seconds

    cached = (len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE
    times: dict[str, list[float]] = {name: [] for name in ("computed again", "device", "host memory", "disk")}
    with tempfile.TemporaryDirectory(dir=options.folder) as name, DiskStore(name, "8GiB") as store:
        with Pool(model, stores=[store], **sizes) as pool:
            answer(pool, prompt, 0)
        for _ in range(options.repeats):
            with Pool(model, stores=[store], **sizes) as pool:
                times["disk"].append(answer(pool, prompt, cached))
                times["device"].append(answer(pool, prompt, cached))
                times["computed again"].append(answer(pool, other(), 0))
                times["host memory"].append(answer(pool, prompt, cached))
    row = Row(f"{len(prompt)} tokens", {name: float(np.median(taken)) for name, taken in times.items()})
    report(
        "Time to first token",
        [row],
        ours="disk",
        workload=f"{options.model}, {str(model.dtype).removeprefix('torch.')}, blocks of {BLOCK_SIZE}; medians",
        about=machine(("kvblocks", "torch", "transformers")),
        name="tiers-first-token",
    )


def disk(options: argparse.Namespace) -> None:
    count, threads = options.mebibytes, options.threads
    memory = memoryview(mmap.mmap(-1, count * OBJECT))
    buffers = [memory[i * OBJECT : (i + 1) * OBJECT] for i in range(count)]
    for buffer in buffers:
        buffer[:] = os.urandom(OBJECT)
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        # Room for what is there, what replaces it, and the tables.
        capacity = int(2.2 * count * OBJECT) + (64 << 20)
        stores = {kind: DiskStore(folder / kind, capacity, threads=threads) for kind in ("alone", "sums", "secret")}
        raw = Raw(folder / "raw", buffers, threads)
        sums = Verified(stores["sums"], ObjectFormat("0" * 64), buffers, threads)
        keyed = Verified(stores["secret"], ObjectFormat("0" * 64, secret=os.urandom(32)), buffers, threads)
        keys = [f"object {i}" for i in range(count)]
        alone = stores["alone"]
        contenders = {
            "write": {
                ALONE: lambda: check(alone.store(keys, buffers)),
                RAW: raw.write,
                "with xxh3-128": sums.write,
                "with a secret": keyed.write,
            },
            "read": {
                ALONE: lambda: check(alone.load(keys, buffers)),
                RAW: raw.read,
                "with xxh3-128": sums.read,
                "with a secret": keyed.read,
            },
        }
        for call in contenders["write"].values():
            call()  # with the first call of `compare` every place has been written once
        rows = [
            Row(f"{what} {count} objects of 1 MiB", compare(calls, options.repeats), count / 1024, "GiB/s")
            for what, calls in contenders.items()
        ]
        direct = alone.stats().direct
        for store in stores.values():
            store.close()
        os.close(raw.fd)
    workload = f"{threads} threads, {'past the page cache' if direct else 'through the page cache'}; wall time, medians"
    about = machine(("kvblocks", "xxhash"))
    report("DiskStore", rows, ours=ALONE, workload=workload, about=about, name="tiers")
    for row in rows:
        print(
            f"{row.workload}: the store alone has {row.seconds[RAW] / row.seconds[ALONE]:.0%} of the disk's bandwidth"
        )


if __name__ == "__main__":
    main()
