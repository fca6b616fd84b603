"""Blocks on their way out: into host memory against memcpy, and a `DiskStore` against the disk itself.

Run `python benchmarks/tiers.py [--folder FOLDER]`, the folder on the disk in question. Blocks go into slots of a
`HostArena` and back on one thread; memcpy copies as many bytes for each block, in one piece. For the disk there are
objects of 1 MiB, and plain O_DIRECT writes and reads: all contenders move the same memory with as many threads and take
turns. `store alone` is `DiskStore.store` and `load` of one batch; with checksums
each object is sealed before it is stored and verified after it was loaded, with xxh3-128 or under a secret.
"""

import argparse
import ctypes
import mmap
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from harness import RESULTS, Row, compare, machine, report

from kvblocks import CacheConfig, CacheEngine
from kvblocks.memory import zeroed
from kvblocks.sizes import HEADER_BYTES
from kvblocks.tiers import Block, DiskStore, ObjectFormat, Status

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
